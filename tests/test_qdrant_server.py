"""The server of the tests is faithful where it matters, seen through the real client on both protocols."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from qdrant_faults import KINDS
from qdrant_server import QdrantServer

trustme = pytest.importorskip("trustme")

Connect = Callable[..., QdrantClient]
PROTOCOLS = ("rest", "grpc")
WIDTH, N = 4, 60
VECTORS = np.random.default_rng(0).standard_normal((N, WIDTH)).round(3)
QUERY = [1.0, 0.5, -0.5, 0.0]
WORDS = models.SparseVector(indices=[3], values=[1.0])
MAJORITY = models.ReadConsistencyType.MAJORITY


def uuid_of(i: int) -> str:
    return f"00000000-0000-0000-0000-{i:012x}"


def points(start: int = 0, stop: int = N) -> list[models.PointStruct]:
    return [
        models.PointStruct(
            id=i if i % 2 else uuid_of(i),
            vector={
                "dense": VECTORS[i].tolist(),
                "words": models.SparseVector(indices=[i % 5, 7], values=[i + 1.0, 1]),
            },
            payload={
                "year": 2000 + i,
                "free": i % 3 == 0,
                "nested": {"a": [1, None, 0.5]},
            },
        )
        for i in range(start, stop)
    ]


FREE = models.FieldCondition(key="free", match=models.MatchValue(value=True))


def only(*conditions: models.Condition) -> models.Filter:
    return models.Filter(must=list(conditions))


def create(client: QdrantClient, name: str = "docs", **options: Any) -> None:
    dense = models.VectorParams(size=WIDTH, distance=models.Distance.COSINE)
    words = models.SparseVectorParams(modifier=models.Modifier.IDF)
    client.create_collection(name, {"dense": dense}, sparse_vectors_config={"words": words}, **options)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path / "server") as server:
        yield server


@pytest.fixture
def connect() -> Iterator[Connect]:
    clients = []

    def connect(server: QdrantServer, protocol: str = "grpc", **options: Any) -> QdrantClient:
        options = {"timeout": 10, "check_compatibility": False, **options}
        clients.append(
            QdrantClient(url=server.url, grpc_port=server.grpc_port, prefer_grpc=protocol == "grpc", **options)
        )
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture(params=PROTOCOLS)
def client(request: pytest.FixtureRequest, server: QdrantServer, connect: Connect) -> QdrantClient:
    return connect(server, request.param)


@pytest.fixture
def filled(client: QdrantClient) -> QdrantClient:
    create(client)
    client.upsert("docs", points())
    return client


def refusal(call: Callable[..., Any], *arguments: Any) -> tuple[int | str, str]:
    """What a refused call says: the status of REST or the code of gRPC, and the text."""
    try:
        call(*arguments)
    except UnexpectedResponse as error:
        return error.status_code or 0, str(error.structured()["status"]["error"])
    except Exception as error:  # gRPC has no public class for it: its attributes tell which error it is
        assert hasattr(error, "code") and hasattr(error, "details"), repr(error)
        return error.code().name, error.details()
    raise AssertionError("not refused")


def patiently(call: Callable[[], Any]) -> Any:
    """Once what is wrong has passed: a client of gRPC looks only now and then whether its server is back."""
    for _ in range(50):
        with suppress(Exception):
            return call()
        time.sleep(0.1)
    return call()


def test_collection_shows_what_it_was_made_with(client: QdrantClient) -> None:
    quantization = models.ScalarQuantization(scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8))
    create(
        client,
        shard_number=2,
        replication_factor=3,
        on_disk_payload=False,
        hnsw_config=models.HnswConfigDiff(m=8),
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=0),
        quantization_config=quantization,
        metadata={"kept": {"a": 1}},
    )
    client.update_collection("docs", metadata={"more": True}, hnsw_config=models.HnswConfigDiff(ef_construct=7))
    client.create_payload_index("docs", "year", models.PayloadSchemaType.INTEGER)
    client.create_payload_index("docs", "lang", models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD))
    info = client.get_collection("docs")
    params, config = info.config.params, info.config
    assert (params.shard_number, params.replication_factor, params.write_consistency_factor) == (2, 3, 1)
    assert params.on_disk_payload is False
    assert isinstance(params.vectors, dict) and params.vectors["dense"].size == WIDTH
    assert params.sparse_vectors and params.sparse_vectors["words"].modifier == models.Modifier.IDF
    assert (config.hnsw_config.m, config.hnsw_config.ef_construct) == (8, 7)
    assert config.optimizer_config.indexing_threshold == 0
    assert config.quantization_config == quantization
    assert config.metadata == {"kept": {"a": 1}, "more": True}
    assert {key: index.data_type for key, index in info.payload_schema.items()} == {
        "year": "integer",
        "lang": "keyword",
    }
    assert (info.status, info.points_count) == (models.CollectionStatus.GREEN, 0)
    client.delete_payload_index("docs", "year")
    assert list(client.get_collection("docs").payload_schema) == ["lang"]


def test_collections_come_and_go(client: QdrantClient) -> None:
    assert client.info().version == "1.18.2"
    assert not client.collection_exists("docs")
    create(client)
    client.create_collection("empty", {})
    assert sorted(one.name for one in client.get_collections().collections) == ["docs", "empty"]
    assert client.delete_collection("docs") and not client.delete_collection("docs")


def test_vectors_are_indexed_when_the_threshold_says_so(filled: QdrantClient, server: QdrantServer) -> None:
    sparse = N  # are always indexed
    assert filled.get_collection("docs").indexed_vectors_count == sparse
    filled.update_collection("docs", optimizers_config=models.OptimizersConfigDiff(indexing_threshold=1))
    server.be_busy(1)
    assert filled.get_collection("docs").status == models.CollectionStatus.YELLOW
    filled.upsert("docs", [models.PointStruct(id=i, vector={"dense": QUERY}) for i in range(1000, 1200)])
    info = filled.get_collection("docs")
    assert (info.status, info.indexed_vectors_count) == (models.CollectionStatus.GREEN, N + 200 + sparse)


def test_points_come_back_as_they_were(filled: QdrantClient) -> None:
    found = {point.id: point for point in filled.retrieve("docs", [1, uuid_of(2), 999], with_vectors=True)}
    assert set(found) == {1, uuid_of(2)}
    given = points(1, 2)[0]
    assert found[1].payload == given.payload
    vector: Any = found[1].vector
    np.testing.assert_allclose(vector["dense"], VECTORS[1] / np.linalg.norm(VECTORS[1]), atol=1e-6)
    assert vector["words"] == given.vector["words"]  # type: ignore[call-overload, index]  # of a union type, here it is a dict
    (record,) = filled.retrieve("docs", [1], with_payload=["nested.a", "year"])
    assert record.payload == {"nested": {"a": [1, None, 0.5]}, "year": 2001}


def test_filters_and_counts(filled: QdrantClient) -> None:
    free = [i for i in range(N) if i % 3 == 0]
    assert filled.count("docs").count == N
    assert filled.count("docs", only(FREE)).count == len(free), "booleans, which the binding alone cannot match"
    early = models.FieldCondition(key="year", range=models.Range(lt=2010))
    assert filled.count("docs", only(early)).count == 10
    either = models.Filter(should=[early, FREE], must_not=[models.HasIdCondition(has_id=[1, uuid_of(0)])])
    assert filled.count("docs", either).count == 10 + len(free) - 4 - 2
    filled.delete("docs", models.FilterSelector(filter=only(early)))
    filled.delete("docs", [11])
    assert filled.count("docs").count == N - 11


def test_scroll_reads_everything_once(filled: QdrantClient) -> None:
    seen: list[Any] = []
    offset = None
    while True:
        page, offset = filled.scroll("docs", only(FREE), limit=7, offset=offset, with_payload=False)
        seen += [point.id for point in page]
        if offset is None:
            break
    assert sorted(map(str, seen)) == sorted(str(point.id) for point in points()[::3])


def test_queries(filled: QdrantClient) -> None:
    cosines = VECTORS @ QUERY / np.linalg.norm(VECTORS, axis=1) / np.linalg.norm(QUERY)
    best = np.argsort(-cosines)[:5]
    params = models.SearchParams(exact=True, hnsw_ef=9, quantization=models.QuantizationSearchParams(rescore=True))
    hits = filled.query_points(
        "docs", QUERY, using="dense", limit=5, search_params=params, with_payload=["year"]
    ).points
    assert [hit.payload for hit in hits] == [{"year": 2000 + i} for i in best]
    np.testing.assert_allclose([hit.score for hit in hits], cosines[best], atol=1e-6)
    sparse = filled.query_points("docs", WORDS, using="words", limit=2).points
    assert [hit.payload["year"] for hit in sparse if hit.payload] == [2058, 2053]

    both = [
        models.Prefetch(query=QUERY, using="dense", limit=20, filter=only(FREE)),
        models.Prefetch(query=WORDS, using="words", limit=20, filter=only(FREE)),
    ]
    expected: dict[Any, float] = {}
    for one in both:
        ranking = filled.query_points("docs", one.query, using=one.using, query_filter=one.filter, limit=20)
        for rank, hit in enumerate(ranking.points):
            expected[hit.id] = expected.get(hit.id, 0) + 1 / (60 + rank)
    fused = filled.query_points("docs", models.RrfQuery(rrf=models.Rrf(k=60)), prefetch=both, limit=40).points
    assert {hit.id: hit.score for hit in fused} == pytest.approx(expected, abs=1e-6)
    default = filled.query_points("docs", models.FusionQuery(fusion=models.Fusion.RRF), prefetch=both, limit=1).points
    assert default[0].score > fused[0].score, "the server's own k is 2"
    distribution = models.FusionQuery(fusion=models.Fusion.DBSF)
    nested = models.Prefetch(prefetch=both, query=distribution, limit=3)
    requests = [
        models.QueryRequest(prefetch=both, query=distribution, limit=3),
        models.QueryRequest(prefetch=nested, query=models.NearestQuery(nearest=QUERY), using="dense", limit=9),
    ]
    order, scored = filled.query_batch_points("docs", requests)
    assert {hit.id for hit in order.points} == {hit.id for hit in scored.points}
    assert [hit.score for hit in scored.points] == sorted((hit.score for hit in scored.points), reverse=True)


def test_refusals_are_the_servers(filled: QdrantClient) -> None:
    rest = isinstance(refusal(filled.count, "x")[0], int)
    upsert, query = filled.upsert, filled.query_points
    create_again = filled.create_collection

    def one(id_: Any, **vector: list[float]) -> list[models.PointStruct]:
        return [models.PointStruct(id=id_, vector=dict(vector))]

    bad_id = "value a is not a valid point ID, valid values are either an unsigned integer or a UUID"
    dimension = "Wrong input: Vector dimension error: expected dim: 4, got 5"
    unknown = "Wrong input: Not existing vector name error: other"
    refused: list[tuple[tuple[Any, ...], int, str, str]] = [
        ((filled.count, "x"), 404, "NOT_FOUND", "Not found: Collection `x` doesn't exist!"),
        ((create_again, "docs", {}), 409, "ALREADY_EXISTS", "Wrong input: Collection `docs` already exists!"),
        ((upsert, "docs", one(1, dense=[1.0] * 5)), 400, "INVALID_ARGUMENT", dimension),
        ((upsert, "docs", one(1, other=QUERY)), 400, "INVALID_ARGUMENT", unknown),
        ((query, "docs", [1.0] * 5, "dense"), 400, "INVALID_ARGUMENT", dimension),
        ((query, "docs", QUERY, "other"), 400, "INVALID_ARGUMENT", unknown),
        (
            (upsert, "docs", one("a", dense=QUERY)),
            400,
            "INVALID_ARGUMENT",
            f"Format error in JSON body: {bad_id}" if rest else "Unable to parse UUID: a",
        ),
    ]
    for call, status, code, text in refused:
        assert refusal(*call) == (status if rest else code, text)
    nan = one(1, dense=[1.0, float("nan"), 0.0, 0.0])
    in_words = "Format error in JSON body" if rest else "not representable"  # REST's client sends null for it
    assert in_words in refusal(upsert, "docs", nan)[1]
    assert filled.retrieve("docs", [1])[0].payload == points(1, 2)[0].payload, "a refused batch changes nothing"


def test_strict_mode(filled: QdrantClient) -> None:
    strict = models.StrictModeConfig(enabled=True, unindexed_filtering_retrieve=False, unindexed_filtering_update=False)
    filled.update_collection("docs", strict_mode_config=strict)
    year = only(models.FieldCondition(key="year", match=models.MatchValue(value=2003)))
    text = (
        'Bad request: Index required but not found for "year" of one of the following types: [integer]. '
        "Help: Create an index for this key or use a different filter."
    )
    prefetch = models.Prefetch(query=QUERY, using="dense", filter=year)
    for call in (
        lambda: filled.count("docs", year),
        lambda: filled.scroll("docs", models.Filter(must=[year])),
        lambda: filled.query_points("docs", QUERY, using="dense", prefetch=prefetch),
        lambda: filled.delete("docs", year),
    ):
        assert refusal(call) in [(400, text), ("INVALID_ARGUMENT", text)]
    filled.create_payload_index("docs", "year", models.PayloadSchemaType.INTEGER)
    assert filled.count("docs", year).count == 1


def alias(collection: str, name: str) -> models.CreateAliasOperation:
    return models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=collection, alias_name=name))


def test_aliases(filled: QdrantClient) -> None:
    create(filled, "new")
    filled.update_collection_aliases([alias("docs", "live"), alias("docs", "other")])
    assert filled.collection_exists("live") and filled.count("live").count == N
    switch = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name="live"))
    assert refusal(filled.update_collection_aliases, [switch, alias("missing", "live")])[0] in (404, "NOT_FOUND")
    assert filled.count("live").count == N, "all or nothing"
    rename = models.RenameAliasOperation(
        rename_alias=models.RenameAlias(old_alias_name="other", new_alias_name="renamed")
    )
    filled.update_collection_aliases([switch, alias("new", "live"), rename])
    assert filled.count("live").count == 0
    assert {one.alias_name: one.collection_name for one in filled.get_aliases().aliases} == {
        "live": "new",
        "renamed": "docs",
    }
    assert [one.alias_name for one in filled.get_collection_aliases("docs").aliases] == ["renamed"]
    filled.delete_collection("new")
    assert not filled.collection_exists("live"), "an alias goes with its collection"


def test_everything_outlives_a_restart(filled: QdrantClient, server: QdrantServer) -> None:
    filled.update_collection_aliases([alias("docs", "live")])
    filled.create_payload_index("docs", "year", models.PayloadSchemaType.INTEGER)
    before = filled.get_collection("live")
    server.restart()
    assert patiently(lambda: filled.get_collection("live")) == before
    assert filled.count("live", only(FREE)).count == N / 3


def test_snapshots(filled: QdrantClient, server: QdrantServer) -> None:
    made = filled.create_snapshot("docs")
    assert made is not None and filled.list_snapshots("docs") == [made]
    content = httpx.get(f"{server.url}/collections/docs/snapshots/{made.name}").content
    assert len(content) == made.size
    filled.delete("docs", only(FREE))
    for name in ("docs", "copy"):
        answer = httpx.post(
            f"{server.url}/collections/{name}/snapshots/upload?priority=snapshot",
            files={"snapshot": ("any.snapshot", content)},
        )
        assert answer.json()["result"] is True
        assert filled.count(name, only(FREE)).count == N / 3
    bad = httpx.post(f"{server.url}/collections/docs/snapshots/upload", files={"snapshot": ("x", b"\r\n\r\n--no")})
    assert bad.status_code == 400
    filled.delete_snapshot("docs", made.name)
    assert filled.list_snapshots("docs") == []
    assert refusal(filled.delete_snapshot, "docs", made.name)[0] in (404, "NOT_FOUND")


@pytest.mark.filterwarnings("ignore:Api key is used")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_api_key(protocol: str, tmp_path: Path, connect: Connect) -> None:
    with QdrantServer(tmp_path, api_key="secret") as server:
        for key, text in (
            (None, "Must provide an API key or an Authorization bearer token"),
            ("wrong", "Invalid API key or JWT"),
        ):
            with pytest.raises(Exception, match=text) as caught:
                connect(server, protocol, api_key=key).get_collections()
            code = getattr(caught.value, "status_code", None) or caught.value.code().name  # type: ignore[attr-defined]  # errors of gRPC have `code`
            assert code in (401, "UNAUTHENTICATED")
        assert connect(server, protocol, api_key="secret").get_collections().collections == []
        assert httpx.get(f"{server.url}/readyz").text == "readyz check passed"
        assert [request.operation for request in server.requests] == ["get_collections"], "those let in"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls(protocol: str, tmp_path: Path, connect: Connect) -> None:
    authority = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    trust = {
        "verify": str(tmp_path / "ca.pem"),
        "grpc_options": {"root_certificates": authority.cert_pem.bytes()},
    }
    with QdrantServer(tmp_path / "server", certificate=authority.issue_cert("127.0.0.1")) as server:
        assert server.url.startswith("https://")
        with pytest.raises(Exception, match=r"(?i)certificate|failed to connect|handshake"):
            connect(server, protocol, timeout=2).get_collections()
        assert connect(server, protocol, **trust).get_collections().collections == []


def test_requests_are_recorded_alike(server: QdrantServer, connect: Connect) -> None:
    for protocol in PROTOCOLS:
        create(connect(server, protocol), protocol)
        connect(server, protocol).upsert(protocol, points(), wait=False, ordering=models.WriteOrdering.STRONG)
        connect(server, protocol).query_points(protocol, QUERY, using="dense", consistency=MAJORITY, timeout=7)
    seen = {(one.protocol, one.operation): one for one in server.requests}
    for operation, options in (
        ("upsert", {"wait": "false", "ordering": "strong"}),
        ("query_points", {"consistency": "majority", "timeout": "7"}),
    ):
        rest, grpc = (seen[protocol, operation] for protocol in PROTOCOLS)
        assert rest.options.items() >= options.items() <= grpc.options.items()
        assert type(rest.body) is type(grpc.body)
        assert rest.body.model_fields_set >= grpc.body.model_fields_set - {"limit"}


# ---- faults ----

FAILURES: dict[str, tuple[Any, Any]] = {
    "408": (UnexpectedResponse, "DEADLINE_EXCEEDED"),
    "429": (UnexpectedResponse, "RESOURCE_EXHAUSTED"),
    "429-retry-after": (ResourceExhaustedResponse, ResourceExhaustedResponse),
    "499": (UnexpectedResponse, "CANCELLED"),
    "500": (UnexpectedResponse, "INTERNAL"),
    "502-html": (UnexpectedResponse, "UNAVAILABLE"),
    "503": (UnexpectedResponse, "UNAVAILABLE"),
    "200-html": (json.JSONDecodeError, "UNKNOWN"),
    "reset": (ResponseHandlingException, "UNAVAILABLE"),
    "reset-midway": (ResponseHandlingException, "UNAVAILABLE"),
    "cut": (ResponseHandlingException, "UNAVAILABLE"),
    "stall": (ResponseHandlingException, "DEADLINE_EXCEEDED"),
    "trickle": (type(None), type(None)),
    "outage": (ResponseHandlingException, "UNAVAILABLE"),
}
"""What the client raises, on REST and on gRPC."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault(kind: str, protocol: str, tmp_path: Path, connect: Connect) -> None:
    with QdrantServer(tmp_path, proxied=True) as server:
        create(connect(server, protocol))
        client = connect(server, protocol, timeout=1)
        expected = 0
        for i, after in enumerate((False, True)):
            server.faults.add(kind, on="upsert", after=after)
            caught: Any = None
            try:
                client.upsert("docs", points(i, i + 1))
            except Exception as error:  # which kind it must be is asserted below
                caught = error
            said = caught.code().name if hasattr(caught, "code") else type(caught)
            assert said == FAILURES[kind][protocol == "grpc"]
            assert server.faults.struck[i:] == [(kind, "upsert", after)]
            expected += after or kind == "trickle"
            assert patiently(lambda: client.count("docs").count) == expected


def test_faults_at_random(tmp_path: Path, connect: Connect) -> None:
    def run(folder: str) -> list[tuple[str, str, bool]]:
        with QdrantServer(tmp_path / folder) as server:
            client = connect(server)
            create(client)
            server.faults.every(3, seed=5, kinds=("429", "503", "500"))
            for i in range(12):
                failed = False
                try:
                    client.upsert("docs", points(i, i + 1))
                except Exception:  # each kind of fault has a class of its own; here any error counts
                    failed = True
                assert failed == (i % 3 == 2)
            server.faults.clear()
            done = sum(after for _, _, after in server.faults.struck)
            assert client.count("docs").count == 8 + done
            return server.faults.struck

    struck = run("first")
    assert len(struck) == 4 and struck == run("second")


def test_faults_of_connections_need_a_proxy(server: QdrantServer) -> None:
    with pytest.raises(ValueError, match="proxied=True"):
        server.faults.add("reset")
    with pytest.raises(ValueError, match="expected one of"):
        server.faults.add("fire")
