"""Collections as teams run them, embedded and on servers: how they are stored, described, named, saved and copied."""

import asyncio
import errno
import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

import httpx
from qdrant_client import models
from qdrant_places import (
    CONFIG,
    FILTERS,
    PLACES,
    E,
    H,
    Place,
    assert_same,
    make_points,
    payload_number,
    place_of,
    query_vector,
)
from qdrant_server import QdrantServer

import d2llm
from d2llm.cli import main
from d2llm.connectors import Bm25Options, CollectionOptions, Effort, Qdrant, QdrantIndex, edge
from d2llm.connectors.location import shown
from d2llm.connectors.points import stored_points
from d2llm.connectors.schema import Metadata
from d2llm.errors import ArgumentError, DataError, MismatchError, StoreError
from d2llm.filters import matches
from d2llm.flat import FlatIndex
from d2llm.types import RESERVED, Document

N = 120
ON_SERVERS = [kind for kind in PLACES if kind != "embedded"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path_factory.mktemp("server"), version="1.20.0") as server:
        yield server


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, server: QdrantServer) -> Iterator[Place]:
    with place_of(request.param, tmp_path, server) as place:
        yield place


@pytest.fixture(params=ON_SERVERS)
def on_server(request: pytest.FixtureRequest, tmp_path: Path, server: QdrantServer) -> Iterator[Place]:
    with place_of(request.param, tmp_path, server) as place:
        yield place


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Place]:
    with place_of("embedded", tmp_path) as place:
        yield place


@pytest.fixture
def low_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded collections made now are indexed from 5 KB of vectors."""
    monkeypatch.setattr("d2llm.connectors.edge.INDEXING_THRESHOLD_KB", 5)


@pytest.fixture(scope="module")
def oracle() -> FlatIndex:
    flat = FlatIndex()
    flat.open_for(CONFIG)
    flat.upsert(make_points(N))
    return flat


def filled(place: Place, name: str = "docs", n: int = N, **more: Any) -> QdrantIndex:
    index = place(name, **more)
    index.open_for(CONFIG)
    index.upsert(make_points(n))
    return index


# ---- how a collection is stored ----

STORED: dict[str, tuple[dict[str, Any], float, float]] = {
    "int8": ({}, 1.0, 1.0),
    "none": ({"quantization": "none"}, 1.0, 1.0),
    "float16": ({"datatype": "float16"}, 1.0, 1.0),
    "turbo4": ({"quantization": "turbo4"}, 0.99, 0.99),
    # Vectors of 2 bits and 1 bit a number are searched from the first point on, not only in the graph. With numpy, the
    # four best levels for a Gaussian find 96 % of the true 20 among the best 40 of these points, the signs find 77 %.
    "turbo2": ({"quantization": "turbo2"}, 0.9, 0.9),
    "binary": ({"quantization": "binary"}, 0.65, 0.65),
    "no graph": ({"hnsw_m": 0}, 1.0, 1.0),
}


@pytest.mark.parametrize(("options", "before", "after"), STORED.values(), ids=STORED)
def test_every_storage_answers_as_the_flat_index(
    options: dict[str, Any], before: float, after: float, place: Place, low_threshold: None, oracle: FlatIndex
) -> None:
    index = filled(place, options=options)
    assert index.info().metadata.options == CollectionOptions(**options)
    assert recall_of(index, oracle) >= before
    let_it_index(place, index)
    assert index.info().indexed == N
    index.close()
    index = place()
    assert index.info().metadata.options == CollectionOptions(**options)
    assert recall_of(index, oracle) >= after
    assert recall_of(index, oracle, effort=Effort(exact=True)) == 1


def recall_of(index: QdrantIndex, oracle: FlatIndex, **more: Any) -> float:
    """The part of the 20 nearest that 5 queries find. Scores are true cosines, whatever was compared."""
    found = 0
    for seed in range(5):
        vector = query_vector(100 + seed)
        truth = oracle.recall(vector, N)
        cosines = dict(zip(truth.ids, truth.scores, strict=True))
        candidates = index.recall(vector, 20, **more)
        np.testing.assert_allclose(candidates.scores, [cosines[id_] for id_ in candidates.ids], atol=1e-3)  # float16
        found += len(set(candidates.ids) & set(truth.ids[:20]))
    return found / 100


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"quantization": "pq"}, "unknown quantization 'pq': choose one of int8, turbo4, turbo2, binary, none"),
        ({"datatype": "uint8"}, "unknown datatype 'uint8': choose one of float32, float16"),
        ({"hnsw_m": -1}, "hnsw_m must be from 0 to 2147483647, found -1"),
        ({"hnsw_m": 2**31}, "hnsw_m must be from 0 to 2147483647, found 2147483648"),
        ({"hnsw_ef_construct": 0}, "hnsw_ef_construct must be from 1 to 2147483647, found 0"),
        ({"shards": 0}, "shards must be from 1 to 2147483647, found 0"),
        ({"replicas": 0}, "replicas must be from 1 to 2147483647, found 0"),
        ({"write_consistency": 0}, "write_consistency must be from 1 to 2147483647, found 0"),
        ({"bm25": True}, "bm25 must be a mapping such as .*, or None; found True"),
        ({"quantisation": "int8"}, "unknown option 'quantisation' of CollectionOptions: choose from quantization, dat"),
        (
            {"bm25": {"lang": "german"}},
            "unknown option 'lang' of Bm25Options: choose from language, k, b, average_words",
        ),
    ],
    ids=str,
)
def test_wrong_options(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        QdrantIndex("docs", tmp_path, options=wrong)


def test_options_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"options CollectionOptions\(.*\): expected a mapping, such as"):
        QdrantIndex("docs", tmp_path, options=CollectionOptions())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"language": "klingon"}, "klingon"),
        ({"k": -1.0}, "must be finite and >= 0"),
        ({"b": 2.0}, r"must be finite and in \[0.0, 1.0\]"),
        ({"average_words": 0.0}, "must be finite and > 0"),
    ],
    ids=str,
)
def test_wrong_words_are_refused_before_anything_is_made(wrong: dict[str, Any], message: str, place: Place) -> None:
    with pytest.raises(ValueError, match=message):
        place(options={"bm25": wrong}).open_for(CONFIG)
    assert place.names() == ([], {})


def test_options_hold_from_the_making_on(place: Place) -> None:
    made = CollectionOptions(quantization="none", bm25=Bm25Options(language="german", average_words=7.0))
    place(options=asdict(made)).open_for(CONFIG)
    with pytest.raises(
        MismatchError,
        match=r"docs' at .* exists already, with hnsw_m 16, not 8; bm25 german, not none\. .*: "
        r"leave these options out, or index .*--alias",
    ):
        place.again(options={"hnsw_m": 8, "bm25": None}).open_for(CONFIG)
    for bm25, difference in (({"language": "french"}, "french"), ({"k": 2.0}, r"german \(k=2\.0\)")):
        with pytest.raises(MismatchError, match=rf"with bm25 german, not {difference}\."):
            place.again(options={"bm25": bm25}).open_for(CONFIG)
    same: list[dict[str, Any]] = [
        {}, {"quantization": "none"}, {"bm25": {}}, {"bm25": {"average_words": 99.0}}, asdict(made),
    ]  # fmt: skip
    for options in same:
        index = place.again(options=options)
        index.open_for(CONFIG)
        assert index.info().metadata.options == made
        words = index.info().metadata.options.bm25
        assert words is not None and words.average_words == 7.0, "what was measured then is kept"


def test_collection_made_before_there_were_options(place: Place) -> None:
    filled(place, n=10).close()
    metadata = rewritten_metadata(place, lambda content: content.pop("options"))
    assert "options" not in metadata
    index = place()
    assert index.info().metadata.options == CollectionOptions()
    assert index.count() == 10
    place.again(options=asdict(CollectionOptions())).open_for(CONFIG)


def test_options_of_a_later_version_are_left_out(place: Place) -> None:
    filled(place, n=10).close()
    rewritten_metadata(place, lambda content: content["options"].update(invented_later=7))
    index = place(options=asdict(CollectionOptions()))
    index.open_for(CONFIG)
    assert index.count() == 10


def of_first_format(content: dict[str, Any]) -> None:
    """As a collection of float16 features remembers itself."""
    content.update(format=1, feature_dim=content.pop("feature_bytes") // 2)
    content["created"]["d2llm"] = "0.1.0"


def test_a_collection_of_the_first_format_is_refused_for_searching_and_can_be_managed(
    place: Place, tmp_path: Path
) -> None:
    filled(place, n=10).close()
    rewritten_metadata(place, of_first_format)
    index = place()
    refused = "was made by d2llm 0.1.0 and has features of format 1, this d2llm makes format 2: index the corpus again"
    for create in (False, True):
        with pytest.raises(MismatchError, match=f"docs.* {refused} into another collection"):
            index.open_for(CONFIG, create=create)
    assert "docs" in place.names()[0]
    info = index.info()
    assert (info.passages, info.metadata.format, info.metadata.feature_bytes) == (10, 1, H)
    assert index.get(["doc 3"])["doc 3"]["text"] == make_points(4)[3].payload["text"]
    copied = place("copied")
    assert index.copy_to(copied) == 10
    assert copied.info().metadata.format == 1, "a copy is no conversion"
    with pytest.raises(MismatchError, match=r"copied.* has features of format 1"):
        copied.open_for(CONFIG)
    filled(place, "other", n=1)
    with pytest.raises(MismatchError, match=r"other.*format 2\).*format 1\)"):
        index.copy_to(place("other") if not place.embedded else place.again("other"))
    index.close()
    place.again().drop()
    assert "docs" not in place.names()[0]


def test_commands_show_and_drop_a_collection_of_the_first_format(place: Place) -> None:
    filled(place, n=5).close()
    rewritten_metadata(place, of_first_format)
    name, at = place.name("docs"), ["--qdrant", place.location]
    if not place.embedded:
        at += ["--grpc-port", str(place.options.get("grpc_port") or 0)]
    assert name in CliRunner().invoke(main, ["collection", "info", *at]).output.split()
    info = CliRunner().invoke(main, ["collection", "info", name, *at])
    for line in (r"passages +5\n", rf"features +{H} bytes a passage\n", r"made .* by d2llm 0\.1\.0\n"):
        assert re.search(line, info.output), info.output
    dropped = CliRunner().invoke(main, ["collection", "drop", name, "--yes", *at])
    assert dropped.exit_code == 0, dropped.output
    assert place.names() == ([], {})


def test_an_alias_goes_from_a_collection_of_the_first_format_to_a_new_one(place: Place) -> None:
    live(place)
    rewritten_metadata(place, of_first_format, "kb-1")
    if not place.embedded:
        with pytest.raises(MismatchError, match=r"features of format 1.* Let the new model search under another alias"):
            generation(place, 20)
        return
    second = generation(place, 20)
    assert (second.name, second.info().metadata.format) == (place.name("kb-2"), 2)
    assert place.qdrant.switch_over(second, place.name("kb"), 20) == place.name("kb-1")
    assert place.again("kb").count() == 20


def rewritten_metadata(place: Place, change: Callable[[dict[str, Any]], Any], name: str = "docs") -> dict[str, Any]:
    if place.embedded:
        file = Path(place.location) / name / "collection.json"
        content: dict[str, Any] = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return content
    client = place.client
    content = (client.get_collection(place.name(name)).config.metadata or {})[RESERVED]
    change(content)
    client.update_collection(place.name(name), metadata={RESERVED: content})
    return content


# ---- what it tells of itself ----


def test_info(place: Place) -> None:
    made = CollectionOptions(quantization="turbo4", bm25=Bm25Options(average_words=3.0))
    index = filled(place, options=asdict(made))
    index.index_payload({"lang": "keyword", "year": "integer", "price": "float", "site.name": "keyword"})
    for alias in ("live", "also"):
        place.qdrant.point_alias(place.name(alias), index)
    for name in ("docs", "live"):
        info = place.again(name).info()
        assert (info.name, info.location) == (place.name("docs"), place.location), "by its own name"
        assert info.aliases == [place.name("also"), place.name("live")]
        assert (info.passages, info.indexed, info.status) == (N, 0, "ready")
        indexes = {"lang": "keyword", "year": "integer", "price": "float", "site.name": "keyword"}
        assert info.payload_indexes == indexes, "without those that are ours"
        assert (info.metadata.fingerprint, info.metadata.options) == (CONFIG.fingerprint, made)
        assert (info.metadata.embedding_dim, info.metadata.feature_bytes) == (E, H)
        assert info.metadata.created.keys() == {"d2llm", "at"}
        assert (info.bytes or 0) > N * E * 4 if place.embedded else info.bytes is None


def test_info_of_nothing(place: Place) -> None:
    with pytest.raises(StoreError, match=r"no collection '.*docs' at .* Make it with: d2llm index"):
        place().info()
    assert place.names() == ([], {})
    if place.embedded:
        assert not Path(place.location).exists(), "looking makes nothing"


def test_collections_of_the_place(place: Place) -> None:
    place.qdrant.point_alias(place.name("live"), filled(place, "b", n=1))
    filled(place, "a", n=1)
    assert place.names() == (["a", "b"], {"live": "b"}), "also of one that is open elsewhere"


def test_a_collection_that_is_not_there_is_answered_with_those_that_are(place: Place) -> None:
    place.qdrant.point_alias(place.name("live"), filled(place, "b", n=1))
    filled(place, "a", n=1)
    with pytest.raises(
        StoreError, match=r"no collection '.*docs' at .* There are: (.*, )?\S*a, \S*b, (.*, )?\S*live\b"
    ):
        place().count()


def test_what_was_being_written_is_no_collection(folder: Place) -> None:
    filled(folder, n=1)
    for name in (".docs-k1ll3d", "folder.alias", "notes"):
        (Path(folder.location) / name).mkdir()
    (Path(folder.location) / ".docs-k1ll3d" / "collection.json").write_text("{}")
    assert folder.names() == (["docs"], {})


def test_passages_in_graphs_are_told_apart_from_words(place: Place, low_threshold: None) -> None:
    """The engines count sparse vectors as indexed at once."""
    index = filled(place, options={"bm25": {}})
    assert index.info().indexed == 0
    let_it_index(place, index)
    assert index.info().indexed == N


def let_it_index(place: Place, index: QdrantIndex) -> None:
    """So that this little is indexed at all."""
    if not place.embedded:
        optimizers = models.OptimizersConfigDiff(indexing_threshold=1)
        place.client.update_collection(place.name("docs"), optimizers_config=optimizers)
    index.optimize()


# ---- payload indexes ----

FIELDS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "lang": ("keyword", [{"lang": "en"}, {"lang": ["en", "de"]}]),
    "year": ("integer", [{"year": 2003}, {"year": [2003, 2004]}, {"year": {"gte": 2020}}]),
    "price": ("float", [{"price": {"gt": 10, "lte": 20.5}}, {"price": {"lt": 3}}]),
    "free": ("bool", [{"free": True}, {"free": False}, {"free": [True, False]}]),
    "site.name": ("keyword", [{"site.name": "s1"}]),
    ".nested.lang": ("keyword", [{".nested.lang": "en"}]),
    ".nested.free": ("bool", [{".nested.free": True}]),
    ".nested.a b": ("integer", [{".nested.a b": {"lt": 10}}]),
}


def test_filters_mean_the_same_with_indexes(place: Place, oracle: FlatIndex) -> None:
    index = place()
    index.open_for(CONFIG)
    index.upsert(make_points(N)[: N // 2])
    index.index_payload({key: kind for key, (kind, _) in FIELDS.items()})
    index.index_payload({"tags": "keyword", "mixed": "integer", "rare": "integer", "nowhere": "keyword"})
    index.upsert(make_points(N)[N // 2 :])
    for name, condition in FILTERS.items():
        assert index.count(condition) == sum(matches(payload_number(i), condition) for i in range(N)), name
        expected = oracle.recall(query_vector(), 20, filter=condition)
        assert_same(index.recall(query_vector(), 20, filter=condition), expected, name)


def test_a_field_is_indexed_once_and_may_change_its_type(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    index = filled(place, n=100)
    for kind in ("integer", "integer", "float"):
        assert caplog.messages == []
        index.index_payload({"year": kind})
        assert index.info().payload_indexes == {"year": kind}
        assert index.count({"year": {"gte": 2020}}) == 30
    assert (
        "docs' at " in caplog.messages[0] and "year, indexed as integer, is now indexed as float" in caplog.messages[0]
    )


def test_wrong_payload_indexes(place: Place) -> None:
    index = filled(place, n=1)
    with pytest.raises(ValueError, match="on 'lang': unknown type 'text': choose one of keyword, integer, float, bool"):
        index.index_payload({"lang": "text"})
    with pytest.raises(ValueError, match="nor index it: store its values under another name"):
        index.index_payload({'a"b': "keyword"})
    assert index.info().payload_indexes == {}


def test_strict_mode_wants_an_index_for_each_filter(on_server: Place, oracle: FlatIndex) -> None:
    index = filled(on_server)
    strict = models.StrictModeConfig(enabled=True, unindexed_filtering_retrieve=False, unindexed_filtering_update=False)
    on_server.client.update_collection(on_server.name("docs"), strict_mode_config=strict)
    for key, (kind, conditions) in FIELDS.items():
        for condition in conditions:
            refused = rf"strict mode allows no filter on '{key}'.*d2llm collection index-payload \S*docs FIELD=TYPE"
            with pytest.raises(StoreError, match=refused):
                index.recall(query_vector(), 20, filter=condition)
            for call in (index.count, index.delete_where):
                with pytest.raises(StoreError, match=refused):
                    call(condition)
        index.index_payload({key: kind})
        for condition in conditions:
            expected = oracle.recall(query_vector(), 20, filter=condition)
            assert_same(index.recall(query_vector(), 20, filter=condition), expected, str(condition))
            assert index.count(condition) == oracle.count(condition)
    assert index.count() == N
    assert index.delete_where({"free": True}) == N // 2


# ---- aliases ----


def test_an_alias_moves(place: Place) -> None:
    live = place.name("live")
    one = filled(place, "one", n=10)
    assert place.qdrant.point_alias(live, one) is None
    assert place.qdrant.point_alias(live, one) == place.name("one")
    one.close()
    reader = place("live")
    reader.open_for(CONFIG, create=False)
    assert reader.count() == len(reader.recall(query_vector(), 100)) == 10
    two = filled(place, "two", n=20)
    assert place.qdrant.point_alias(live, two) == place.name("one")
    two.close()
    assert place.names() == (["one", "two"], {"live": "two"})
    reader.close()
    assert reader.count() == len(reader.recall(query_vector(), 100)) == 20
    reader.upsert(make_points(21))
    reader.close()
    assert two.count() == 21, "what is stored under the alias is stored in the collection"


def test_an_alias_is_never_missing_while_it_moves(place: Place) -> None:
    live = place.name("live")
    indexes = [filled(place, name, n=5) for name in ("one", "two")]
    place.qdrant.point_alias(live, indexes[0])
    watched, moving = [], threading.Event()

    def watch() -> None:
        while not moving.is_set():
            watched.append(place.qdrant.collections()[1].get(live))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        for i in range(1000):
            place.qdrant.point_alias(live, indexes[i % 2])
            if i > 20 and len(watched) > 5:
                break
        moving.set()
        watching.result()
    assert set(watched) <= {place.name("one"), place.name("two")}


def test_searches_go_on_while_an_alias_moves(on_server: Place) -> None:
    live = on_server.name("live")
    indexes = [on_server(name) for name in ("one", "two")]
    for index, seed in zip(indexes, (1, 2), strict=True):
        index.open_for(CONFIG)
        index.upsert([replace(point, payload={"of": seed}) for point in make_points(30, seed=seed)])
    on_server.qdrant.point_alias(live, indexes[0])
    found, moving = [], threading.Event()

    def search() -> None:
        reader = on_server("live")
        while not moving.is_set():
            found.append({payload["of"] for payload in reader.recall(query_vector(), 20).payloads})

    with ThreadPoolExecutor(1) as pool:
        searching = pool.submit(search)
        for i in range(1000):
            on_server.qdrant.point_alias(live, indexes[(i + 1) % 2])
            if i > 20 and len(found) > 5:
                break
        moving.set()
        searching.result()
    assert all(one in ({1}, {2}) for one in found), "each search is answered by one collection"


def test_an_alias_takes_no_collections_name(place: Place) -> None:
    index = filled(place, n=1)
    filled(place, "other", n=1)
    for name in ("docs", "other"):
        with pytest.raises(StoreError, match=f"{name}' at .* is a collection: an alias needs a name of its own"):
            place.qdrant.point_alias(place.name(name), index)
    with pytest.raises(ValueError, match="collection name 'a/b'"):
        place.qdrant.point_alias("a/b", index)
    assert place.names()[1] == {}


def test_a_name_that_is_an_alias_makes_no_second_collection(place: Place) -> None:
    place.qdrant.point_alias(place.name("live"), filled(place, n=3))
    index = place.again("live")
    index.open_for(CONFIG)
    assert index.count() == 3
    assert place.names() == (["docs"], {"live": "docs"})


def test_an_alias_can_be_given_under_an_alias(place: Place) -> None:
    place.qdrant.point_alias(place.name("live"), filled(place, n=3))
    assert place.qdrant.point_alias(place.name("also"), place.again("live")) is None
    assert place.names()[1] == {"live": "docs", "also": "docs"}
    with pytest.raises(ArgumentError, match="live' is an alias already: name the collection that is to have it"):
        place.qdrant.point_alias(place.name("live"), place.again("live"))


def test_an_alias_whose_collection_is_gone_is_called_so(tmp_path: Path) -> None:
    for name in ("docs", "other"):
        with QdrantIndex(name, tmp_path) as index:
            index.open_for(CONFIG)
    Qdrant(tmp_path).point_alias("live", "docs")
    (tmp_path / "docs").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "collection.json").unlink()
    with (
        QdrantIndex("live", tmp_path) as index,
        pytest.raises(StoreError, match=r"'live' at .* is an alias of 'docs', which is gone\. There are: other\."),
    ):
        index.count()


def test_a_collection_is_dropped_by_its_own_name(place: Place) -> None:
    index = filled(place, n=3)
    place.qdrant.point_alias(place.name("live"), index)
    place.qdrant.point_alias(place.name("also"), index)
    with pytest.raises(StoreError, match=r"live' is an alias of '.*docs': drop that one"):
        place.again("live").drop()
    place.qdrant.point_alias(place.name("third"), filled(place, "other", n=1))
    index = place.again()
    index.drop()
    assert place.names() == (["other"], {"third": "other"})
    with pytest.raises(StoreError, match="no collection"):
        index.count()
    index.open_for(CONFIG)
    assert index.count() == 0, "the name is free again"


def test_what_something_else_made_is_not_dropped(place: Place) -> None:
    make_foreign(place, "foreign")
    with pytest.raises(MismatchError, match="made by something else"):
        place("foreign").drop()
    if place.embedded:
        assert (Path(place.location) / "foreign" / "notes.txt").read_text() == "mine"
    else:
        assert place.client.collection_exists(place.name("foreign"))


def test_a_folder_that_only_looks_like_a_damaged_collection_is_not_dropped(folder: Place) -> None:
    photos = Path(folder.location) / "photos"
    (photos / "shards").mkdir(parents=True)
    (photos / "collection.json").write_text("// my notes")
    with pytest.raises(StoreError, match="photos"):
        folder("photos").drop()
    assert (photos / "shards").is_dir()


def test_what_lies_beside_a_shard_is_kept(folder: Place) -> None:
    filled(folder, n=3).close()
    collection = Path(folder.location) / folder.name("docs")
    for name in ("shard.bak", "shard-0123abcd"):
        (collection / name).mkdir()
    assert folder.again().count() == 3
    assert sorted(path.name for path in collection.glob("shard*")) == ["shard", "shard.bak"], (
        "a build's rest is removed"
    )


def make_foreign(place: Place, name: str) -> None:
    if place.embedded:
        folder = Path(place.location) / name
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    else:
        place.client.create_collection(place.name(name), vectors_config={})


# ---- indexing anew without a pause ----


def generation(place: Place, n: int = 0, **more: Any) -> QdrantIndex:
    """The next one of `kb`, with so many documents."""
    index = place.opened(place.qdrant.open_generation(place.name("kb"), CONFIG, **more))
    index.upsert(make_points(n))
    return index


def live(place: Place, n: int = 10, **more: Any) -> QdrantIndex:
    """The first one of `kb`, complete, and closed."""
    index = generation(place, n, **more)
    assert place.qdrant.switch_over(index, place.name("kb"), n) is None
    index.close()
    return index


def test_a_new_generation_is_built_beside_the_old(place: Place) -> None:
    kb = place.name("kb")
    killed = generation(place, 10)
    killed.close()
    first = generation(place)
    assert first.name == killed.name == f"{kb}-1", "one that was interrupted is continued"
    assert first.count() == 10
    assert place.qdrant.switch_over(first, kb, 10) is None
    first.close()

    second = generation(place, 20)
    assert second.name == f"{kb}-2"
    with pytest.raises(StoreError, match=r"new collection holds 20 documents, the corpus 21: '.*kb' stays where"):
        place.qdrant.switch_over(second, kb, 21)
    assert place.names() == (["kb-1", "kb-2"], {"kb": "kb-1"})
    assert place.qdrant.switch_over(second, kb, 20) == f"{kb}-1"
    assert place.names() == (["kb-2"], {"kb": "kb-2"})
    assert place.qdrant.switch_over(second, kb, 20) is None, "twice is no harm"
    second.close()
    assert generation(place).name == f"{kb}-3"
    assert place.again("kb").count() == 20


def test_a_collection_that_was_made_otherwise_is_neither_continued_nor_dropped(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Names such as kb-1 are anybody's."""
    kb = place.name("kb")
    make_foreign(place, "kb-1")
    filled(place, "kb-2", n=7).close()
    place.qdrant.point_alias(kb, filled(place, "kb-3", n=3))
    place.qdrant.point_alias(place.name("kb-4"), filled(place, "hers", n=2))
    other = place.opened(place.qdrant.open_generation(place.name("other"), CONFIG))
    other.upsert(make_points(4))
    place.qdrant.switch_over(other, place.name("other"), 4)
    index = generation(place, 5)
    assert index.name == f"{kb}-5"
    place.again("kb-3").close()
    assert place.qdrant.switch_over(place("kb-5"), kb, 5) is None
    assert "kb-3 stays: it was not made as a generation of" in caplog.messages[-1]
    place.qdrant.point_alias(kb, place("kb-2"))
    assert generation(place).name == f"{kb}-6", "a complete generation is not continued, whoever has the alias"
    kept = {"hers": 2, "kb-2": 7, "kb-3": 3, "kb-5": 5, "other-1": 4}
    assert {name: place.again(name).count() for name in kept} == kept


def test_a_former_generation_stays_if_rows_were_skipped(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    live(place)
    second = generation(place, 3)
    assert place.qdrant.switch_over(second, place.name("kb"), 3, keep_former=True) is None
    assert "kb-1 stays: rows of the corpus were skipped, and it may have their documents" in caplog.messages[-1]
    assert place.names() == (["kb-1", "kb-2"], {"kb": "kb-2"})
    assert place.again("kb-1").count() == 10


def test_a_restored_or_copied_generation_is_none(place: Place, tmp_path: Path) -> None:
    first = generation(place, 3)
    first.snapshot(tmp_path / "snapshot")
    first.copy_to(place("kb-2"))
    place.qdrant.restore(place.name("kb-3"), tmp_path / "snapshot")
    place.qdrant.switch_over(first, place.name("kb"), 3)
    place.qdrant.point_alias(place.name("kb"), place.again("kb-3"))
    place.again("kb-1").drop()
    index = generation(place, 5)
    assert index.name == place.name("kb-4")
    place.again()
    assert place.qdrant.switch_over(place("kb-4"), place.name("kb"), 5) is None
    assert place.names() == (["kb-2", "kb-3", "kb-4"], {"kb": "kb-4"})
    assert place("kb-2").count() == place("kb-3").count() == 3


def test_a_generation_under_another_alias_stays(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    live(place)
    place.qdrant.point_alias(place.name("archive"), place("kb-1"))
    place.again()
    assert place.qdrant.switch_over(generation(place, 20), place.name("kb"), 20) is None
    assert "kb-1 stays: the alias " in caplog.messages[-1]
    assert re.search(r"To remove it: d2llm collection drop \S*kb-1 --qdrant \S+$", caplog.messages[-1])
    assert place.names() == (["kb-1", "kb-2"], {"archive": "kb-1", "kb": "kb-2"})


def test_a_generation_is_stored_like_the_one_before_it(place: Place) -> None:
    made = {"quantization": "turbo4", "datatype": "float16", "bm25": {"language": "german", "average_words": 7.0}}
    live(place, options=made, payload_indexes={"lang": "keyword", "year": "integer"})
    second = generation(
        place, options={"quantization": "none"}, payload_indexes={"price": "float", "year": "float"}, average_words=3.0
    )
    info = second.info()
    words = Bm25Options(language="german", average_words=3.0)
    assert info.metadata.options == CollectionOptions(quantization="none", datatype="float16", bm25=words)
    assert info.metadata.options.bm25 is not None and info.metadata.options.bm25.average_words == 3.0
    assert info.payload_indexes == {"lang": "keyword", "year": "float", "price": "float"}
    second.close()
    refused = (
        r"kb-2' .* with quantization 'none', not 'int8'\. .*: leave these options out\. .* drop .*kb-2 --qdrant \S+$"
    )
    with pytest.raises(MismatchError, match=refused) as error:
        generation(place, options={"quantization": "int8"})
    assert "--alias" not in str(error.value), "that is what asked for this one"
    again = generation(place).info()
    assert again.name == info.name and again.metadata.options == info.metadata.options
    assert again.payload_indexes == info.payload_indexes, "what the interrupted job asked for stays"


def test_the_words_of_a_generation_can_be_left_out(place: Place) -> None:
    live(place, options={"bm25": {}})
    assert generation(place, options={"bm25": None}).info().metadata.options == CollectionOptions()


def test_of_two_jobs_at_once_the_later_one_goes_on(on_server: Place) -> None:
    """The former one is told, and neither stores nor removes anything more."""
    kb = on_server.name("kb")
    live(on_server)
    first = generation(on_server, 20)
    second = generation(on_server)
    assert second.name == first.name
    acts: list[Callable[[], Any]] = [
        lambda: first.upsert(make_points(30)),
        lambda: first.prune(["doc 1"]),
        lambda: on_server.qdrant.switch_over(first, kb, 20),
    ]
    for act in acts:
        with pytest.raises(StoreError, match=r"another job goes on with collection '.*kb-2'"):
            act()
    assert second.count() == 20 and on_server.names()[1] == {"kb": "kb-1"}
    assert on_server.qdrant.switch_over(second, kb, 20) == f"{kb}-1"


def test_a_job_does_not_go_on_with_what_another_has_just_completed(
    on_server: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    kb = on_server.name("kb")
    first = generation(on_server, 20)
    second = on_server("kb-1", generation_of=kb)
    remember = second._engine.remember

    def late(metadata: Metadata) -> None:
        """The first job completes the collection after the second has seen it unfinished."""
        monkeypatch.undo()
        on_server.qdrant.switch_over(first, kb, 20)
        remember(metadata)

    monkeypatch.setattr(second._engine, "remember", late)
    with pytest.raises(StoreError, match=r"another job has just completed collection '.*kb-1'"):
        second.open_for(CONFIG)
    assert generation(on_server).name == f"{kb}-2"
    assert on_server("kb").count() == 20


@pytest.mark.parametrize("step", ["point_alias", "remember", "drop"])
def test_a_job_that_is_killed_while_it_switches_over(step: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    kb = place.name("kb")
    live(place)
    second = generation(place, 20)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(QdrantIndex if step == "drop" else second._engine, step, killed)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        place.qdrant.switch_over(second, kb, 20)
    monkeypatch.undo()
    assert place.again("kb").count() == (10 if step == "point_alias" else 20)
    place.again()
    third = generation(place)
    assert third.name == (f"{kb}-2" if step == "point_alias" else f"{kb}-3"), "what has the alias is not continued"
    third.upsert(make_points(30))
    assert place.qdrant.switch_over(third, kb, 30) == (f"{kb}-1" if step == "point_alias" else f"{kb}-2")
    assert place.again("kb").count() == 30
    assert ("kb-1" in place.names()[0]) == (step != "point_alias"), "left over, and left alone"


def test_an_old_collection_is_no_generation(place: Place) -> None:
    """Those of the first version say nothing of it."""
    live(place)
    assert "generation" not in rewritten_metadata(place, lambda content: content.pop("generation"), "kb-1")
    index = generation(place, 20)
    assert index.name == place.name("kb-2")
    assert place.qdrant.switch_over(index, place.name("kb"), 20) is None
    assert place.again("kb-1").count() == 10


def test_a_generation_needs_an_alias_that_is_no_collection(place: Place) -> None:
    filled(place, "kb", n=1)
    with pytest.raises(StoreError, match=r"kb' is a collection, so it cannot be an alias: choose another"):
        generation(place)


def test_an_alias_does_not_take_open_searches_to_another_encoder(place: Place) -> None:
    """On a server they would follow it at once, with queries of the former model."""
    live(place)
    searching = place.again("kb")
    assert len(searching.recall(query_vector(), 5)) == 5
    other = replace(CONFIG, fingerprint="fedcba9876543210")
    if place.embedded:  # nor has it to be closed for that
        assert place.opened(place.qdrant.open_generation(place.name("kb"), other)).name == place.name("kb-2")
        return
    with pytest.raises(MismatchError, match=r"with passage encoder 0123.* is fedcba.*would go on with its own model"):
        place.qdrant.open_generation(place.name("kb"), other)
    assert place.names() == (["kb-1"], {"kb": "kb-1"})


def test_the_former_generation_stays_while_it_is_open(folder: Place, caplog: pytest.LogCaptureFixture) -> None:
    live(folder, options={"quantization": "none"}, payload_indexes={"lang": "keyword"})
    searching = folder("kb")
    assert searching.count() == 10
    second = generation(folder, 20)
    assert second.info().metadata.options.quantization == "none"
    assert "payload indexes of kb-1 are not taken over" in caplog.messages[0] and "in use" in caplog.messages[0]
    assert folder.qdrant.switch_over(second, "kb", 20) is None
    assert caplog.messages[-1].startswith("kb-1 stays: ") and "in use" in caplog.messages[-1]
    assert folder.names() == (["kb-1", "kb-2"], {"kb": "kb-2"})
    assert searching.count() == 10
    folder.again()
    assert generation(folder).name == "kb-3", "nor is the one that stayed continued"


def test_a_former_collection_of_something_else_stays(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    index = generation(place, 1)
    make_foreign(place, "foreign")
    if place.embedded:
        (Path(place.location) / "kb.alias").write_text("foreign\n")
    else:
        alias = models.CreateAlias(collection_name=place.name("foreign"), alias_name=place.name("kb"))
        place.client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    assert place.qdrant.switch_over(index, place.name("kb"), 1) is None
    assert "foreign stays: " in caplog.messages[-1] and "made by something else" in caplog.messages[-1]
    assert place.names()[1] == {"kb": "kb-1"}


# ---- snapshots ----

MADE = CollectionOptions(quantization="turbo4", bm25=Bm25Options(average_words=2.0))


def assert_equal(found: QdrantIndex, expected: QdrantIndex) -> None:
    """The same documents, and the same answers by cosine and by words."""
    assert sorted(found.ids()) == sorted(expected.ids())
    ids = list(expected.ids())
    assert found.digests(ids) == expected.digests(ids)
    assert found.get(ids) == expected.get(ids)
    for seed in range(3):
        vector = query_vector(seed)
        assert_same(found.recall(vector, 50), expected.recall(vector, 50))
        for words in ("7", "101"):
            assert_same(
                found.recall(vector, 20, query_text=words), expected.recall(vector, 20, query_text=words), words
            )


@pytest.fixture(scope="module", params=PLACES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Path]]:
    """A place with the collection `docs`, whose alias is `live`, and a snapshot of it."""
    folder = tmp_path_factory.mktemp("saved")
    with place_of(request.param, folder) as place:
        index = filled(place, options=asdict(MADE))
        index.index_payload({"lang": "keyword", "year": "integer"})
        place.qdrant.point_alias(place.name("live"), index)
        index.snapshot(folder / "docs.snapshot")
        assert index.count() == N, "it goes on"
        yield place, folder / "docs.snapshot"


def test_a_snapshot_holds_everything(saved: tuple[Place, Path], tmp_path: Path) -> None:
    place, snapshot = saved
    index, again = place.again(), place("again")
    place.qdrant.restore(again.name, snapshot)
    assert_equal(again, index)
    if place.embedded:
        assert snapshot.stat().st_size < 3e6, "the engine's files, of 130 MB, are mostly holes"
    info, restored = index.info(), again.info()
    assert restored.metadata == info.metadata
    assert restored.payload_indexes == info.payload_indexes == {"lang": "keyword", "year": "integer"}
    assert restored.aliases == [], "an alias is not part of it"
    again.delete(["doc 1"])
    again.upsert(make_points(1, seed=9))
    assert (again.count(), index.count()) == (N - 1, N)
    again.drop()


def test_a_snapshot_is_not_written_into_the_collection(tmp_path: Path) -> None:
    with QdrantIndex("docs", tmp_path) as index:
        index.open_for(CONFIG)
        with pytest.raises(ArgumentError, match=r"docs/backup is in the folder of the collection"):
            index.snapshot(tmp_path / "docs" / "backup")
        assert not (tmp_path / "docs" / "backup").exists()


def test_a_snapshot_replaces_nothing(saved: tuple[Place, Path]) -> None:
    place, snapshot = saved
    for name in ("docs", "live"):
        place.again()
        with pytest.raises(StoreError, match=rf"{name}' at .* exists already: drop it first, or restore under another"):
            place.qdrant.restore(place.name(name), snapshot)
    assert place.again().count() == N


def test_what_is_no_snapshot_leaves_nothing_behind(saved: tuple[Place, Path], tmp_path: Path) -> None:
    place, snapshot = saved
    content = snapshot.read_bytes()
    refused = "is no snapshot of an embedded collection" if place.embedded else f"collection '{place.name('again')}': "
    for wrong in (b"", b"no snapshot at all", content[: len(content) // 2]):
        (tmp_path / "wrong").write_bytes(wrong)
        place.again()
        with pytest.raises(StoreError, match=refused):
            place.qdrant.restore(place.name("again"), tmp_path / "wrong")
    place.again()
    with pytest.raises(StoreError, match=r"missing\.snapshot: No such file"):
        place.qdrant.restore(place.name("again"), tmp_path / "missing.snapshot")
    assert place.names() == (["docs"], {"live": "docs"})
    if place.embedded:
        left = {path.name for path in Path(place.location).iterdir()}
        assert left == {"docs", ".docs.lock", "live.alias"}


def test_a_snapshot_of_something_else_is_refused(saved: tuple[Place, Path], tmp_path: Path) -> None:
    place, _ = saved
    file = tmp_path / "foreign"
    if place.embedded:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("collection.json", '{"made by": "me"}')
    else:
        foreign = place.name("foreign")
        place.client.create_collection(foreign, vectors_config={})
        made = place.client.create_snapshot(foreign)
        assert made is not None
        url = f"{place.location}/collections/{foreign}/snapshots/{made.name}"
        file.write_bytes(httpx.get(url).raise_for_status().content)
        place.client.delete_collection(foreign)
    place.again()
    with pytest.raises(MismatchError, match="made by something else than d2llm"):
        place.qdrant.restore(place.name("again"), file)
    assert place.names()[0] == ["docs"], "nothing is left of it"


def test_a_damaged_collection_is_not_restored(folder: Place, tmp_path: Path) -> None:
    for name, content, message in (
        ("torn", "{", r"collection\.json is damaged"),
        ("alone", None, "Service runtime error"),
        ("other", "[]", r"holds no collection\.json"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            if name == "other":
                archive.writestr("something.json", "[]")
            else:
                archive.writestr("collection.json", content or json.dumps(Metadata.of(CONFIG, MADE).to_json()))
        with pytest.raises(StoreError, match=message):
            folder.qdrant.restore("again", tmp_path / name)
        assert list(Path(folder.location).iterdir()) == []


def test_a_snapshot_that_cannot_be_written(saved: tuple[Place, Path], tmp_path: Path) -> None:
    place, _ = saved
    index = place.again()
    (tmp_path / "file").write_text("")
    for target, message in (
        (tmp_path / "nowhere" / "docs.snapshot", r"nowhere/docs\.snapshot: No such file or directory"),
        (tmp_path / "file" / "docs.snapshot", r"file/docs\.snapshot: Not a directory"),
        (tmp_path, r": Is a directory"),
    ):
        with pytest.raises(StoreError, match=message):
            index.snapshot(target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not list(tmp_path.parent.glob(".*.part"))
    if not place.embedded:
        assert place.client.list_snapshots(place.name("docs")) == [], "none is left on the server"
    assert index.count() == N


def test_a_disk_that_is_full_leaves_no_half_snapshot(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = filled(folder, n=10)
    write = zipfile.ZipFile.write

    def full(archive: zipfile.ZipFile, path: Path, *names: Any) -> None:
        if path.suffix == ".mmap":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(archive, path, *names)

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    target = tmp_path / "docs.snapshot"
    target.write_text("an earlier one")
    with pytest.raises(StoreError, match=r"docs\.snapshot: No space left on device"):
        index.snapshot(target)
    assert target.read_text() == "an earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs.snapshot", "qdrant"]
    index.upsert(make_points(11))
    assert index.count() == 11


def test_a_snapshot_whose_download_is_cut(tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "server", proxied=True, version="1.20.0") as server:
        with QdrantIndex("docs", server.url, grpc_port=None) as index:
            index.open_for(CONFIG)
            server.faults.add("cut", on="download_snapshot", after=True)
            with pytest.raises(StoreError, match=r"Qdrant at http://127"):
                index.snapshot(tmp_path / "docs.snapshot")
            assert [path.name for path in tmp_path.iterdir()] == ["server"]
            index.snapshot(tmp_path / "docs.snapshot")
    assert (tmp_path / "docs.snapshot").stat().st_size > 0


# ---- copies ----


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantIndex]:
    """An embedded collection with words and payload indexes."""
    with place_of("embedded", tmp_path_factory.mktemp("source")) as place:
        index = filled(place, "source", options=asdict(MADE))
        index.index_payload({"lang": "keyword", "price": "float", "free": "bool", "site.name": "keyword"})
        yield index


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2llm.connectors.manage.PAGE", 32)


def test_a_copy_there_and_back(source: QdrantIndex, place: Place, tmp_path: Path, small_pages: None) -> None:
    there = place()
    assert source.copy_to(there) == N
    assert_equal(there, source)
    assert there.info().metadata == source.info().metadata
    assert there.info().payload_indexes == source.info().payload_indexes
    assert there.count({"price": {"lt": 3}, "free": True}) == source.count({"price": {"lt": 3}, "free": True})
    assert source.copy_to(there) == 0, "what is there is left alone"
    with QdrantIndex("back", tmp_path / "back") as back:
        assert there.copy_to(back) == N
        assert_equal(back, source)
        back.open_for(CONFIG, create=False)
    there.upsert(make_points(2, seed=9))
    with pytest.raises(StoreError, match=r"holds another version of documents .*, such as 'doc [01]': nothing was cop"):
        source.copy_to(there, replace_others=False)
    assert there.digests(["doc 0", "doc 1"]) == {"doc 0": "9-0", "doc 1": "9-1"}
    assert source.copy_to(there) == 2, "what differs is copied again"
    assert_equal(there, source)


@pytest.mark.parametrize(
    "words", [None, Bm25Options(language="german", average_words=4.0)], ids=["without words", "german"]
)
def test_a_copy_may_be_stored_otherwise(source: QdrantIndex, place: Place, words: Bm25Options | None) -> None:
    options = {"quantization": "none", "datatype": "float16", "bm25": words}
    copy = place(options=options)
    assert source.copy_to(copy) == N
    assert copy.info().metadata.options == CollectionOptions(**options)
    assert copy.info().metadata.fingerprint == CONFIG.fingerprint
    assert recall_of(copy, flat_copy(source)) == 1
    if words is None:
        with pytest.raises(MismatchError, match="has no BM25 vectors"):
            copy.recall(query_vector(), 5, query_text="text")
    else:
        assert "doc 77" in copy.recall(query_vector(), 5, query_text="77").ids
    with pytest.raises(MismatchError, match="datatype 'float16', not 'float32'"):
        source.copy_to(place.again(options={"datatype": "float32"}))


def flat_copy(index: QdrantIndex) -> FlatIndex:
    flat = FlatIndex()
    flat.open_for(CONFIG)
    flat.upsert(make_points(N))
    assert flat.count() == index.count()
    return flat


def test_words_come_with_a_copy_of_what_had_none(place: Place, tmp_path: Path) -> None:
    with QdrantIndex("plain", tmp_path / "plain") as plain:
        plain.open_for(CONFIG)
        plain.upsert(make_points(50))
        copy = place(options={"bm25": {"average_words": 2.0}})
        assert plain.copy_to(copy) == 50
        assert copy.recall(query_vector(), 5, query_text="31").ids != plain.recall(query_vector(), 5).ids
        assert "doc 31" in copy.recall(query_vector(), 5, query_text="31").ids


def test_a_copy_that_was_interrupted_goes_on(
    source: QdrantIndex, place: Place, small_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = place()
    copy.open_for(CONFIG)
    upsert, calls = copy._engine.upsert, list[int]()

    def interrupted(points: Any) -> None:
        calls.append(len(points))
        if len(calls) == 3:
            raise KeyboardInterrupt
        upsert(points)

    monkeypatch.setattr(copy._engine, "upsert", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        source.copy_to(copy)
    assert copy.count() == 64
    assert copy.info().status == "ready", "a load that was begun is ended"
    assert source.copy_to(copy) == N - 64
    assert calls == [32, 32, 32, 32, 24]
    assert sorted(copy.ids()) == sorted(source.ids())


def test_a_copy_takes_no_other_vectors_and_no_other_documents(source: QdrantIndex, place: Place) -> None:
    other = place("other")
    other.open_for(replace(CONFIG, fingerprint="fedcba"))
    with pytest.raises(
        MismatchError, match=r"other' at .* holds vectors of encoder fedcba \(32 numbers .* format 2\), .*0123456789"
    ):
        source.copy_to(other)
    assert other.count() == 0
    more = place("more")
    more.open_for(CONFIG)
    more.upsert([replace(make_points(1)[0], id="one more")])
    with pytest.raises(
        StoreError, match=r"more' at .* that .*source' at .* does not have, such as 'one more': nothing"
    ):
        source.copy_to(more)
    assert more.count() == 1, "nothing was mixed with it"
    place.qdrant.point_alias(place.name("alias"), more)
    more.close()
    with pytest.raises(ArgumentError, match=r"more' at .* would be copied onto itself"):
        more.copy_to(place("alias"))
    with pytest.raises(StoreError, match="no collection 'nothing'"):
        place.qdrant.copy("nothing", more)


# ---- documents that go ----


def test_a_copy_names_a_document_that_no_server_takes(folder: Place) -> None:
    """An earlier version stored it."""
    source = filled(folder, n=3)
    value: Any = "x"
    for _ in range(60):
        value = {"k": value}
    (point,) = stored_points(make_points(1, seed=1), H)
    source._engine.upsert([point._replace(payload={**point.payload, "deep": value})])
    with pytest.raises(DataError, match="document 'doc 0': field 'deep': lists and objects are nested more than 30"):
        source.copy_to(folder("copy"))


def test_large_documents_go_to_a_server_in_requests_that_it_takes(on_server: Place) -> None:
    """It takes 32 MB; these are 40."""
    points = [replace(point, payload={"text": "x" * 2**20}) for point in make_points(40)]
    index = on_server("large")
    index.open_for(CONFIG)
    index.upsert(points)
    assert index.count() == 40
    index.upsert([replace(points[0], payload={"text": "x" * (2**23 - 100)})])
    assert len(index.get(["doc 0"])["doc 0"]["text"]) == 2**23 - 100


def test_documents_go_by_filter(place: Place) -> None:
    index = filled(place)
    with pytest.raises(ValueError, match=r"empty filter would remove every document: .* drop\(\)"):
        index.delete_where({})
    with pytest.raises(ValueError, match="filter on 'year': None is neither"):
        index.delete_where({"year": None})
    assert index.delete_where({"lang": "xx"}) == 0
    gone = {f"doc {i}" for i in range(N) if matches(payload_number(i), {"lang": "en", "free": True})}
    assert index.delete_where({"lang": "en", "free": True}) == len(gone) == 20
    assert set(index.ids()) == {f"doc {i}" for i in range(N)} - gone
    assert index.delete_where({"lang": "en", "free": True}) == 0


def test_ids_come_in_pages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2llm.connectors.collection.PAGE", 7)
    index = filled(place, n=50)
    ids = list(index.ids())
    assert len(ids) == 50 and set(ids) == {f"doc {i}" for i in range(50)}
    index.delete(ids)
    assert list(index.ids()) == []


def test_pruning_keeps_what_is_in_the_corpus(place: Place, model: d2llm.Model) -> None:
    index = place()
    documents = [Document(f"d{i}", f"text number {i}") for i in range(6)]
    assert index.add(model, documents).added == 6
    changed = [replace(documents[0], text="another text"), *documents[1:3], Document("new", "a new text")]
    report = index.add(model, changed, prune=True)
    assert (report.added, report.unchanged, report.pruned) == (2, 2, 3)
    assert set(index.ids()) == {"d0", "d1", "d2", "new"}
    assert index.get(["d0"]) == {"d0": {"text": "another text"}}
    with pytest.raises(DataError, match="pruning would empty the index"):
        index.add(model, [], prune=True)
    assert index.prune(["d0", "new", "elsewhere"]) == 2
    assert set(index.ids()) == {"d0", "new"}


# ---- the graph, built aside (embedded) ----


@pytest.fixture
def held_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Two files: a build makes the first when it begins, and then waits for the second."""
    began, go = tmp_path / "began", tmp_path / "go"
    monkeypatch.setattr("d2llm.connectors.edge._OPTIMIZE", held(began, go))
    yield began, go
    go.touch()


def held(began: Path, go: Path) -> str:
    """The build's program, which says when it begins and then waits."""
    return f"""
import pathlib, time
pathlib.Path({str(began)!r}).touch()
while not pathlib.Path({str(go)!r}).exists():
    time.sleep(0.01)
{edge._OPTIMIZE}"""


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


def as_it_is_and_reopened(place: Place, index: QdrantIndex) -> Iterator[QdrantIndex]:
    yield index
    yield place.again()


def shards(place: Place) -> list[str]:
    return [path.name for path in (Path(place.location) / "docs").iterdir() if path.name != "collection.json"]


def test_nothing_is_lost_that_changes_during_a_build(
    folder: Place, low_threshold: None, held_build: tuple[Path, Path]
) -> None:
    index = filled(folder, options={"bm25": {"average_words": 2.0}})
    truth = FlatIndex()
    truth.open_for(CONFIG)
    truth.upsert(make_points(N))
    before = shards(folder)
    began, go = held_build
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(index.optimize)
        wait_for(began)
        for each in (index, truth):
            each.upsert([replace(point, id=f"new {point.id}") for point in make_points(40, seed=1)])
            each.upsert(make_points(20, seed=2))  # in the place of the first 20
            each.delete(["doc 30", "new doc 7", "nowhere"])
        passed = {"year": {"gte": 2020}, "lang": "de"}
        gone = [id_ for id_, payload in truth.get(list(truth.ids())).items() if matches(payload, passed)]
        assert index.delete_where(passed) == len(gone) > 15
        truth.delete(gone)
        assert_same(index.recall(query_vector(), 50), truth.recall(query_vector(), 50))
        assert not building.done()
        go.touch()
        building.result(60)
    for opened in as_it_is_and_reopened(folder, index):
        assert opened.count() == truth.count()
        assert set(opened.ids()) == set(truth.ids())
        assert opened.digests(list(truth.ids())) == truth.digests(list(truth.ids()))
        for seed in range(3):
            assert_same(opened.recall(query_vector(seed), 50), truth.recall(query_vector(seed), 50))
        assert {"doc 1", "new doc 1"} < set(opened.recall(query_vector(), 4, query_text="1").ids)
        assert opened.info().indexed > 80
    after = shards(folder)
    assert len(after) == 1 and after != before


def test_searches_and_writes_from_other_threads_go_on_during_builds(folder: Place, low_threshold: None) -> None:
    index = filled(folder)
    new = make_points(4000, seed=3)[N:]
    done = threading.Event()

    def write() -> int:
        for number, point in enumerate(new):
            index.upsert([point])
            if number % 3 == 0:
                index.delete([point.id])
            if done.is_set() and number > 20:
                return number + 1
        return len(new)

    def search() -> int:
        for count in range(1_000_000):
            assert len(index.recall(query_vector(count % 5), 20)) == 20
            if done.is_set():
                return count
        return 0

    with ThreadPoolExecutor(3) as pool:
        writing, searching = pool.submit(write), pool.submit(search)
        for _ in range(2):
            index.optimize()
        done.set()
        written = writing.result(60)
        assert searching.result(60) > 0
    there = [f"doc {i}" for i in range(N)] + [point.id for i, point in enumerate(new[:written]) if i % 3]
    for opened in as_it_is_and_reopened(folder, index):
        assert set(opened.ids()) == set(there)
        assert len(opened.recall(query_vector(), 10_000)) == len(there)


@pytest.mark.parametrize(
    ("datatype", "threshold", "built"),
    [
        ("float32", None, False),
        ("float32", 16, False),
        ("float32", 15, True),
        ("float16", 8, False),
        ("float16", 7, True),
    ],
)
def test_nothing_is_built_where_there_is_little(
    datatype: Any, threshold: int | None, built: bool, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """120 vectors of 32 numbers take 15 KB, or 7.5."""
    monkeypatch.setattr("d2llm.connectors.edge.INDEXING_THRESHOLD_KB", threshold)
    index = filled(folder, options={"datatype": datatype})
    index.optimize()
    assert (shards(folder) != ["shard"]) is built
    assert index.info().indexed == N * built


def test_what_is_built_is_not_built_again(folder: Place, low_threshold: None) -> None:
    index = filled(folder)
    index.optimize()
    built = shards(folder)
    assert built != ["shard"]
    for opened in as_it_is_and_reopened(folder, index):
        opened.optimize()
        opened.upsert(make_points(3, seed=1))
        opened.optimize()
        assert shards(folder) == built
    opened.upsert([replace(point, id=f"new {point.id}") for point in make_points(100, seed=1)])
    opened.optimize()
    assert shards(folder) != built
    assert opened.info().indexed >= N + 100


def test_what_a_killed_build_left_is_removed(folder: Place) -> None:
    filled(folder, n=10).close()
    for name in ("shard-00000001", "shard-2f00ba9c"):
        (Path(folder.location) / "docs" / name / "segments").mkdir(parents=True)
        (Path(folder.location) / "docs" / name / "edge_config.json").write_text("{")
    assert folder().count() == 10
    assert shards(folder) == ["shard"]


def test_a_build_that_outlives_its_process_spoils_no_other(
    folder: Place, tmp_path: Path, low_threshold: None, held_build: tuple[Path, Path]
) -> None:
    """Killed alone, the process leaves its child at work in the collection's folder."""
    filled(folder).close()
    began, go = held_build
    program = f"""
from d2llm.connectors import QdrantIndex, edge
edge.INDEXING_THRESHOLD_KB = 10
edge._OPTIMIZE = {held(began, go)!r}
QdrantIndex("docs", {folder.location!r}).optimize()
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    wait_for(began)
    process.kill()
    process.wait()
    index = folder()
    index.delete(["doc 1"])
    index.upsert(make_points(1, seed=5))
    go.touch()  # both builds run now, side by side
    index.optimize()
    for opened in as_it_is_and_reopened(folder, index):
        assert opened.count() == N - 1
        assert opened.digests(["doc 0", "doc 1", "doc 2"]) == {"doc 0": "5-0", "doc 2": "0-2"}
        assert len(opened.recall(query_vector(), 2 * N)) == N - 1


KILLED = """
import sys, threading
import numpy as np
from d2llm.connectors import QdrantIndex, edge
from d2llm.index import Point

edge.INDEXING_THRESHOLD_KB = 10
index = QdrantIndex("docs", sys.argv[1])
start = index.count()
rng = np.random.default_rng(start)

def write():
    for batch in range(start, 1_000_000, 20):
        vectors = rng.standard_normal((20, 32)).astype(np.float32)
        numbered, features = enumerate(vectors, batch), np.zeros(10, np.uint8)
        index.upsert([Point(f"doc {i}", vector, features, {}, f"{i}") for i, vector in numbered])
        print(batch + 20, flush=True)

threading.Thread(target=write, daemon=True).start()
while True:
    index.optimize()
"""


def test_a_kill_at_any_moment_of_a_build_loses_nothing(folder: Place, low_threshold: None) -> None:
    with folder() as index:
        index.open_for(CONFIG)
    moments, stored = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", KILLED, folder.location], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.readline()
        time.sleep(moments.uniform(0, 1.2))
        os.kill(process.pid, signal.SIGKILL)
        said += process.communicate()[0]
        acknowledged = max(int(line) for line in said.splitlines(keepends=True) if line.endswith("\n"))
        assert acknowledged > stored
        index = folder.again()
        ids = [f"doc {i}" for i in range(acknowledged)]
        assert index.digests(ids) == {id_: str(i) for i, id_ in enumerate(ids)}
        stored = index.count()
        assert len(index.recall(query_vector(), 2 * stored)) == stored >= acknowledged
        index.close()
    for _ in range(100):  # the last build may go on for a while, without the process that began it
        assert index.count() == stored
        if len(shards(folder)) == 1:
            break
        index.close()
        time.sleep(0.1)
    else:
        raise AssertionError(f"more than one shard: {shards(folder)}")
    index.optimize()
    assert index.info().indexed >= stored == index.count()


# ---- loading much ----


def threshold(place: Place) -> int | None:
    """From which the server builds a graph: 0 is never."""
    return place.client.get_collection(place.name("docs")).config.optimizer_config.indexing_threshold


def test_a_load_defers_the_graph(on_server: Place) -> None:
    index = on_server()
    index.open_for(CONFIG)
    assert threshold(on_server) == 10_000
    with index.bulk_load():
        assert threshold(on_server) == 0
        assert index.info().status == "deferred"
        index.upsert(make_points(10))
    assert threshold(on_server) == 10_000
    assert index.info().status == "ready"
    with index.bulk_load():
        assert threshold(on_server) == 10_000, "what is there is searched meanwhile, and not without its graph"
        index.upsert(make_points(20))
    assert threshold(on_server) == 10_000


def test_a_load_that_fails_is_ended_too(place: Place) -> None:
    index = place()
    index.open_for(CONFIG)
    with pytest.raises(RuntimeError, match="out of documents"), index.bulk_load():
        index.upsert(make_points(10))
        raise RuntimeError("out of documents")
    assert index.info().status == "ready"
    assert index.count() == 10
    if not place.embedded:
        assert threshold(place) == 10_000


@pytest.mark.parametrize("ending", ["load", "optimize"])
def test_a_load_that_was_killed_is_ended_by_the_next(on_server: Place, ending: str) -> None:
    index = filled(on_server, n=10)
    never = models.OptimizersConfigDiff(indexing_threshold=0)
    on_server.client.update_collection(on_server.name("docs"), optimizers_config=never)
    assert index.info().status == "deferred"
    if ending == "optimize":
        index.optimize()
    else:
        with index.bulk_load():
            index.upsert(make_points(20))
    assert threshold(on_server) == 10_000
    assert index.info().status == "ready"


@pytest.mark.parametrize("kind", ["rest", "grpc"])
def test_optimizing_waits_for_the_server(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2llm.connectors.server.POLL", 0.01)
    with place_of(kind, tmp_path) as place:
        index = filled(place, n=10)
        assert place.server is not None
        place.server.be_busy(1)
        assert index.info().status == "building"
        place.server.be_busy(5)
        before = len(place.server.requests)
        index.optimize()
        asked = [request.operation for request in place.server.requests[before:]]
        assert asked.count("get_collection") >= 5
        assert index.info().status == "ready"


@pytest.mark.parametrize("kind", ["rest", "grpc"])
def test_optimizing_begins_what_a_server_has_put_off(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a restart, a server leaves what is to be indexed to the next write (grey)."""
    monkeypatch.setattr("d2llm.connectors.server.POLL", 0.01)
    monkeypatch.setattr("d2llm.connectors.server.BEGIN_PATIENCE", 0.05)
    with place_of(kind, tmp_path) as place:
        index = filled(place)
        place.client.update_collection(index.name, optimizers_config=models.OptimizersConfigDiff(indexing_threshold=1))
        assert place.server is not None
        place.server.be_grey()
        assert (index.info().status, index.info().indexed) == ("waiting", 0)
        index.optimize()
        assert (index.info().status, index.info().indexed) == ("ready", N)
        assert threshold(place) == 1, "nothing is changed for that"
        place.server.be_grey(stuck=True)
        with pytest.raises(StoreError, match=r"does not begin to index '.*docs' .*grey"):
            index.optimize()
        place.server.be_grey()
        index.upsert(make_points(1))
        monkeypatch.setattr("d2llm.connectors.server.STALLED", 0.05)
        place.server.be_busy(20)
        index.optimize()
        assert f"the server still builds, with {N} of {N} passages in its graphs" in caplog.text


# ---- which servers ----


@pytest.fixture(params=["rest", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def served(server: QdrantServer, protocol: str, **more: Any) -> QdrantIndex:
    more = {"patience": 0.5, **more}
    return QdrantIndex("docs", server.url, grpc_port=server.grpc_port if protocol == "grpc" else None, **more)


def test_a_server_that_is_too_old_is_refused(tmp_path: Path, protocol: str) -> None:
    with (
        QdrantServer(tmp_path, version="1.15.0") as server,
        served(server, protocol) as index,
        pytest.raises(StoreError, match=r"the server at http://\S+ is Qdrant 1\.15\.0: d2llm needs 1\.16 or newer"),
    ):
        index.open_for(CONFIG)


@pytest.mark.parametrize("version", ["1.16.3", "1.30.0", "2.0.0"])
def test_a_server_far_from_the_client_is_warned_of(
    version: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with QdrantServer(tmp_path, version=version) as server, served(server, "grpc") as index:
        index.open_for(CONFIG)
    (said,) = caplog.messages
    assert f"is Qdrant {version}, qdrant-client is " in said and "may not understand" in said


def test_a_server_near_the_client_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    major, minor, _ = importlib.metadata.version("qdrant-client").split(".")
    for near in (0, 1, -1):
        with QdrantServer(tmp_path / str(near), version=f"{major}.{int(minor) + near}.7") as server:
            with served(server, "rest") as index:
                index.open_for(CONFIG)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("status", "media", "content"),
    [
        (200, "text/html", b"<html>Welcome to nginx!</html>"),
        (200, "application/json", b'{"hello": "world"}'),
        (200, "application/json", b"[1, 2]"),
        (404, "text/html", b"<html>Not here</html>"),
        (404, "application/json", b'{"detail": "Not Found"}'),
    ],
    ids=["page", "object", "list", "missing page", "missing object"],
)
def test_what_answers_is_no_qdrant(status: int, media: str, content: bytes) -> None:
    with answering(status, media, lambda headers: content) as port:
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(StoreError, match=rf"what answers at {url} is no Qdrant"):
            QdrantIndex("docs", url, grpc_port=None, patience=0.3).open_for(CONFIG)
        with pytest.raises(StoreError, match=rf"cannot reach Qdrant at {url}.* and gRPC port {port}"):
            QdrantIndex("docs", url, grpc_port=port, patience=0.3).open_for(CONFIG)


@contextmanager
def answering(status: int, media: str, answer: Callable[[str], bytes]) -> Iterator[int]:
    """The port of something that is no Qdrant, and answers whatever headers it gets."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = answer(str(self.headers))
            self.send_response(status)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("./qdrant", "./qdrant"),
        ("me@home/?", "me@home/?"),
        ("http://host:6333", "http://host:6333"),
        ("http://user:s3cret@host:6333/prefix", "http://host:6333/prefix"),
        ("https://s3cret@[::1]:6333", "https://[::1]:6333"),
        ("http://host:6333/?api-key=s3cret", "http://host:6333/"),
        ("http://host:6333?api-key=s3@cret#s3cret", "http://host:6333"),
        ("http://user:s3/cret@host", "http://[secure]"),
        ("http://user:s3?cret@host", "http://[secure]"),
        ("ftp://user:s3cret@host", "ftp://[secure]"),
    ],
)
def test_a_place_is_shown_without_its_secrets(location: str, expected: str) -> None:
    assert shown(location) == expected


def test_a_secret_in_an_address_is_neither_shown_nor_sent(
    tmp_path: Path, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    with QdrantServer(tmp_path, version="1.20.0") as server:
        url = server.url.replace("//", "//user:s3cret@") + "/?api-key=s3cret"
        port = server.grpc_port if protocol == "grpc" else None
        index = QdrantIndex("docs", url, grpc_port=port, patience=0.1)
        with index, pytest.raises(StoreError, match=rf"no collection 'docs' at {server.url}/"):
            index.count()
        index.open_for(CONFIG)
        assert index.info().location == f"{server.url}/"
        assert f"of the address of {server.url}/, the user, password and query are not sent" in caplog.text
        assert "give a key by itself (--api-key; in Python api_key)" in caplog.text
    with pytest.raises(StoreError, match="cannot reach Qdrant at") as unreachable:
        index.count()
    said = [caplog.text, str(unreachable.value), repr(index._engine._connection), repr(Qdrant(url, api_key="s3cret"))]
    assert not [text for text in said if "s3cret" in text]


def test_a_key_that_comes_back_is_not_shown() -> None:
    """A proxy may answer with the headers that it got."""
    with answering(401, "text/plain", lambda headers: f"{' ' * 9}{headers}".encode()) as port:
        index = QdrantIndex("docs", f"http://127.0.0.1:{port}", grpc_port=None, patience=0.1, api_key="s3cret")
        with pytest.raises(StoreError, match=r"refuses access .*api-key: \[secure\]") as refused:
            index.count()
        assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("key", ["s3cret\n", " s3cret", "s3cr\u00e4t", "s3\x00cret"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(key: str) -> None:
    with pytest.raises(ArgumentError, match="the API key has a line break, a space at one of its ends, or") as refused:
        QdrantIndex("docs", "http://127.0.0.1:6333", api_key=key)
    assert "s3" not in str(refused.value)


def test_api_keys(tmp_path: Path, protocol: str) -> None:
    with QdrantServer(tmp_path / "server", api_key="secret") as server:
        for wrong in ("guess", None):
            with (
                served(server, protocol, api_key=wrong) as index,
                pytest.raises(StoreError, match=r"Qdrant at http://\S+ refuses access to 'docs': check the API key"),
            ):
                index.open_for(CONFIG)
        with served(server, protocol, api_key="secret") as index:
            index.open_for(CONFIG)
            index.upsert(make_points(10))
            assert len(asyncio.run(index.arecall(query_vector(), 5))) == 5
            index.snapshot(tmp_path / "docs.snapshot")
            with served(server, protocol, api_key="secret") as other:
                other.drop()
            index.close()
            port = server.grpc_port if protocol == "grpc" else None
            Qdrant(server.url, grpc_port=port, api_key="secret").restore("docs", tmp_path / "docs.snapshot")
            assert index.count() == 10


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A certificate for 127.0.0.1, and the file of the private authority that gave it."""
    trustme = pytest.importorskip("trustme")
    authority, file = trustme.CA(), tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    return authority.issue_cert("127.0.0.1"), file


def test_a_private_authority_is_trusted_by_its_file(tmp_path: Path, protocol: str, authority: tuple[Any, Path]) -> None:
    certificate, ca_file = authority
    with QdrantServer(tmp_path / "server", certificate=certificate) as server:
        assert server.url.startswith("https://")
        with served(server, protocol, ca_file=ca_file) as index:
            index.open_for(CONFIG)
            index.upsert(make_points(10))
            assert len(index.recall(query_vector(), 5)) == 5
            assert len(asyncio.run(index.arecall(query_vector(), 5))) == 5
            index.snapshot(tmp_path / "docs.snapshot")
            index.drop()
            port = server.grpc_port if protocol == "grpc" else None
            Qdrant(server.url, grpc_port=port, ca_file=ca_file).restore("docs", tmp_path / "docs.snapshot")
            assert index.count() == 10
        with served(server, protocol) as index:
            with pytest.raises(StoreError, match=r"cannot reach Qdrant at https://"):
                index.open_for(CONFIG)


def test_a_wrong_file_of_an_authority(tmp_path: Path, protocol: str, authority: tuple[Any, Path]) -> None:
    (tmp_path / "garbage.pem").write_text("no certificate")
    certificate, _ = authority
    with QdrantServer(tmp_path / "server", certificate=certificate) as server:
        for name, message in (("missing.pem", "No such file or directory"), ("garbage.pem", "")):
            with (
                served(server, protocol, ca_file=tmp_path / name) as index,
                pytest.raises(StoreError, match=rf"{name}: {message}.*certificate authority"),
            ):
                index.open_for(CONFIG)
