"""Places for collections, and what can be done there without an index."""

import doctest
import importlib
import pickle
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

from qdrant_places import CONFIG, make_points

import d2llm
from d2llm.connectors import Qdrant, QdrantIndex, reindex
from d2llm.deprecated import RenamedWarning
from d2llm.errors import ArgumentError, StoreError


def filled(qdrant: Qdrant, name: str, n: int = 3) -> QdrantIndex:
    index = qdrant.index(name)
    index.open_for(CONFIG)
    index.upsert(make_points(n))
    return index


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no location": ("localhost:6333", {}, "a server is http://localhost:6333"),
    "port of the address": ("http://localhost:0", {}, "its port is no number from 1 to 65535"),
    "key": ("http://localhost", {"api_key": "key\n"}, "which no header can hold"),
    "port": ("http://localhost", {"grpc_port": 0}, "grpc_port must be from 1 to 65535"),
    "timeout": ("http://localhost", {"timeout": 0}, "timeout must be above 0"),
    "patience": ("http://localhost", {"patience": -1}, "patience must be a number of seconds"),
    "consistency": ("http://localhost", {"read_consistency": "some"}, "read_consistency 'some'"),
    "ordering": ("http://localhost", {"write_ordering": "some"}, "write_ordering 'some'"),
}


@pytest.mark.parametrize(("location", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_place_checks_its_arguments_at_once(location: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Qdrant(location, **options)


def test_a_place_reaches_and_makes_nothing_before_it_must(tmp_path: Path) -> None:
    Qdrant("http://127.0.0.1:1").index("kb")
    qdrant = Qdrant(tmp_path / "qdrant")
    assert qdrant.collections() == ([], {})
    assert qdrant.peek("kb") is None
    with pytest.raises(StoreError, match="no collection 'kb'"):
        qdrant.index("kb").count()
    for name in ("a/b", ""):
        with pytest.raises(ArgumentError, match="collection name"):
            qdrant.index(name)
    assert not (tmp_path / "qdrant").exists()


def test_a_place_shows_no_secret_and_survives_pickling() -> None:
    qdrant = Qdrant("http://user:s3cret@localhost:6333", api_key="s3cret", grpc_port=None)
    assert str(qdrant) == "http://localhost:6333" and repr(qdrant) == "Qdrant('http://localhost:6333')"
    assert pickle.loads(pickle.dumps(qdrant)) == qdrant
    assert qdrant.shared and not Qdrant("folder").shared


def test_the_verbs_of_a_place_take_a_name_or_an_open_index(tmp_path: Path) -> None:
    qdrant, other = Qdrant(tmp_path / "qdrant"), Qdrant(tmp_path / "other")
    with filled(qdrant, "kb") as index:
        assert qdrant.point_alias("live", index) is None
        with pytest.raises(StoreError, match="kb is in use by another process, or by another index in this one"):
            qdrant.point_alias("live", "kb")
        qdrant.snapshot(index, tmp_path / "open.snapshot")
        assert index.count() == 3, "it stays open"
        with pytest.raises(ArgumentError, match=r"collection 'kb' at .*qdrant is not at .*other"):
            other.point_alias("live", index)
    metadata = qdrant.peek("live")
    assert metadata is not None and metadata.fingerprint == CONFIG.fingerprint
    assert qdrant.point_alias("live", "kb") == "kb"
    qdrant.snapshot("kb", tmp_path / "closed.snapshot")
    for number, file in enumerate(("open.snapshot", "closed.snapshot")):
        other.restore(f"kb{number}", tmp_path / file)
    with closing(other.index("copy")) as copy:
        assert qdrant.copy("live", copy) == 3
    assert other.collections() == (["copy", "kb0", "kb1"], {})
    assert [other.index(name).count() for name in other.collections()[0]] == [3, 3, 3]
    qdrant.drop("kb")
    assert qdrant.collections() == ([], {})


def test_reindexing_in_one_call(model: d2llm.Model, tmp_path: Path) -> None:
    qdrant = Qdrant(tmp_path / "qdrant")
    documents = [{"_id": f"d{i}", "text": f"text number {i}", "year": i} for i in range(5)]
    report = qdrant.reindex("kb", model, documents, payload_indexes={"year": "integer"})
    assert report.added == 5 and qdrant.collections() == (["kb-1"], {"kb": "kb-1"})
    report = qdrant.reindex("kb", model, documents[:3], options={"quantization": "none"})
    assert report.added == 3 and qdrant.collections() == (["kb-2"], {"kb": "kb-2"})
    with qdrant.index("kb") as index:
        info = index.info()
    assert (info.passages, info.payload_indexes) == (3, {"year": "integer"})
    assert info.metadata.options.quantization == "none"


MOVED: dict[str, Callable[[QdrantIndex, Path], Any]] = {
    "collections": lambda index, folder: index.collections() == (["kb"], {}),
    "peek": lambda index, folder: index.peek().fingerprint == CONFIG.fingerprint,
    "point_alias": lambda index, folder: index.point_alias("live") is None and index.info().aliases == ["live"],
    "restore": lambda index, folder: index.beside("new").restore(folder / "snapshot") is None,
    "shared": lambda index, folder: not index.shared,
    "follows_aliases": lambda index, folder: not index.follows_aliases,
}


@pytest.mark.parametrize("verb", MOVED)
def test_verbs_that_an_index_had_work_and_warn(verb: str, tmp_path: Path) -> None:
    with filled(Qdrant(tmp_path / "qdrant"), "kb") as index:
        index.snapshot(tmp_path / "snapshot")
        new = {"follows_aliases": "shared"}.get(verb, verb)
        with pytest.warns(RenamedWarning, match=rf"QdrantIndex\.{verb} is called Qdrant\.{new} now"):
            assert MOVED[verb](index, tmp_path)


def test_generations_opened_in_the_old_way_work_and_warn(tmp_path: Path) -> None:
    qdrant = Qdrant(tmp_path / "qdrant")
    with pytest.warns(RenamedWarning, match=r"reindex\.open_generation is called Qdrant\.open_generation now"):
        index = reindex.open_generation(qdrant.index, "kb", CONFIG, options={"quantization": "none"})
    with index:
        index.upsert(make_points(2))
        with pytest.warns(RenamedWarning, match=r"reindex\.switch_over is called Qdrant\.switch_over now"):
            assert reindex.switch_over(qdrant.index, index, "kb", 2) is None
    assert qdrant.collections() == (["kb-1"], {"kb": "kb-1"})


FRAMEWORKS = {"haystack": "haystack", "langchain": "langchain_core", "llama_index": "llama_index.core"}


@pytest.mark.parametrize("module", ["place", "qdrant", "engine", "schema", *FRAMEWORKS])
def test_the_examples_run(module: str) -> None:
    if module in FRAMEWORKS:
        pytest.importorskip(FRAMEWORKS[module])
    done = doctest.testmod(importlib.import_module(f"d2llm.connectors.{module}"))
    assert done.attempted and not done.failed
