"""One contract, every index: what FlatIndex answers is the truth."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

import qdrant_client
from qdrant_places import (
    CONFIG,
    FILTERS,
    PLACES,
    E,
    H,
    N,
    assert_same,
    make_points,
    payload_number,
    place_of,
    query_vector,
)
from qdrant_server import QdrantServer

from d2llm.connectors import CollectionOptions, Effort, Qdrant, QdrantIndex
from d2llm.connectors.schema import Metadata
from d2llm.errors import ArgumentError, DataError, MismatchError, StoreError
from d2llm.filters import check_filter, matches
from d2llm.flat import FlatIndex
from d2llm.index import Index
from d2llm.lock import FileLock, Locked


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(params=["flat", *PLACES])
def fresh(request: pytest.FixtureRequest, tmp_path: Path, shared_server: QdrantServer) -> Iterator[Index]:
    """An index of each kind, with no collection behind it yet."""
    if request.param == "flat":
        yield FlatIndex()
    else:
        with place_of(request.param, tmp_path, shared_server) as place:
            yield place()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path / "server") as server:
        yield server


@pytest.fixture
def index(fresh: Index) -> Index:
    """An index of each kind, with N points."""
    fresh.open_for(CONFIG)
    fresh.upsert(make_points())
    return fresh


@pytest.fixture
def not_flat(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["fresh"] == "flat":
        pytest.skip("of Qdrant: a flat index has no engine, and keeps float32")


@pytest.fixture(scope="module")
def oracle() -> FlatIndex:
    flat = FlatIndex()
    flat.open_for(CONFIG)
    flat.upsert(make_points())
    return flat


@pytest.fixture
def embedded(tmp_path: Path) -> Callable[[], QdrantIndex]:
    """Opens one folder, again at each call."""
    return lambda: QdrantIndex("docs", tmp_path / "qdrant")


# ---- the contract ----


def test_recall_is_the_oracles(index: Index, oracle: FlatIndex) -> None:
    for seed in range(3):
        vector = query_vector(100 + seed)
        assert_same(index.recall(vector, 50), oracle.recall(vector, 50))


def test_recall_of_more_than_there_is(index: Index, oracle: FlatIndex) -> None:
    assert_same(index.recall(query_vector(), 10 * N), oracle.recall(query_vector(), 10 * N))


def test_exact_recall_is_the_oracles(index: Index, oracle: FlatIndex, not_flat: None) -> None:
    assert isinstance(index, QdrantIndex)
    assert not index.has_graph(), "so few passages are compared one by one"
    for effort in (Effort(exact=True), Effort(hnsw_ef=1)):
        assert_same(index.recall(query_vector(), 50, effort=effort), oracle.recall(query_vector(), 50))


def test_recall_from_several_threads(index: Index, oracle: FlatIndex) -> None:
    vectors = [query_vector(seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda vector: index.recall(vector, 10).ids, vectors))
    assert found == [oracle.recall(vector, 10).ids for vector in vectors]


def test_upsert_replaces(index: Index) -> None:
    old = make_points()[3]
    new = replace(old, vector=query_vector(), payload={"text": "new"}, digest="new")
    index.upsert([new])
    assert index.count() == N
    assert index.get([old.id]) == {old.id: {"text": "new"}}
    assert index.digests([old.id]) == {old.id: "new"}
    assert index.recall(query_vector(), 1).ids == [old.id]


def test_upsert_of_one_id_twice_keeps_the_last(index: Index) -> None:
    point = make_points(1, seed=5)[0]
    index.upsert([replace(point, id="twice"), replace(point, id="twice", payload={"text": "last"})])
    assert index.get(["twice"]) == {"twice": {"text": "last"}}


def test_upsert_of_nothing(index: Index) -> None:
    index.upsert([])
    assert index.count() == N


def test_get_returns_what_was_given(index: Index) -> None:
    points = {point.id: point for point in make_points()}
    asked = ["doc 5", "doc 1", "nowhere", "doc 20"]
    found = index.get(asked)
    assert found == {id_: points[id_].payload for id_ in asked if id_ in points}
    assert found["doc 20"]["free"] is True, "a boolean comes back as one, though 1 would be equal"
    assert isinstance(found["doc 20"]["price"], float)
    assert index.get([]) == {}


def test_payloads_may_be_changed_by_the_caller(index: Index, oracle: FlatIndex) -> None:
    found = index.recall(query_vector(), 1)
    for payload in (found.payloads[0], index.get(found.ids)[found.ids[0]]):
        payload["tags"].append("changed")
        payload.pop("text")
    assert_same(index.recall(query_vector(), 1), oracle.recall(query_vector(), 1))


def test_points_may_be_changed_by_the_caller_once_stored(fresh: Index) -> None:
    (point,) = make_points(1)
    expected = deepcopy(point.payload)
    fresh.open_for(CONFIG)
    fresh.upsert([point])
    point.payload["tags"].append("changed")
    vector, features = point.vector.copy(), point.features.copy()
    point.vector[:], point.features[:] = 0, 0
    found = fresh.recall(vector, 1)
    assert found.payloads == [expected] and found.scores == pytest.approx(1)
    np.testing.assert_array_equal(found.features[0], features)


def test_recall_is_by_cosine_whatever_the_length_of_vectors(fresh: Index, oracle: FlatIndex) -> None:
    points = [replace(point, vector=point.vector * (1 + i % 7)) for i, point in enumerate(make_points())]
    fresh.open_for(CONFIG)
    fresh.upsert(points)
    assert_same(fresh.recall(3 * query_vector(), 50), oracle.recall(query_vector(), 50))


def test_digests(index: Index) -> None:
    assert index.digests(["doc 1", "nowhere", "doc 2"]) == {"doc 1": "0-1", "doc 2": "0-2"}
    assert index.digests([]) == {}


def test_delete(index: Index) -> None:
    best = index.recall(query_vector(), 2).ids
    index.delete([best[0], "nowhere"])
    index.delete([])
    assert index.count() == N - 1
    assert index.get(best[:1]) == {}
    assert index.recall(query_vector(), 1).ids == best[1:]


def test_a_single_id_in_place_of_a_list_is_refused(index: Index) -> None:
    index.upsert([replace(point, id=id_) for point, id_ in zip(make_points(2, seed=1), "12", strict=True)])
    for method in (index.delete, index.get, index.digests, index.prune):
        with pytest.raises(TypeError, match=r"expected a list of ids, found a single string: pass \[id\]"):
            method("12")
        with pytest.raises(TypeError, match="expected each id to be a string, found 12: pass '12'"):
            method(["1", 12])  # type: ignore[list-item]  # the wrong type is what is tested
        with pytest.raises(DataError, match=r"id '\\ud800' cannot be written as UTF-8"):
            method(["1", "\ud800"])
    assert index.count() == N + 2


def test_ids_may_come_one_by_one(index: Index) -> None:
    assert list(index.get(iter(["doc 1"]))) == list(index.digests(iter(["doc 1"]))) == ["doc 1"]
    index.delete(iter(["doc 1", "doc 2"]))
    assert index.prune(f"doc {i}" for i in range(10)) == N - 10
    assert index.count() == 8


def test_filters_mean_what_matches_says(index: Index, oracle: FlatIndex) -> None:
    for name, condition in FILTERS.items():
        assert index.count(condition) == sum(matches(payload_number(i), condition) for i in range(N)), name
        expected = oracle.recall(query_vector(), 20, filter=condition)
        assert_same(index.recall(query_vector(), 20, filter=condition), expected, name)


def test_empty_collection(fresh: Index) -> None:
    fresh.open_for(CONFIG)
    assert fresh.count() == 0
    assert fresh.get(["a"]) == {}
    assert fresh.digests(["a"]) == {}
    fresh.delete(["a"])
    found = fresh.recall(query_vector(), 10)
    assert (found.ids, found.payloads, found.scores.shape, len(found.features)) == ([], [], (0,), 0)


def test_what_was_never_made_says_how_to_make_it(fresh: Index) -> None:
    how = r"d2llm index MODEL CORPUS.jsonl --qdrant .* --collection|add documents first, with Index.add"
    calls: list[Callable[[], Any]] = [
        lambda: fresh.open_for(CONFIG, create=False),
        fresh.count,
        lambda: list(fresh.ids()),
        lambda: fresh.get([]),
        lambda: fresh.digests(["a"]),
        lambda: fresh.delete(["a"]),
        lambda: fresh.recall(query_vector(), 1),
        lambda: fresh.upsert(make_points(1)),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=how):
            call()


def test_foreign_fingerprint(index: Index) -> None:
    with pytest.raises(MismatchError, match="0123456789abcdef, this model is fedcba"):
        index.open_for(replace(CONFIG, fingerprint="fedcba"), create=False)


def test_other_dimensions(index: Index) -> None:
    with pytest.raises(MismatchError, match=f"of {E} numbers and features of {H} bytes, the model makes {E} and 99"):
        index.open_for(replace(CONFIG, feature_bytes=99))


def test_wrong_width(index: Index) -> None:
    with pytest.raises(MismatchError, match=f"vectors of {E} dimensions, the query"):
        index.recall(np.ones(E + 1, np.float32), 5)
    with pytest.raises(MismatchError, match=f"vectors of {E} dimensions, 'doc 0' has .{E + 1},"):
        index.upsert(make_points(1, width=E + 1))


@pytest.mark.parametrize("features", [np.ones(H + 1, np.uint8), np.ones(H, np.float32)], ids=["size", "type"])
def test_features_of_another_size_or_type(features: Any, index: Index) -> None:
    found = rf"'doc 0' has {features.dtype} \({len(features)},\)"
    with pytest.raises(MismatchError, match=f"the index holds features of {H} bytes, {found}"):
        index.upsert([replace(make_points(1)[0], features=features)])
    assert index.count() == N


def test_nan_is_refused(index: Index) -> None:
    nan = np.full(E, np.nan, np.float32)
    with pytest.raises(ValueError, match="query vector holds NaN"):
        index.recall(nan, 5)
    with pytest.raises(ValueError, match="vector of 'doc 0' holds NaN"):
        index.upsert([replace(make_points(1)[0], vector=nan)])
    assert index.count() == N


def test_payload_that_cannot_be_stored(index: Index) -> None:
    for value in (object(), float("nan"), "\ud800", 2**63, nested(30)):
        with pytest.raises(DataError, match="document 'doc 0': field 'text': "):
            index.upsert([replace(make_points(1)[0], payload={"text": value})])
    with pytest.raises(DataError, match="field 'id': it cannot be written as UTF-8"):
        index.upsert([replace(make_points(1)[0], id="\ud800")])
    assert index.count() == N


def nested(depth: int, *, lists: bool = False, end: Any = "x") -> Any:
    value = end
    for _ in range(depth):
        value = [value] if lists else {"k": value}
    return value


def exact(value: Any) -> str:
    """The same for equal values of the same types alone: 1, 1.0 and true differ, and 0.0 from -0.0."""
    return json.dumps(value, sort_keys=True)


AT_THE_LIMITS: dict[str, Any] = {
    "integers": [2**63 - 1, -(2**63), 2**53 + 1, 0],
    "floats": [1.0, -0.0, 1e308, 5e-324, 2.0**63, 1e16, 0.1 + 0.2, *np.random.default_rng(0).standard_normal(200)],
    "a float": 1 / 3 * 1e61,
    "others": [True, False, None, "", [], {}, [[]], {"": {"": None}}],
    "objects": nested(29),
    "lists": nested(29, lists=True),
    "objects around a boolean": nested(29, end=True),
    "texts": '\0 \uffff \N{SNOWMAN} \U0010ffff \r\n\t\x85\u2028"\\',
    "long": "\N{SNOWMAN}" * 100_000,
    "": 1,
    "\0": 1,
    " ": 1,
    'a.b[0]."c\\': 1,
    "k" * 10_000: {"k" * 10_000: 1},
}


def test_what_is_accepted_comes_back_equal(index: Index) -> None:
    point = replace(make_points(1)[0], id="\0 " + "\N{SNOWMAN}" * 10_000, payload=AT_THE_LIMITS)
    for _ in range(2):
        index.upsert([point])
        (found,) = index.get([point.id]).values()
        (recalled,) = index.recall(point.vector, 1, filter={" ": 1}).payloads
        assert exact(found) == exact(recalled) == exact(AT_THE_LIMITS)
        index.optimize()
        index.close()  # the next call opens it again


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def test_any_payload_comes_back_equal(index: Index) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=20))
    def check(payloads: list[dict[str, Any]]) -> None:
        points = [replace(make_points(1)[0], id=str(i), payload=payload) for i, payload in enumerate(payloads)]
        index.upsert(points)
        assert exact(index.get([point.id for point in points])) == exact({point.id: point.payload for point in points})

    check()


BAD_CONDITIONS: list[Any] = [
    None, 1.5, [], [None], [[1]], ["a", 2.5], {}, {"above": 1}, {"gte": "2020"}, {"gte": None}, {"gte": math.nan},
    {"exists": 1}, {"exists": True, "gte": 1}, {"lt": math.inf}, {"lt": 10**400}, 2**63, [-(2**63) - 1], "\ud800",
    json.loads("[" * 900 + "]" * 900),
]  # fmt: skip


def test_bad_filters(index: Index) -> None:
    for condition in BAD_CONDITIONS:
        for method in (index.count, lambda filter: index.recall(query_vector(), 5, filter=filter)):
            with pytest.raises(ArgumentError, match=r"filter on 'year': .* is neither"):
                method({"year": condition})
    for key in (7, "\ud800"):
        with pytest.raises(ArgumentError, match="expected the name of a field, as a string"):
            index.count({key: 1})  # type: ignore[dict-item]  # the wrong type is what is tested


def test_fields_that_qdrant_cannot_address(index: Index, not_flat: None) -> None:
    assert isinstance(index, QdrantIndex)
    for key in ('a"b', "a\\b"):
        with pytest.raises(ArgumentError, match=r'cannot filter on a field with a " or a \\ in its name'):
            index.count({key: 1})
        with pytest.raises(ArgumentError, match="nor index it"):
            index.index_payload({key: "integer"})


def test_numbers_of_passages(index: Index, oracle: FlatIndex) -> None:
    assert_same(index.recall(query_vector(), 10**30), oracle.recall(query_vector(), N))
    for limit in (0, -1):
        with pytest.raises(ArgumentError, match=f"at least 1 passage, found {limit}"):
            index.recall(query_vector(), limit)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-a", "a b", "a\n", "\u00e9", "a" * 201])
def test_bad_names(name: str) -> None:
    with pytest.raises(ArgumentError, match="collection name"):
        QdrantIndex(name, "folder")


def test_the_longest_name_can_be_used_everywhere(embedded: Callable[[], QdrantIndex], tmp_path: Path) -> None:
    with QdrantIndex("a" * 200, tmp_path / "qdrant") as index:
        index.open_for(CONFIG)
        index.upsert(make_points(3))
        qdrant = Qdrant(tmp_path / "qdrant")
        qdrant.point_alias("b" * 200, index)
        index.snapshot(tmp_path / "snapshot")
        index.drop()
        qdrant.restore("a" * 200, tmp_path / "snapshot")
        assert index.count() == 3


BAD_LOCATIONS = {
    "": "expected a folder",
    "grpc://localhost": "expected a folder, or an address",
    "HTTP://localhost": "expected a folder, or an address",
    "http:/localhost:6333": "expected a folder, or an address",
    ":memory:": "An index in memory is d2llm.FlatIndex",
    "localhost:6333": "a server is http://localhost:6333",
    "[::1]:6333": r"a server is http://\[::1\]:6333",
    "a\0b": "expected a folder",
    "\udcff": "expected a folder",
    __file__: "test_index.py is a file",
    f"{__file__}/folder": "test_index.py is a file",
    "http://": "no host",
    "https://:6333": "no host",
    "http://local host:6333": "a space",
    "http://localhost:6333 ": "a space",
    "http://localhost\n": "a space or a control character",
    "http://localhost:99999": "its port is no number from 1 to 65535",
    "http://localhost:port": "its port is no number",
    "http://localhost:0": "its port is no number",
    "http://localhost:-1": "its port is no number",
    "http://[::1": "no host",
    "http://[::1]:port": "its port is no number",
    "http://user:secret@:6333": "no host",
}


@pytest.mark.parametrize(("location", "reason"), BAD_LOCATIONS.items())
def test_bad_locations(location: str, reason: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^location .*{reason}"):
        QdrantIndex("docs", location)


@pytest.mark.parametrize("location", ["http://[::1]:6333", "https://user:secret@host.example:443/qdrant", "http://h",
                                      "a b", "./localhost:6333", "C:\\qdrant"])  # fmt: skip
def test_good_locations(location: str) -> None:
    QdrantIndex("docs", location)


BAD_OPTIONS: list[tuple[str, Any, str]] = [
    ("hnsw_ef", 0, "hnsw_ef must be at least 1, found 0"),
    *(("grpc_port", port, f"grpc_port must be from 1 to 65535, .*found {port}") for port in (0, -1, 65536)),
    *(("timeout", value, "timeout must be above 0 and at most 86400 seconds") for value in (0, -1, math.nan, math.inf)),
    *(("patience", value, "patience must be a number of seconds from 0 on") for value in (-1, math.nan)),
    *(("api_key", key, "which no header can hold") for key in ("key\n", "schl\u00fcssel")),
    *(("read_consistency", value, "choose a number from 1 on, majority") for value in (0, "most")),
    ("write_ordering", "firm", "choose weak, medium or strong"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_OPTIONS)
def test_bad_options(name: str, value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as refused:
        QdrantIndex("docs", "http://localhost:6333", **{name: value})
    assert name != "api_key" or value not in str(refused.value)


# ---- embedded ----


def test_reopening_keeps_everything(embedded: Callable[[], QdrantIndex], oracle: FlatIndex) -> None:
    with embedded() as first:
        first.open_for(CONFIG)
        first.upsert(make_points())
    with embedded() as second:
        second.open_for(CONFIG, create=False)
        assert_same(second.recall(query_vector(), 50), oracle.recall(query_vector(), 50))
    assert second.count() == N, "a closed index opens again when it is used"
    second.close()


def test_optimize_keeps_answers(
    embedded: Callable[[], QdrantIndex], oracle: FlatIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2llm.connectors.edge.INDEXING_THRESHOLD_KB", 10)  # so that this little is indexed at all
    with embedded() as index:
        index.open_for(CONFIG)
        index.upsert(make_points())
        shard = index._engine._shard
        assert shard.info().indexed_vectors_count == 0
        index.optimize()
        assert index._engine._shard.info().indexed_vectors_count >= N
        assert index.count() == N
        for condition in ({}, {"lang": "en"}, {"free": True}):
            found = index.recall(query_vector(), 20, filter=condition)
            assert_same(found, oracle.recall(query_vector(), 20, filter=condition))
        index.upsert(make_points(5, seed=1))
        assert index.count() == N, "it still takes points"


BAD_ENDS = {
    "fails": ("raise SystemExit('no room')", StoreError, r"optimizing .* failed \(no room\)"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", StoreError, r"optimizing .* failed \(exit status -9\)"),
    "is interrupted": ("os.kill(os.getppid(), signal.SIGINT); time.sleep(60)", KeyboardInterrupt, "^$"),
}


@pytest.mark.parametrize(("end", "error", "message"), BAD_ENDS.values(), ids=BAD_ENDS)
def test_optimize_that_ends_badly_loses_nothing(
    end: str,
    error: type[BaseException],
    message: str,
    embedded: Callable[[], QdrantIndex],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = "import os, signal, sys, time, qdrant_edge; shard = qdrant_edge.EdgeShard.load(sys.argv[1]); "
    monkeypatch.setattr("d2llm.connectors.edge._OPTIMIZE", opened + end)
    monkeypatch.setattr("d2llm.connectors.edge.INDEXING_THRESHOLD_KB", 10)  # so that this little is indexed at all
    with embedded() as index:
        index.open_for(CONFIG)
        index.upsert(make_points())
        with pytest.raises(error, match=message):
            index.optimize()
        assert index.count() == N
        index.upsert(make_points(5, seed=1))


HEADER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_index import CONFIG, QdrantIndex, make_points
index = QdrantIndex("docs", sys.argv[1])
"""


def run_python(code: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HEADER + code, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def files(folder: Path) -> dict[str, bytes]:
    """What the small ones hold; of those that the engine maps, their length."""
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(path): path.read_bytes() if size < 2**20 else b"%d" % size for path, size in sizes.items()}


def test_second_process_is_refused_and_touches_nothing(embedded: Callable[[], QdrantIndex], tmp_path: Path) -> None:
    with embedded() as index:
        index.open_for(CONFIG)
        index.upsert(make_points())
        before = files(tmp_path)
        _, said = run_python("index.open_for(CONFIG)", tmp_path / "qdrant").communicate(timeout=60)
        assert "Locked: " in said and "in use by another process" in said
        assert files(tmp_path) == before
        index.upsert(make_points(N + 1))
    assert embedded().count() == N + 1


SECOND: dict[str, Callable[[QdrantIndex, Path], object]] = {
    "count": lambda index, folder: index.count(),
    "add": lambda index, folder: index.open_for(CONFIG),
    "optimize": lambda index, folder: index.optimize(),
    "alias": lambda index, folder: Qdrant(folder / "qdrant").point_alias("live", index),
    "snapshot": lambda index, folder: index.snapshot(folder / "docs.snapshot"),
    "restore": lambda index, folder: Qdrant(folder / "qdrant").restore("docs", folder / "any.snapshot"),
    "copy from": lambda index, folder: index.copy_to(QdrantIndex("copy", folder / "qdrant")),
    "drop": lambda index, folder: index.drop(),
}


@pytest.mark.parametrize("verb", SECOND)
def test_second_index_is_refused_and_touches_nothing(
    verb: str, embedded: Callable[[], QdrantIndex], tmp_path: Path
) -> None:
    with embedded() as index, embedded() as second:
        index.open_for(CONFIG)
        index.upsert(make_points(10))
        before = files(tmp_path)
        with pytest.raises(StoreError, match="docs is in use by another process, or by another index in this one"):
            SECOND[verb](second, tmp_path)
        assert files(tmp_path) == before
        index.upsert(make_points(20))
        assert index.count() == 20
    assert embedded().count() == 20


def test_nothing_is_made_under_a_name_that_another_process_is_using(
    embedded: Callable[[], QdrantIndex], tmp_path: Path
) -> None:
    """It may be making a collection of that name, or pointing an alias, and not be done yet."""
    folder = tmp_path / "qdrant"
    with embedded() as index:
        index.open_for(CONFIG)
        qdrant = Qdrant(folder)
        qdrant.point_alias("live", index)
        index.snapshot(tmp_path / "docs.snapshot")
        names = qdrant.collections()
        locks = [FileLock(folder / ".other.lock"), FileLock(folder / ".live.lock")]
        other = QdrantIndex("other", folder)
        refused: list[Callable[[], object]] = [
            lambda: other.open_for(CONFIG),
            lambda: qdrant.restore("other", tmp_path / "docs.snapshot"),
            lambda: index.copy_to(other),
            lambda: qdrant.point_alias("other", index),
            lambda: qdrant.point_alias("live", index),
            index.drop,
        ]
        for verb in refused:
            with pytest.raises(StoreError, match=r"qdrant/(other|live) is in use by another process"):
                verb()
        assert qdrant.collections() == names
        for lock in locks:
            lock.release(remove=True)
        other.open_for(CONFIG)
        other.drop()
        index.drop()
        assert list(folder.iterdir()) == []


def test_what_appears_under_a_name_is_not_replaced(embedded: Callable[[], QdrantIndex], tmp_path: Path) -> None:
    """Another process makes the collection after this one has seen that there is none."""
    with embedded() as index:
        index.open_for(CONFIG)
        index.snapshot(tmp_path / "docs.snapshot")
    for verb in ("create", "restore"):
        late = embedded()
        assert late._engine.open() is not None
        late._engine.close()
        with pytest.raises(StoreError, match="docs exists already: another process has just made it"):
            late._engine.create(Metadata.of(CONFIG, CollectionOptions())) if verb == "create" else (
                late._engine.restore(tmp_path / "docs.snapshot")
            )
        assert embedded().count() == 0


def test_collection_is_free_when_the_children_of_its_process_have_ended(
    embedded: Callable[[], QdrantIndex], tmp_path: Path
) -> None:
    """A child holds what its parent had open when it was forked, the engine's own lock too."""
    index = embedded()
    index.open_for(CONFIG)
    index.upsert(make_points(10))
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(write)
        index.close()
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    index.upsert(make_points(20))
    index.close()
    before = files(tmp_path)
    with pytest.raises(StoreError, match="in use by another process"):
        embedded().count()
    assert files(tmp_path) == before
    os.close(write)
    os.waitpid(child, 0)
    assert embedded().count() == 20


def test_lock_holds_when_its_file_is_removed_by_whoever_had_it(tmp_path: Path) -> None:
    inside, taken = [0], [0]

    def take() -> None:
        for _ in range(200):
            try:
                lock = FileLock(tmp_path / "lock")
            except Locked:
                continue
            inside[0] += 1
            assert inside == [1]
            taken[0] += 1
            inside[0] -= 1
            lock.release(remove=True)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(take) for _ in range(4)]:
            done.result()
    assert taken[0] > 0 and list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_locked(embedded: Callable[[], QdrantIndex], tmp_path: Path) -> None:
    with embedded() as index:
        index.open_for(CONFIG)
    (tmp_path / "qdrant" / ".docs.lock").unlink()  # as a collection of an earlier version
    (tmp_path / "qdrant" / ".docs.lock").mkdir()
    with pytest.raises(
        StoreError, match=r"\.docs\.lock cannot be locked \(Is a directory\): an embedded collection must"
    ):
        embedded().count()
    (tmp_path / "qdrant" / ".docs.lock").rmdir()
    assert embedded().count() == 0


def test_index_that_cannot_be_closed_gives_the_collection_back(
    embedded: Callable[[], QdrantIndex], tmp_path: Path
) -> None:
    index = embedded()
    index.open_for(CONFIG)
    index.upsert(make_points())
    for file in tmp_path.rglob("tracker_journal.dat"):
        file.unlink()
    with pytest.raises(StoreError, match="shorter than expected"):
        index.delete(["doc 1"])
    with pytest.raises(StoreError, match="shorter than expected"):
        index.close()
    assert embedded().count() == N - 1, "what was written is in the log"


def test_kill_loses_nothing_that_was_acknowledged(embedded: Callable[[], QdrantIndex], tmp_path: Path) -> None:
    code = """
index.open_for(CONFIG)
points = make_points(20_000)
for start in range(0, len(points), 50):
    index.upsert(points[start : start + 50])
    print(start + 50, flush=True)
"""
    process = run_python(code, tmp_path / "qdrant")
    assert process.stdout is not None
    for _ in range(12):
        process.stdout.readline()
    time.sleep(0.02)  # in the middle of a batch, most likely
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate()
    said = [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    acknowledged = int(said[-1]) if said else 600
    assert 600 <= acknowledged < 20_000
    with embedded() as index:
        ids = [f"doc {i}" for i in range(acknowledged)]
        assert index.digests(ids) == {id_: f"0-{i}" for i, id_ in enumerate(ids)}
        index.upsert(make_points(10))


def test_fork_is_refused(embedded: Callable[[], QdrantIndex]) -> None:
    with embedded() as index:
        index.open_for(CONFIG)
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                index.count()
            except StoreError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as said:
            assert "before this process was forked" in said.read()
        assert index.count() == 0


def test_folder_made_by_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "qdrant" / "docs"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(MismatchError, match="made by something else"):
        QdrantIndex("docs", tmp_path / "qdrant").open_for(CONFIG)
    assert [path.name for path in tmp_path.rglob("*")] == ["qdrant", "docs", "notes.txt"]


def test_metadata_of_another_format(embedded: Callable[[], QdrantIndex], tmp_path: Path) -> None:
    with embedded() as index:
        index.open_for(CONFIG)
    file = tmp_path / "qdrant" / "docs" / "collection.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(MismatchError, match="has format 99"):
        embedded().open_for(CONFIG)
    file.write_text("{")
    with pytest.raises(StoreError, match=r"collection.json is damaged"):
        embedded().open_for(CONFIG)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    index = QdrantIndex("docs", tmp_path / "file")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/docs"):
        index.open_for(CONFIG)


def test_a_full_disk_is_noticed_before_anything_is_written(
    embedded: Callable[[], QdrantIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2llm.connectors.edge.INDEXING_THRESHOLD_KB", 10)  # so that this little is indexed at all
    with embedded() as index:
        index.open_for(CONFIG)
        index.upsert(make_points())
        monkeypatch.setattr("d2llm.connectors.edge.ROOM", 2**60)  # no disk has as much
        for write in (lambda: index.upsert(make_points(5, seed=1)), index.optimize):
            with pytest.raises(
                StoreError, match=r"the disk of .*docs has [\d,]+ MiB left, and this needs up to [\d,]+"
            ):
                write()
        assert index.count() == N and index.digests(["doc 1"]) == {"doc 1": "0-1"}
        assert not index.info().indexed


def test_a_full_disk_is_noticed_before_a_collection_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2llm.connectors.edge.ROOM", 2**60)
    index = QdrantIndex("docs", tmp_path / "folder")
    with pytest.raises(StoreError, match=r"the disk of .*docs has [\d,]+ MiB left, and this needs up to [\d,]+"):
        index.open_for(CONFIG)
    assert list((tmp_path / "folder").iterdir()) == []


def test_native_filter_is_for_servers(embedded: Callable[[], QdrantIndex], oracle: FlatIndex) -> None:
    native: Any = qdrant_client.models.Filter()
    with embedded() as index:
        index.open_for(CONFIG)
        with pytest.raises(ArgumentError, match="expected a mapping"):
            index.count(native)
    with pytest.raises(ArgumentError, match="expected a mapping"):
        oracle.recall(query_vector(), 1, filter=native)


# ---- server ----


def test_native_filter(server: QdrantServer, oracle: FlatIndex) -> None:
    with QdrantIndex("docs", server.url, grpc_port=server.grpc_port) as index:
        index.open_for(CONFIG)
        index.upsert(make_points())
        models = qdrant_client.models
        native = models.Filter(must_not=[models.FieldCondition(key="lang", match=models.MatchValue(value="en"))])
        assert index.count(native) == oracle.count({"lang": ["fr", "de"]})
        expected = oracle.recall(query_vector(), 10, filter={"lang": ["fr", "de"]})
        assert_same(index.recall(query_vector(), 10, filter=native), expected)


def test_effort_reaches_the_server(server: QdrantServer) -> None:
    with QdrantIndex("docs", server.url, hnsw_ef=7, grpc_port=server.grpc_port) as index:
        index.open_for(CONFIG)
        for effort in (None, Effort(), Effort(exact=True)):
            index.recall(query_vector(), 50, effort=effort)
        index.recall(query_vector(), 50, filter={"lang": "en"})
    batches = [request.body.searches for request in server.requests if request.operation == "query_batch_points"]
    sent = [search.params for batch in batches for search in batch]
    own, default, exact, filtered = sent
    assert (own.hnsw_ef, default.hnsw_ef) == (7, 200), "the index's own, unless a call says otherwise"
    for params in (own, default):
        assert params.quantization.rescore and not params.exact
    assert exact.exact and exact.hnsw_ef is None
    assert own.acorn is None and filtered.acorn.enable, "a graph that knows nothing of the field loses most of its way"


def test_checks_of_a_mapping_let_a_native_filter_pass() -> None:
    check_filter(qdrant_client.models.Filter())  # type: ignore[arg-type]  # a filter of the engine, which the check lets pass


def test_collection_made_by_something_else(server: QdrantServer) -> None:
    qdrant_client.QdrantClient(server.url, check_compatibility=False).create_collection("docs", vectors_config={})
    with pytest.raises(MismatchError, match=r"'docs' at http://127.0.0.1:\d+ was made by something else"):
        QdrantIndex("docs", server.url, grpc_port=server.grpc_port).open_for(CONFIG)


@pytest.mark.parametrize("grpc_port", [1, None], ids=["grpc", "rest"])
def test_unreachable_server(grpc_port: int | None) -> None:
    start = time.perf_counter()
    with pytest.raises(StoreError, match=r"cannot reach Qdrant at http://127.0.0.1:1.*\(tried \d times in \d\.\d s\)"):
        QdrantIndex("docs", "http://127.0.0.1:1", grpc_port=grpc_port, patience=100).open_for(CONFIG)
    assert time.perf_counter() - start < 10


# ---- imports ----


def test_import_takes_no_engine() -> None:
    code = (
        "import sys, d2llm.connectors; print([m for m in ('qdrant_client', 'qdrant_edge', 'grpc') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
