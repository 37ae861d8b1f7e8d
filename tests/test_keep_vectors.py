"""Collections that keep the vectors of the program that made them: the old search and the new one run side by side."""
# ruff: noqa: E402  (what is asked for before the imports must come before them)

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

for writer in ("qdrant_client", "qdrant_edge", "langchain_qdrant"):
    pytest.importorskip(writer)

from langchain_core.embeddings import Embeddings
from langchain_qdrant import QdrantVectorStore
from passages import TEXTS
from qdrant_client import models
from qdrant_places import PLACES, Place, place_of
from qdrant_server import QdrantServer
from take_over import WIDTH, client_at, uuid_of, vector_of, write_langchain

import d2llm
from d2llm.cli import main
from d2llm.connectors import CollectionOptions, read_collection
from d2llm.connectors.engine import passages_in_graphs
from d2llm.errors import ArgumentError, MismatchError
from d2llm.indexing import digest_of

ROOT = Path(__file__).parents[1]
LONG = " ".join(f"Sentence {i} is about refunds of long orders." for i in range(40))
BODIES = [*TEXTS.values(), LONG]
FIELDS = [{"source": ["web", "book"][i % 2], "n": i} for i in range(len(BODIES))]


class Hashed(Embeddings):
    """The embedder of the old program."""

    def embed_query(self, text: str) -> list[float]:
        return vector_of(text)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [vector_of(text) for text in texts]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path_factory.mktemp("server"), version="1.20.0") as server:
        yield server


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, server: QdrantServer) -> Iterator[Place]:
    with place_of(request.param, tmp_path, server) as place:
        yield place


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Place]:
    with place_of("embedded", tmp_path) as place:
        yield place


def where(place: Place) -> dict[str, Any]:
    """Where the old collection is, for `QdrantClient`: on the server, or in a folder of local mode."""
    return {"path": f"{place.location}-local"} if place.embedded else {"url": place.location}


def source(place: Place) -> str:
    """The same for d2llm."""
    (location,) = where(place).values()
    return str(location)


def take_over(place: Place, model: Path, *arguments: str, new: str = "new", keep: bool = True) -> Result:
    line = ["index", str(model), "--from-collection", place.name("old"), "--from-qdrant", source(place)]
    line += ["--qdrant", place.location, "--collection", place.name(new), *["--keep-vectors"] * keep]
    port = str(place.options.get("grpc_port", 6334) or 0)
    return CliRunner().invoke(main, [*line, "--grpc-port", port, "--from-grpc-port", port, *arguments])


def old_hits(place: Place, name: str, **settings: Any) -> list[tuple[str, float, dict[str, Any]]]:
    """What LangChain's own search finds: text, score, metadata."""
    with client_at(where(place)) as client:
        store = QdrantVectorStore(client, place.name(name), Hashed(), **settings)
        web = models.FieldCondition(key="metadata.source", match=models.MatchValue(value="web"))
        found = store.similarity_search_with_score("a question", k=50)
        found += store.similarity_search_with_score(LONG, k=3, filter=models.Filter(must=[web]))
    added = {"_id", "_collection_name"}  # by LangChain
    return [
        (hit.page_content, score, {key: value for key, value in hit.metadata.items() if key not in added})
        for hit, score in found
    ]


NEW_NAMES = {"vector_name": "old", "content_payload_key": "text", "metadata_payload_key": "metadata"}


def assert_same_search(place: Place, name: str) -> None:
    """LangChain finds in the collection `name` what it finds in the old one; of a long text, the first passage."""
    before, after = old_hits(place, "old"), old_hits(place, name, **NEW_NAMES)
    assert len(before) == len(BODIES) + 3
    assert [hit[2] for hit in after] == [hit[2] for hit in before]
    np.testing.assert_allclose([hit[1] for hit in after], [hit[1] for hit in before], atol=1e-6)
    for (text, *_), (expected, *_) in zip(after, before, strict=True):
        assert text == expected or (expected == LONG and LONG.startswith(text) and len(text) > 50)


def kept_in(place: Place, name: str) -> dict[str, dict[str, list[float]]]:
    """The kept vectors of each document."""
    with place.again(name) as index:
        index.info()
        points = [point for page in index._engine.scroll(100, vectors=True) for point in page]
    heads = [point for point in points if point.payload["_d2llm"].get("passage", {"number": 0})["number"] == 0]
    assert all(not point.kept for point in points if point not in heads)
    return {point.payload["_d2llm"]["id"]: dict(point.kept) for point in heads}


def assert_kept(place: Place, name: str) -> None:
    kept = kept_in(place, name)
    assert kept.keys() == {uuid_of(i) for i in range(len(BODIES))}
    for i, text in enumerate(BODIES):
        expected = np.array(vector_of(text)) / np.linalg.norm(vector_of(text))
        np.testing.assert_allclose(kept[uuid_of(i)]["old"], expected, atol=1e-6)


def test_both_searches_run(place: Place, model: d2llm.Model, model_folder: Path, tmp_path: Path) -> None:
    write_langchain(where(place), place.name("old"), BODIES, FIELDS)
    done = take_over(place, model_folder)
    assert done.exit_code == 0, done.output
    assert f"kept: the vectors '' ({WIDTH}, Cosine), as 'old'" in done.stderr
    assert "The old search runs on" in done.stdout and "with the vector 'old'" in done.stdout
    assert_kept(place, "new")
    plain = place("plain")
    plain.add(model, read_collection(place.name("old"), source(place), **place.options))
    for question in ("How long does a refund take?", BODIES[3]):
        expected = d2llm.Searcher(model, plain).search(question)
        found = d2llm.Searcher(model, place.again("new")).search(question)
        assert [(hit.id, hit.payload, hit.passage) for hit in found] == [
            (hit.id, hit.payload, hit.passage) for hit in expected
        ]
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-4)
        plain = place.again("plain")
    if not place.embedded:
        assert_same_search(place, "new")
    again = json.loads(take_over(place, model_folder, "--json").stdout)
    assert (again["added"], again["unchanged"]) == (0, len(BODIES))


def test_copies_and_snapshots_keep_them(place: Place, model_folder: Path, tmp_path: Path) -> None:
    write_langchain(where(place), place.name("old"), BODIES, FIELDS)
    assert take_over(place, model_folder, "--hybrid").exit_code == 0
    port = ["--grpc-port", str(place.options.get("grpc_port", 6334) or 0)]
    line = ["collection", "migrate", place.name("new"), "--qdrant", place.location, *port, "--to"]
    here = [place.location, "--to-grpc-port", port[1], "--as"]
    copied = CliRunner().invoke(main, [*line, *here, place.name("copy"), "--no-hybrid"])
    assert copied.exit_code == 0, copied.output
    place.again("copy").snapshot(tmp_path / "snapshot")
    place.qdrant.restore(place.name("restored"), tmp_path / "snapshot")
    for name in ("copy", "restored"):
        assert_kept(place, name)
    folder = str(tmp_path / "folder")
    away = ["collection", "migrate", place.name("copy"), "--qdrant", place.location, *port, "--to", folder]
    assert CliRunner().invoke(main, away).exit_code == 0
    if not place.embedded:
        assert_same_search(place, "copy")
        back = [*line[:2], place.name("copy"), "--qdrant", folder, "--to", *here, place.name("back")]
        assert CliRunner().invoke(main, back).exit_code == 0
        assert_same_search(place, "back")
    without = CliRunner().invoke(main, [*line, *here, place.name("without"), "--no-keep-vectors"])
    assert without.exit_code == 0, without.output
    assert not any(kept_in(place, "without").values())
    info = place.again("without").info()
    assert info.metadata.options.kept == {} and info.documents == len(BODIES)


def test_an_embedded_collection_that_is_optimized(folder: Place, model: d2llm.Model, monkeypatch: Any) -> None:
    """Their graph is built too, what changes meanwhile keeps its vectors, and passages are counted once."""
    from d2llm.connectors import edge

    monkeypatch.setattr(edge, "INDEXING_THRESHOLD_KB", 1)
    rng = np.random.default_rng(0)
    documents = [
        d2llm.Document(str(i), f"Text {i}.", vectors={"old": rng.standard_normal(64).tolist()}) for i in range(300)
    ]
    index = folder("new", options={"kept": {"old": {"size": 64, "distance": "Dot"}}})
    index.add(model, documents)
    index.add(model, [{"id": "plain", "text": "Without a vector."}])
    build = edge._build_graph

    def build_and_change(shard: Path) -> None:
        build(shard)
        index.add(model, [replace(documents[7], text="Changed."), d2llm.Document("late", "Late.")])

    monkeypatch.setattr(edge, "_build_graph", build_and_change)
    index.optimize()
    info = index.info()
    assert info.passages == 302 and 0 < info.indexed <= 302
    kept = kept_in(folder, "new")
    assert kept["late"] == kept["plain"] == {}
    for document in documents:
        np.testing.assert_allclose(kept[document.id]["old"], document.vectors["old"], rtol=1e-6)


@pytest.mark.parametrize(
    ("indexed", "bm25", "kept", "expected"),
    [(0, None, 100, 0), (200, None, 100, 100), (125, None, 25, 100), (100, None, 100, 50), (300, {}, 100, 100),
     (100, {}, 100, 0), (100, None, 0, 100), (120, None, 0, 100)],
)  # fmt: skip
def test_how_many_passages_are_in_graphs(indexed: int, bm25: Any, kept: int, expected: int) -> None:
    assert passages_in_graphs(indexed, 100, CollectionOptions().changed({"bm25": bm25}), kept) == expected


def make(place: Place, dense: Any, points: Mapping[int, Any], sparse: Any = None) -> None:
    """A collection by hand: `points` are vectors by id."""
    with client_at(where(place)) as client:
        client.create_collection(place.name("old"), dense, sparse_vectors_config=sparse)
        structs = [models.PointStruct(id=i, vector=one, payload={"text": f"Text {i}."}) for i, one in points.items()]
        client.upsert(place.name("old"), structs)


def test_names_and_kinds(place: Place, model_folder: Path) -> None:
    """Names of d2llm's own vectors are not free. Sparse and multi-vectors are left out, and said to be."""
    params, several = models.VectorParams, models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    dense = {
        "recall": params(size=2, distance=models.Distance.DOT),
        "words": params(size=3, distance=models.Distance.EUCLID),
        "old-words": params(size=2, distance=models.Distance.MANHATTAN),
    }
    if place.embedded:
        dense["late"] = params(size=2, distance=models.Distance.COSINE, multivector_config=several)
    vectors: dict[str, Any] = {"recall": [1.0, 2.0], "words": [3.0, 4.0, 5.0], "old-words": [6.0, 7.0]}
    more = {"late": [[1.0, 0.0], [0.0, 1.0]]} if place.embedded else {}
    point = {**vectors, **more, "bm25": models.SparseVector(indices=[1], values=[1.0])}
    make(place, dense, {1: point}, {"bm25": models.SparseVectorParams()})
    done = take_over(place, model_folder, "--hybrid")
    assert done.exit_code == 0, done.output
    assert "kept: the vectors 'recall' (2, Dot), as 'old-recall'" in done.stderr
    assert "kept: the vectors 'words' (3, Euclid), as 'old-old-words'" in done.stderr
    assert "not kept: 'bm25', which has sparse vectors" in done.stderr
    assert ("not kept: 'late', which has multi-vectors" in done.stderr) == place.embedded
    expected = {"old-recall": [1.0, 2.0], "old-old-words": [3.0, 4.0, 5.0], "old-words": [6.0, 7.0]}
    assert kept_in(place, "new") == {"1": expected}


def test_a_point_that_lacks_one(folder: Place, model_folder: Path) -> None:
    params = models.VectorParams(size=2, distance=models.Distance.COSINE)
    make(folder, {"a": params, "b": params}, {1: {"a": [1.0, 0.0], "b": [0.0, 1.0]}, 2: {"a": [1.0, 0.0]}})
    stopped = take_over(folder, model_folder)
    assert stopped.exit_code == 1 and "collection old, point 2: it has no vector 'b' to keep" in stopped.stderr
    assert folder.names()[0] == []
    skipped = take_over(folder, model_folder, "--on-error", "skip")
    assert skipped.exit_code == 0 and "1 documents: 1 stored, 0 unchanged, 1 skipped" in skipped.stdout


def test_a_collection_without_dense_vectors(folder: Place, model_folder: Path) -> None:
    sparse = models.SparseVector(indices=[1], values=[1.0])
    make(folder, {}, {1: {"s": sparse}}, {"s": models.SparseVectorParams()})
    refused = take_over(folder, model_folder)
    assert (
        refused.exit_code == 1 and "has no dense vectors, which could be kept: leave --keep-vectors" in refused.stderr
    )
    assert take_over(folder, model_folder, keep=False).exit_code == 0


def test_it_is_fixed_when_the_collection_is_made(folder: Place, model_folder: Path, tmp_path: Path) -> None:
    write_langchain(where(folder), "old", BODIES, FIELDS)
    assert take_over(folder, model_folder).exit_code == 0
    assert take_over(folder, model_folder, new="plain", keep=False).exit_code == 0
    vectors = f"'old' ({WIDTH}, Cosine)"
    for new, keep, said in (("new", False, f"kept {vectors}, not none"), ("plain", True, f"kept none, not {vectors}")):
        refused = take_over(folder, model_folder, new=new, keep=keep)
        assert refused.exit_code == 1 and said in refused.stderr
        assert "give --keep-vectors if it was given when the collection was made, and only then" in refused.stderr
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "more", "text": "More."}\n')
    line = ["index", str(model_folder), str(corpus), "--qdrant", folder.location, "--collection", "new"]
    assert CliRunner().invoke(main, line).exit_code == 0  # a document that the old search does not find
    assert kept_in(folder, "new")["more"] == {}
    described = CliRunner().invoke(main, ["collection", "info", "new", "--qdrant", folder.location]).stdout
    assert re.search(rf"kept vectors +{re.escape(vectors)}", described)


def test_a_generation_has_those_of_its_own_run(folder: Place, model_folder: Path) -> None:
    write_langchain(where(folder), "old", BODIES, FIELDS)
    line = ["index", str(model_folder), "--from-collection", "old", "--from-qdrant", source(folder)]
    line += ["--qdrant", folder.location, "--alias", "live"]
    for number, keep in enumerate((True, False, True), 1):
        done = CliRunner().invoke(main, [*line, *["--keep-vectors"] * keep])
        assert done.exit_code == 0, done.output
        assert all(bool(kept) == keep for kept in kept_in(folder, f"live-{number}").values())


def test_without_a_collection_to_take_over(tmp_path: Path) -> None:
    line = ["index", "m", "corpus.jsonl", "--keep-vectors", "--qdrant", str(tmp_path), "--collection", "new"]
    refused = CliRunner().invoke(main, line)
    assert refused.exit_code == 2 and "--keep-vectors is for --from-collection" in " ".join(refused.stderr.split())


def test_vectors_in_python(folder: Place, model: d2llm.Model) -> None:
    write_langchain(where(folder), "old", BODIES, FIELDS)
    documents = list(read_collection("old", source(folder), keep_vectors=True))
    assert [len(document.vectors["old"]) for document in documents] == [WIDTH] * len(BODIES)
    assert d2llm.FlatIndex().add(model, documents).added == len(BODIES)
    with pytest.raises(MismatchError, match=r"'plain' at .* keeps no vectors 'old', and document .* has one"):
        folder("plain").add(model, documents)
    index = folder("narrow", options={"kept": {"old": {"size": 2, "distance": "Cosine"}}})
    with pytest.raises(MismatchError, match=rf"keeps vectors 'old' of size 2, that of document .* has size {WIDTH}"):
        index.add(model, documents)
    with pytest.raises(d2llm.DataError, match="document 'x': vector 'old' holds NaN or infinity"):
        index.add(model, [d2llm.Document("x", "X.", vectors={"old": [1.0, float("nan")]})])
    changed = replace(documents[0], vectors={"old": [1.0] * WIDTH})
    plain = replace(documents[0], vectors={})
    assert len({digest_of(document) for document in (documents[0], changed, plain)}) == 3
    float32 = replace(documents[0], vectors={"old": np.array(documents[0].vectors["old"], np.float32)})
    assert digest_of(float32) == digest_of(documents[0])


@pytest.mark.parametrize("kept", [
    {"recall": {"size": 2, "distance": "Dot"}}, {"words": {"size": 2, "distance": "Dot"}},
    {"": {"size": 2, "distance": "Dot"}}, {"a": {"size": 0, "distance": "Dot"}}, {"a": {"size": 2, "distance": "dot"}},
    {"a": {"size": "2", "distance": "Dot"}},
])  # fmt: skip
def test_options_that_are_not_possible(kept: Any) -> None:
    with pytest.raises(ArgumentError, match=r"kept vectors .* expected a name other than 'recall' and 'words'"):
        CollectionOptions().changed({"kept": kept})


@pytest.mark.parametrize("kept", [None, ["a"], {"a": 2}, {"a": {"size": 2}}])
def test_options_of_another_form(kept: Any) -> None:
    with pytest.raises(ArgumentError, match="kept must be a mapping such as"):
        CollectionOptions().changed({"kept": kept})


def test_the_line_of_the_docs() -> None:
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    for name, value in NEW_NAMES.items():
        assert f'{name}="{value}"' in text
