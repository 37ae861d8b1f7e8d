"""A server that fails: what is stored stays right, what passes is tried again, what lasts is said at once.

On real sockets; `struck` shows that each failure happened.
"""

import asyncio
import gc
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

import numpy as np
import qdrant_faults
from qdrant_faults import KINDS, Proxy
from qdrant_places import CONFIG, E, N, assert_same, make_points, query_vector
from qdrant_server import QdrantServer

import d2llm
from d2llm.connectors import Qdrant, QdrantIndex
from d2llm.connectors.schema import Bm25Options
from d2llm.connectors.server_requests import BATCH
from d2llm.errors import MismatchError, StoreError
from d2llm.flat import FlatIndex
from d2llm.index import Index
from d2llm.search import Searcher
from d2llm.types import Candidates, Document

trustme = pytest.importorskip("trustme")

Connect: TypeAlias = Callable[..., QdrantIndex]
PROTOCOLS = ("rest", "grpc")
TIMEOUT = 10
"""Seconds that no answer takes, however busy the machine is. Tests that wait for a timeout have one of a second."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path / "server", version="1.20.0", proxied=True) as server:
        server.faults.stall_seconds, server.faults.trickle_seconds = 1.2, 0.2
        yield server


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(server: QdrantServer, protocol: str) -> Iterator[Connect]:
    """Opens the collection `docs` of a server, again at each call."""
    opened = []

    def connect(to: QdrantServer = server, **options: Any) -> QdrantIndex:
        grpc_port = to.grpc_port if protocol == "grpc" else None
        opened.append(QdrantIndex("docs", to.url, grpc_port=grpc_port, **{"timeout": TIMEOUT, **options}))
        return opened[-1]

    yield connect
    for index in opened:
        index.close()


@pytest.fixture
def index(connect: Connect) -> QdrantIndex:
    """With N points, and some patience."""
    index = connect(patience=4)
    index.open_for(CONFIG)
    index.upsert(make_points())
    return index


@pytest.fixture(scope="module")
def oracle() -> FlatIndex:
    flat = FlatIndex()
    flat.open_for(CONFIG)
    flat.upsert(make_points())
    return flat


@pytest.fixture
def more_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, tuple[Any, ...]] = {
        "400": (400, "Wrong input: Vector dimension error: expected dim: 4, got 5"),
        "401": (401, "Invalid API key or JWT", "text/plain"),
        "403": (403, "Forbidden: Global manage access is required"),
        "404": (404, "Not found: Collection `docs` doesn't exist!"),
        "507": (507, "Insufficient storage: the disk of this node is full"),
        "no space": (500, "Service internal error: No space left on device: WAL buffer size exceeds disk space"),
        "429-date": (429, "Too many requests", "application/json", "Wed, 21 Oct 2026 07:28:00 GMT"),
        "503-retry-after": (503, "Maintenance", "text/plain", 1),
    }  # fmt: skip
    monkeypatch.setattr(qdrant_faults, "ANSWERS", {**qdrant_faults.ANSWERS, **answers})
    monkeypatch.setattr(qdrant_faults, "KINDS", (*KINDS, *answers))
    codes = {403: "PERMISSION_DENIED", 507: "RESOURCE_EXHAUSTED"}
    monkeypatch.setattr(qdrant_faults, "CODES", {**qdrant_faults.CODES, **codes})


class Held:
    """The next call of an operation waits in the server until it is released."""

    def __init__(self, server: QdrantServer, operation: str) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        around = server.faults.around

        @contextmanager
        def waiting(name: str, protocol: str, peer: int) -> Iterator[None]:
            if name == operation and not self.entered.is_set():
                self.entered.set()
                self.released.wait(10)
            with around(name, protocol, peer):
                yield

        server.faults.around = waiting  # type: ignore[method-assign, assignment]  # replaced on purpose; called by position


def calls(index: QdrantIndex) -> list[Callable[[], Any]]:
    """A write, a search, and a search that is awaited."""
    return [
        lambda: index.upsert(make_points(1)),
        lambda: index.recall(query_vector(), 5),
        lambda: asyncio.run(index.arecall(query_vector(), 5)),
    ]


def assert_holds(index: Index, oracle: FlatIndex) -> None:
    """All documents, each once, with what came with them, and found alike."""
    ids = sorted(oracle.ids())
    assert sorted(index.ids()) == ids
    assert index.count() == len(ids)
    assert index.digests(ids) == oracle.digests(ids)
    assert index.get(ids) == oracle.get(ids)


def assert_finds(index: Index, oracle: FlatIndex) -> None:
    for seed in range(3):
        vector = query_vector(100 + seed)
        assert_same(index.recall(vector, 50), oracle.recall(vector, 50))


def count(server: QdrantServer, operation: str) -> int:
    return sum(request.operation == operation for request in server.requests)


# ---- loads under fire ----

UNREACHABLE = "cannot reach Qdrant at http://"
ERRORS: dict[str, str | tuple[str, str]] = {
    "408": "did not answer within 1 s.*Operation 'Update' timed out",
    "429": r"asks for fewer requests \(a rate limit\): Rate limiting exceeded",
    "429-retry-after": r"asks for fewer requests .*\(it asks for a pause of 1 s, longer than patience allows\)$",
    "499": "broke off a call, as servers do that stop.*answers no more calls",
    "500": "collection 'docs': Service internal error: task panicked$",
    "502-html": f"{UNREACHABLE}.*nginx",
    "503": f"{UNREACHABLE}.*shard 0 is recovering",
    "200-html": ("is no Qdrant, a proxy in front of it, or .* check the address", "collection 'docs': <html>.*nginx"),
    "reset": UNREACHABLE,
    "reset-midway": UNREACHABLE,
    "cut": UNREACHABLE,
    "stall": ("did not answer within 1 s", f"did not answer within 1 s|{UNREACHABLE}"),
    "outage": UNREACHABLE,
}
"""What a load without patience ends with; where they differ, on REST and on gRPC. (gRPC may notice in time that a
connection is dead.)"""
SLOW = ("408", "stall")
LASTING = {("200-html", "grpc")}
"""On gRPC it has a code that may mean anything."""


@pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_load_under_fire(kind: str, protocol: str, server: QdrantServer, connect: Connect, oracle: FlatIndex) -> None:
    """Two chunks: the first write of the one fails instead of its work, of the other after it."""
    timeout = 1 if kind in SLOW else TIMEOUT
    hasty, patient = connect(patience=0, timeout=timeout), connect(patience=5, timeout=timeout)
    patient.open_for(CONFIG)
    hasty.open_for(CONFIG)
    chunks = {False: make_points()[: N // 2], True: make_points()[N // 2 :]}
    stored = 0
    for after, chunk in chunks.items():
        server.faults.add(kind, on="upsert", after=after)
        if kind == "trickle":  # slow, but it comes
            hasty.upsert(chunk)
            stored += len(chunk)
        else:
            said = ERRORS[kind]
            with pytest.raises(StoreError, match=said if isinstance(said, str) else said[protocol == "grpc"]) as caught:
                hasty.upsert(chunk)
            assert "(tried" not in str(caught.value)
            stored += BATCH if after else 0
        assert patient.count() == stored
    struck = [(kind, "upsert", False), (kind, "upsert", True)]
    assert server.faults.struck == struck

    for after, chunk in chunks.items():  # the same load again
        if (kind, protocol) not in LASTING:
            server.faults.add(kind, on="upsert", after=after)
            struck.append((kind, "upsert", after))
        patient.upsert(chunk)
    assert server.faults.struck == struck
    assert_holds(patient, oracle)
    assert_finds(patient, oracle)


def test_load_under_every_fire(protocol: str, server: QdrantServer, connect: Connect, oracle: FlatIndex) -> None:
    """Every third write fails, of any kind; the load is run again until it comes to its end."""
    with connect(patience=5) as index:
        index.open_for(CONFIG)
        index.upsert(make_points(50, seed=3))  # other content under the same ids
    server.faults.every(3, seed=13946)
    todo = make_points()
    while todo:
        index = connect(patience=0.5, timeout=1)
        with suppress(StoreError):
            stored = index.digests([point.id for point in todo])
            todo = [point for point in todo if stored.get(point.id) != point.digest]
            for start in range(0, len(todo), 12):
                index.upsert(todo[start : start + 12])
                index.delete(["nowhere", f"new {start}"])
    server.faults.clear()
    assert len({kind for kind, _, _ in server.faults.struck}) > 8
    index = connect()
    assert_holds(index, oracle)
    assert_finds(index, oracle)


def test_documents_added_under_fire(model: d2llm.Model, protocol: str, server: QdrantServer, connect: Connect) -> None:
    """Run again, `Index.add` leaves alone what was stored."""
    documents = [Document(f"{i}", f"number {i}", payload={"i": i}) for i in range(2 * BATCH + 40)]
    flat = FlatIndex()
    flat.add(model, documents)
    server.faults.add("reset", on="upsert", after=True)
    with pytest.raises(StoreError, match=UNREACHABLE):
        connect(patience=0).add(model, documents)
    for kind in ("503", "cut", "outage"):
        server.faults.add(kind, on="upsert")
    index = connect(patience=10)
    report = index.add(model, documents)
    assert (report.added, report.unchanged) == (BATCH + 40, BATCH)
    assert [kind for kind, _, _ in server.faults.struck] == ["reset", "503", "cut", "outage"]
    assert_holds(index, flat)
    query = model.encode_query(["number 7"]).vectors[0]
    assert_same(index.recall(query, 20), flat.recall(query, 20))


def test_server_that_restarts_during_a_load(tmp_path: Path, protocol: str, connect: Connect, oracle: FlatIndex) -> None:
    with QdrantServer(tmp_path / "restarts", version="1.20.0") as server:
        index = connect(server, patience=10)
        index.open_for(CONFIG)
        restart = threading.Thread(target=server.restart)
        points = make_points()
        for start in range(0, N, 10):
            if start == 50:
                restart.start()
            index.upsert(points[start : start + 10])
        restart.join()
        assert_holds(index, oracle)
        assert_finds(index, oracle)
        index.close()


# ---- connections ----


def test_connection_that_dies_silently(server: QdrantServer, connect: Connect, oracle: FlatIndex) -> None:
    """What is tried again goes over another connection, also where calls share one."""
    server.faults.stall_seconds = 60
    connect().open_for(CONFIG)
    index = connect(patience=8, timeout=1)
    server.faults.add("stall", on="upsert")
    index.upsert(make_points())
    assert server.faults.struck == [("stall", "upsert", False)]
    assert_holds(index, oracle)


class Far(Proxy):
    """The first connection through it takes its time."""

    seconds = 1.2

    def _connect(self, client: Any) -> None:
        time.sleep(self.seconds)
        self.seconds = 0
        super()._connect(client)


def test_connection_that_is_made_slowly(server: QdrantServer) -> None:
    far = Far(server.faults.proxies["grpc"].port)
    with QdrantIndex("docs", server.url, grpc_port=far.port, timeout=3, patience=0) as index:
        index.open_for(CONFIG)
    assert far.seconds == 0
    far.close()


def test_first_call_has_no_more_patience_than_was_given(protocol: str) -> None:
    index = QdrantIndex("docs", "http://127.0.0.1:1", grpc_port=1 if protocol == "grpc" else None, patience=0)
    with pytest.raises(StoreError, match=UNREACHABLE) as caught:
        index.count()
    index.close()
    assert "(tried" not in str(caught.value)


# ---- what is tried again ----

PASSING = ("429", "500", "503", "reset", "cut", "outage")
SAID_AT_ONCE = {
    "400": "collection 'docs': Wrong input: Vector dimension error: expected dim: 4, got 5$",
    "401": "refuses access to 'docs': check the API key .*Invalid API key or JWT",
    "403": "refuses access to 'docs': check the API key .*Global manage access is required",
    "404": "has no collection 'docs' any more: index the corpus again",
    "507": r"is full \(disk, memory or a quota\): Insufficient storage: the disk",
    "no space": r"is full \(disk, memory or a quota\): .*No space left on device",
}


def test_search_under_fire(index: QdrantIndex, server: QdrantServer, oracle: FlatIndex) -> None:
    expected = oracle.recall(query_vector(), 5)
    for kind in PASSING:
        server.faults.struck.clear()
        for search in calls(index)[1:]:
            server.faults.add(kind, on="query_batch_points")
            assert_same(search(), expected)
        assert server.faults.struck == [(kind, "query_batch_points", False)] * 2


@pytest.mark.usefixtures("more_answers")
def test_what_lasts_is_said_at_once(index: QdrantIndex, server: QdrantServer) -> None:
    server.requests.clear()
    for kind, said in SAID_AT_ONCE.items():
        for call in calls(index):
            server.faults.add(kind)
            with pytest.raises(StoreError, match=said) as caught:
                call()
            assert "(tried" not in str(caught.value)
    assert len(server.requests) == len(server.faults.struck) == 3 * len(SAID_AT_ONCE)


def test_error_says_how_often_it_was_tried(server: QdrantServer, connect: Connect) -> None:
    hasty = connect(patience=0.7, timeout=10.0)  # only the patience is short
    hasty.open_for(CONFIG)
    for call in calls(hasty):
        server.faults.struck.clear()
        server.faults.add("503", times=99)
        with pytest.raises(StoreError, match=rf"{UNREACHABLE}.*\(tried \d+ times in \d\.\d s\)$") as caught:
            call()
        server.faults.clear()
        tried = re.search(r"tried (\d+)", str(caught.value))
        assert tried and int(tried[1]) == len(server.faults.struck) > 1


@pytest.mark.usefixtures("more_answers")
@pytest.mark.parametrize(
    ("kind", "protocol"),
    [("429-retry-after", "rest"), ("429-retry-after", "grpc"), ("503-retry-after", "rest")],
    indirect=["protocol"],
)
def test_pause_that_a_server_asks_for(kind: str, protocol: str, server: QdrantServer, connect: Connect) -> None:
    hasty, patient = connect(patience=0.9), connect(patience=3)
    patient.open_for(CONFIG)
    hasty.open_for(CONFIG)
    server.faults.add(kind, on="upsert")
    with pytest.raises(StoreError, match=r"\(it asks for a pause of 1 s, longer than patience allows\)$"):
        hasty.upsert(make_points())
    assert len(server.faults.struck) == 1
    server.faults.add(kind, on="upsert")
    start = time.monotonic()
    patient.upsert(make_points())
    assert time.monotonic() - start >= 1
    assert len(server.faults.struck) == 2


@pytest.mark.usefixtures("more_answers")
@pytest.mark.parametrize("protocol", ["rest"], indirect=True)
def test_pause_until_a_date(index: QdrantIndex, server: QdrantServer) -> None:
    """Which the client cannot read."""
    server.faults.add("429-date", on="upsert")
    index.upsert(make_points(1))
    assert len(server.faults.struck) == 1


def test_search_that_took_the_whole_timeout_is_not_repeated(
    index: QdrantIndex, server: QdrantServer, connect: Connect
) -> None:
    for search in calls(connect(patience=4, timeout=1))[1:]:
        server.requests.clear()
        held = Held(server, "query_batch_points")
        with pytest.raises(StoreError, match=r"did not answer within 1 s: raise timeout, or .* busy \([^()]*\)$"):
            search()
        held.released.set()
        assert count(server, "query_batch_points") == 1


def test_write_that_took_the_whole_timeout_is_repeated(
    server: QdrantServer, connect: Connect, oracle: FlatIndex
) -> None:
    connect().open_for(CONFIG)
    index = connect(patience=2.9, timeout=3)  # less patience than the timeout
    held = Held(server, "upsert")
    index.upsert(make_points())
    held.released.set()
    assert count(server, "upsert") == -(-N // BATCH) + 1
    assert_holds(index, oracle)


@pytest.mark.parametrize("kind", ["reset", "408"])
def test_collection_whose_making_was_not_answered(kind: str, server: QdrantServer, connect: Connect) -> None:
    index = connect(patience=4, options={"bm25": {"average_words": 7.5}})
    server.faults.add(kind, on="create_collection", after=True)
    index.open_for(CONFIG)
    assert count(server, "create_collection") == 2
    assert index.count() == 0


def test_collection_that_another_makes_meanwhile(server: QdrantServer, connect: Connect) -> None:
    index, other = connect(timeout=5), connect(timeout=5)
    held = Held(server, "create_collection")

    def make_other() -> None:
        held.entered.wait(10)
        other.open_for(replace(CONFIG, fingerprint="fedcba"))
        held.released.set()

    thread = threading.Thread(target=make_other)
    thread.start()
    with pytest.raises(StoreError, match="another process just made the collection 'docs': run this again"):
        index.open_for(CONFIG)
    thread.join()
    with pytest.raises(MismatchError, match="fedcba, this model is 0123456789abcdef"):
        index.open_for(CONFIG)


# ---- on an event loop ----


async def arecall_ids(index: QdrantIndex, seed: int) -> list[str]:
    found: Candidates = await index.arecall(query_vector(seed), 10)
    return found.ids


def test_arecall_is_recall(index: QdrantIndex, oracle: FlatIndex) -> None:
    async def search() -> None:
        for condition in ({}, {"lang": "en"}):
            found = await index.arecall(query_vector(), 50, filter=condition)
            assert_same(found, oracle.recall(query_vector(), 50, filter=condition))
        with pytest.raises(ValueError, match="query vector holds NaN"):
            await index.arecall(np.full(E, np.nan, np.float32), 5)

    asyncio.run(search())


def test_searches_do_not_wait_for_one_another(index: QdrantIndex, server: QdrantServer, oracle: FlatIndex) -> None:
    held = Held(server, "query_batch_points")

    async def search() -> None:
        first = asyncio.create_task(arecall_ids(index, 0))
        assert await asyncio.to_thread(held.entered.wait, 5)
        others = await asyncio.gather(*(arecall_ids(index, seed) for seed in range(1, 11)))
        assert not first.done()
        held.released.set()
        assert [await first, *others] == [oracle.recall(query_vector(seed), 10).ids for seed in range(11)]

    asyncio.run(search())


def test_searcher_on_an_event_loop(model: d2llm.Model, server: QdrantServer, connect: Connect) -> None:
    index = connect(patience=4, timeout=5)
    index.add(model, [Document(f"{i}", f"number {i}") for i in range(60)])
    searcher = Searcher(model, index)
    held = Held(server, "query_batch_points")

    async def search() -> None:
        first = asyncio.create_task(searcher.asearch("number 0", 3))
        assert await asyncio.to_thread(held.entered.wait, 5)
        others = await asyncio.gather(*(searcher.asearch(f"number {i}", 3) for i in range(1, 50)))
        assert not first.done()
        held.released.set()
        for i, hits in enumerate([await first, *others]):
            assert [hit.id for hit in hits] == [hit.id for hit in searcher.search(f"number {i}", 3)]

    asyncio.run(search())


def test_search_that_is_given_up(index: QdrantIndex, server: QdrantServer, oracle: FlatIndex) -> None:
    held = Held(server, "query_batch_points")

    async def search() -> None:
        with pytest.raises(TimeoutError, match=r"^$"):
            await asyncio.wait_for(arecall_ids(index, 0), 0.2)
        held.released.set()
        assert await arecall_ids(index, 1) == oracle.recall(query_vector(1), 10).ids

    asyncio.run(search())


def test_each_event_loop_has_its_own_connections(index: QdrantIndex, server: QdrantServer, oracle: FlatIndex) -> None:
    expected = [oracle.recall(query_vector(seed), 10).ids for seed in range(3)]
    held = Held(server, "query_batch_points")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(lambda: asyncio.run(arecall_ids(index, 0)))
        assert held.entered.wait(10)
        assert [asyncio.run(arecall_ids(index, seed)) for seed in (1, 2)] == expected[1:]
        held.released.set()
        assert first.result() == expected[0]
    assert not index._engine._calls.async_clients, "they end with it"
    gc.collect()  # what was left open says so now


def test_aclose(index: QdrantIndex, oracle: FlatIndex) -> None:
    async def search() -> None:
        async with aclosing(index):
            await arecall_ids(index, 0)
            assert index._engine._calls.async_clients
        assert not index._engine._calls.async_clients
        assert await arecall_ids(index, 1) == oracle.recall(query_vector(1), 10).ids, "it opens again"

    asyncio.run(search())
    gc.collect()


# ---- what reaches a server ----


def test_settings_of_a_cluster_reach_the_server(server: QdrantServer, connect: Connect) -> None:
    words = Bm25Options()
    options = {"shards": 6, "replicas": 3, "write_consistency": 2, "bm25": words}
    index = connect(options=options, read_consistency="majority", write_ordering="strong")
    index.open_for(CONFIG)
    index.index_payload({"lang": "keyword"})
    index.upsert(make_points(3))
    index.recall(query_vector(), 5)
    index.recall(query_vector(), 5, query_text="text")
    asyncio.run(index.arecall(query_vector(), 5))
    index.get(["doc 1"])
    list(index.ids())
    index.delete(["doc 1"])
    index.delete_where({"lang": "fr"})
    sent: dict[str, list[Any]] = {}
    for request in server.requests:
        sent.setdefault(request.operation, []).append(request)
    (made,) = sent["create_collection"]
    assert (made.body.shard_number, made.body.replication_factor, made.body.write_consistency_factor) == (6, 3, 2)
    for operation, times in {"upsert": 1, "delete": 2}.items():
        assert [request.options.get("ordering") for request in sent[operation]] == ["strong"] * times
        assert [request.options["wait"] for request in sent[operation]] == ["true"] * times
    # the index of passages, and that of the field
    assert [request.options["wait"] for request in sent["create_payload_index"]] == ["true"] * 2
    # `upsert` and `delete` ask for the passages that a document has
    for operation, times in {"query_batch_points": 3, "retrieve": 3, "scroll": 1}.items():
        assert [request.options.get("consistency") for request in sent[operation]] == ["majority"] * times
        assert [request.options["timeout"] for request in sent[operation]] == [str(TIMEOUT)] * times


def test_number_of_copies_to_read(index: QdrantIndex, server: QdrantServer, connect: Connect) -> None:
    connect(read_consistency=2).recall(query_vector(), 5)
    assert server.requests[-1].options["consistency"] == "2"
    index.recall(query_vector(), 5)
    assert "consistency" not in server.requests[-1].options


def test_nothing_that_is_not_finite_is_sent(index: QdrantIndex, server: QdrantServer) -> None:
    server.requests.clear()
    for value in (np.nan, np.inf):
        bad = np.full(E, value, np.float32)
        with pytest.raises(ValueError, match="'doc 0' holds NaN"):
            index.upsert([replace(make_points(1)[0], vector=bad)])
        with pytest.raises(ValueError, match="query vector holds NaN"):
            index.recall(bad, 5)
    assert not server.requests


# ---- snapshots, keys and certificates ----


@pytest.mark.parametrize("protocol", ["rest"], indirect=True)
def test_snapshot_that_breaks_off(
    index: QdrantIndex, server: QdrantServer, connect: Connect, tmp_path: Path, oracle: FlatIndex
) -> None:
    file = tmp_path / "made" / "docs.snapshot"
    with pytest.raises(StoreError, match=r"docs\.snapshot: No such file or directory"):
        index.snapshot(file)
    file.parent.mkdir()
    for kind, operation in (("cut", "download_snapshot"), ("reset", "create_snapshot")):
        server.faults.add(kind, on=operation)
        with pytest.raises(StoreError, match=UNREACHABLE):
            index.snapshot(file)
        assert not list(file.parent.iterdir())
    index.snapshot(file)
    index.drop()
    qdrant = Qdrant(server.url, grpc_port=None, timeout=TIMEOUT)
    with pytest.raises(StoreError, match="nowhere: No such file or directory"):
        qdrant.restore("docs", tmp_path / "nowhere")
    server.faults.add("503", on="upload_snapshot")
    with pytest.raises(StoreError, match=f"{UNREACHABLE}.*shard 0 is recovering"):
        qdrant.restore("docs", file)
    qdrant.restore("docs", file)
    assert_holds(index, oracle)
    assert {operation for _, operation, _ in server.faults.struck} == {
        "download_snapshot", "create_snapshot", "upload_snapshot"
    }  # fmt: skip


def test_key_and_certificate(tmp_path: Path, connect: Connect, oracle: FlatIndex) -> None:
    authority, pem = trustme.CA(), tmp_path / "ca.pem"
    pem.write_bytes(authority.cert_pem.bytes())
    certificate = authority.issue_cert("127.0.0.1")
    with QdrantServer(tmp_path / "safe", certificate=certificate, api_key="secret", version="1.20.0") as safe:
        index = connect(safe, api_key="secret", ca_file=pem, timeout=5)
        index.open_for(CONFIG)
        index.upsert(make_points())
        assert_finds(index, oracle)
        assert asyncio.run(arecall_ids(index, 0)) == oracle.recall(query_vector(0), 10).ids
        index.snapshot(tmp_path / "docs.snapshot")
        with pytest.raises(StoreError, match=r"refuses access to 'docs': check the API key .*Invalid"):
            connect(safe, api_key="wrong", ca_file=pem, timeout=5).count()
        with pytest.raises(StoreError, match=f"cannot reach Qdrant at {safe.url}"):
            connect(safe, api_key="secret", timeout=5, patience=0).count()
        index.close()
    for content, said in (("nothing", r"NO_CERTIFICATE|no certificate"), (None, "No such file or directory")):
        pem.unlink()
        if content is not None:
            pem.write_text(content)
        with pytest.raises(StoreError, match=rf"ca\.pem: .*({said}).*: the certificate authority's file"):
            connect(safe, ca_file=pem).count()
