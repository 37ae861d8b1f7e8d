"""Reasons: they add up to the scores of a real model, and show the words that count."""

from collections.abc import Iterator

import numpy as np
import pytest
from passages import QUERY, TEXTS

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

import d2llm
from d2llm.connectors import Bm25Options, QdrantIndex
from d2llm.reasons import Reasons

WORDY = "the given object, and a LIST of seconds: 大人 given"
DOCUMENTS = [
    *({"id": id_, "text": text} for id_, text in TEXTS.items()),
    {"id": "titled", "text": "It keeps the order. Seconds, in seconds.", "title": "A given list"},
    {"id": "chinese", "text": "東京的大人。"},
    {"id": "long", "text": "A list of seconds. " * 100},
]


@pytest.fixture(scope="module")
def index(model: d2llm.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantIndex]:
    with QdrantIndex("reasons", tmp_path_factory.mktemp("qdrant"), options={"bm25": Bm25Options()}) as index:
        index.add(model, DOCUMENTS)
        yield index


def reasons(searcher: d2llm.Searcher, query: str, **options: object) -> Reasons:
    found = searcher.explain(query, 5, candidates=20, reasons=True, **options)  # type: ignore[arg-type]  # a test's
    assert found.reasons is not None
    scores = {(reason.hit.id, reason.hit.passage): reason.hit.score for reason in found.reasons.candidates}
    assert len(scores) == len(found.reasons.candidates) == found.candidates, "all candidates have reasons"
    for hit in found.hits:
        assert scores[hit.id, hit.passage] == pytest.approx(hit.score, abs=1e-4)
    return found.reasons


@pytest.mark.parametrize("task", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("query", [QUERY, WORDY])
@pytest.mark.parametrize("hybrid", [{}, {"hybrid": "rrf", "bm25_weight": 0.7}], ids=["cosine", "hybrid"])
def test_parts_add_up_to_scores_and_words_to_the_part_words(
    model: d2llm.Model, index: QdrantIndex, task: str, query: str, hybrid: dict[str, object]
) -> None:
    found = reasons(d2llm.Searcher(model, index), query, task=task, **hybrid)
    names = [*model.config.parts, *(["bm25"] if hybrid else [])]
    assert list(found.scales) == names
    iem = [reason.hit.score - reason.parts.get("bm25", 0) for reason in found.candidates]
    for rank, reason in enumerate(found.candidates, 1):
        assert reason.hit.recall_rank == rank
        assert list(reason.parts) == list(reason.values) == names
        assert sum(reason.parts.values()) == pytest.approx(reason.hit.score, abs=1e-4)
        assert sum(reason.words.values()) == pytest.approx(reason.parts["words"], abs=1e-4)
        for name in names:
            spread = np.std(iem) if name == "bm25" else 1
            assert reason.parts[name] == pytest.approx(found.scales[name] * spread * reason.values[name], abs=1e-4)


def test_marks_are_the_places_of_shared_words(model: d2llm.Model, index: QdrantIndex) -> None:
    found = {r.hit.id: r for r in reasons(d2llm.Searcher(model, index), WORDY).candidates}

    def marked(id_: str, field: str) -> list[str]:
        text = found[id_].hit.payload[field]
        return [text[mark.start : mark.end] for mark in found[id_].marks[field]]

    assert marked("titled", "title") == ["A", "given", "list"]
    assert marked("titled", "text") == ["the", "Seconds", ",", "seconds"]
    assert marked("chinese", "text") == ["大", "人"], "Chinese has no spaces between words"
    weights = {mark.weight for mark in found["titled"].marks["text"]}
    assert weights < set(found["titled"].words.values())
    assert {"given", "LIST", "seconds"} < found["titled"].words.keys()


def test_a_query_that_shares_no_word_and_one_without_rescoring(model: d2llm.Model, index: QdrantIndex) -> None:
    searcher = d2llm.Searcher(model, index)
    nothing = reasons(searcher, "zebra").candidates[0]
    assert (nothing.words, nothing.marks) == ({}, {})
    recalled = reasons(searcher, WORDY, rescore=False)
    assert recalled.scales == {"cosine": 1.0}
    assert [reason.parts["cosine"] for reason in recalled.candidates] == [
        reason.hit.recall_score for reason in recalled.candidates
    ]
    assert searcher.explain(QUERY).reasons is None
