"""Searches of an embedded collection keep what they read of points. They find the same, whatever is written."""

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("qdrant_edge")

from qdrant_places import CONFIG, H, N, assert_same, make_points, query_vector

import d2llm
from d2llm.connectors import QdrantIndex, cache
from d2llm.errors import ChangedError
from d2llm.flat import FlatIndex
from d2llm.index import Index
from d2llm.types import Candidates, Passage, Point


@pytest.fixture
def index(tmp_path: Path) -> QdrantIndex:
    index = QdrantIndex("docs", tmp_path / "qdrant", options={"bm25": {}})
    index.open_for(CONFIG)
    return index


def lean(index: Index, limit: int = 50, seed: int = 7, **more: Any) -> Candidates:
    """What a searcher asks for first, completed."""
    (found,) = index.recall_many([query_vector(seed)], limit, payloads=False, **more)
    return index.with_payloads(found, range(len(found)))


def test_candidates_without_payloads_are_those_with_them(index: QdrantIndex) -> None:
    index.upsert(make_points())
    variants: list[dict[str, Any]] = [{}, {"filter": {"lang": "en"}}]
    for seed in (1, 2, 1, 3, 2):  # some are known already
        for more in variants:
            assert_same(lean(index, seed=seed, **more), index.recall(query_vector(seed), 50, **more))
        text = f"text {seed}"
        found = lean(index, N, seed=seed, query_texts=[text])
        expected = index.recall(query_vector(seed), N, query_text=text)
        assert_same(found, expected)
        assert found.bm25_scores is not None and expected.bm25_scores is not None
        assert found.bm25_scores.tolist() == expected.bm25_scores.tolist()
    assert lean(index, filter={"lang": "none"}).ids == []


def test_what_is_written_is_seen_at_once(index: QdrantIndex) -> None:
    rng, oracle = random.Random(0), FlatIndex()
    oracle.open_for(CONFIG)
    for version in range(12):
        points = [point for point in make_points(60, seed=version) if rng.random() < 0.5]
        gone = [f"doc {i}" for i in range(60) if rng.random() < 0.2]
        for each in (index, oracle):
            each.upsert(points)
            each.delete(gone)
        if version == 5:
            index.optimize()
        if version == 8:
            index.close()
        assert_same(lean(index, 100, seed=version), oracle.recall(query_vector(version), 100))
    index.delete_where({"lang": "en"})
    assert not set(lean(index, 100).ids) & {f"doc {i}" for i in range(0, 60, 3)}


def test_a_full_cache_forgets_what_it_took_in_first(index: QdrantIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.upsert(make_points())
    monkeypatch.setattr(cache, "CACHE_BYTES", 40 * (cache.HEAD_BYTES + H))
    index.close()
    rng = random.Random(0)
    for _ in range(30):
        seed, limit = rng.randrange(5), rng.choice([5, 20, 39, 40, 41, N])  # more than it holds are read whole
        assert_same(lean(index, limit, seed=seed), index.recall(query_vector(seed), limit))
    assert len(index._engine._cache) <= 40


@pytest.mark.parametrize("most", [N, 40])
def test_a_warm_index_reads_no_features(index: QdrantIndex, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    index.upsert(make_points())
    monkeypatch.setattr(cache, "CACHE_BYTES", most * (cache.HEAD_BYTES + H))
    index.close()
    lean(index, 20)
    index.warm()
    known = index._engine._cache
    assert len(known) == most
    monkeypatch.setattr(known, "keep", None)  # nothing more is to be read
    if most == N:
        assert_same(lean(index), index.recall(query_vector(), 50))
    monkeypatch.undo()
    index.upsert(make_points(30, seed=1))
    index.warm()
    assert_same(lean(index, 40), index.recall(query_vector(), 40))


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_document_that_changes_between_the_steps_of_a_search(index: QdrantIndex, change: str) -> None:
    old, new = make_points(20)[3], make_points(20, seed=1)[3]
    index.upsert(make_points(20))
    (found,) = index.recall_many([old.vector], 5, payloads=False)
    index.upsert([new]) if change == "replaced" else index.delete([old.id])
    with pytest.raises(ChangedError, match=r"a document in collection 'docs' at .* was replaced during a search"):
        index.with_payloads(found, range(5))
    others = index.with_payloads(found, [1, 2])
    assert others.payloads == [index.get([id_])[id_] for id_ in others.ids]


def test_a_search_goes_on_while_documents_change(model: d2llm.Model, tmp_path: Path) -> None:
    """Hits are always of one version: the text of a hit is the one that its score belongs to."""
    texts = {version: [f"{version} number {i} of some words" for i in range(40)] for version in ("old", "new")}
    documents = {v: [{"_id": str(i), "text": text, "version": v} for i, text in enumerate(texts[v])] for v in texts}
    with QdrantIndex("docs", tmp_path / "qdrant") as index:
        index.add(model, documents["old"])
        searcher, done = d2llm.Searcher(model, index), threading.Event()

        def write() -> None:
            for turn in range(6):
                index.add(model, documents["new" if turn % 2 == 0 else "old"])
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not done.is_set():
            hits = searcher.search("number 7 of some words", k=10, candidates=20)
            vectors = model.encode_document([hit.payload["text"] for hit in hits]).vectors
            cosines = vectors @ model.encode_query(["number 7 of some words"]).vectors[0]
            np.testing.assert_allclose([hit.recall_score for hit in hits], cosines, atol=1e-4)
        writer.join()


def test_passages_have_their_places(index: QdrantIndex) -> None:
    rng = np.random.default_rng(0)
    points = []
    for number in range(3):
        vector = rng.standard_normal(CONFIG.embedding_dim).astype(np.float32)
        passage = Passage(number, 3, 10 * number, 10 * number + 6, "Heading")
        payload = {"text": f"part {number}"}
        points.append(Point("long", vector, rng.integers(256, size=H, dtype=np.uint8), payload, "1", passage))
    index.upsert([*points, *make_points(5)])
    for _ in range(2):
        found = lean(index, 8)
        assert_same(found, index.recall(query_vector(), 8))
        assert found.passages == index.recall(query_vector(), 8).passages
        assert [passage for passage in found.passages if passage is not None]
