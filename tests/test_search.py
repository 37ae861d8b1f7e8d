"""Searcher and evaluation: real model, flat index as the truth."""

from typing import Any

import numpy as np
import pytest
from passages import QUERY, TEXTS

import d2llm
from d2llm.beir import RetrievalData
from d2llm.errors import ArgumentError, DataError, StoreError
from d2llm.evaluate import evaluate_retrieval
from d2llm.search import Searcher, SearchOptions
from d2llm.types import Document


@pytest.fixture(scope="module")
def index(model: d2llm.Model) -> d2llm.FlatIndex:
    flat = d2llm.FlatIndex()
    flat.add(model, [Document(id_, text, payload={"length": len(text)}) for id_, text in TEXTS.items()])
    return flat


def exhaustive(model: d2llm.Model, query: str, task: d2llm.types.Task = "asymmetric") -> list[str]:
    scores = model.score_pairs([query] * len(TEXTS), list(TEXTS.values()), task)
    return [list(TEXTS)[i] for i in np.argsort(-scores, kind="stable")]


@pytest.mark.parametrize("task", ["symmetric", "asymmetric"])
def test_recalling_everything_gives_the_order_of_exhaustive_scoring(
    model: d2llm.Model, index: d2llm.FlatIndex, task: d2llm.types.Task
) -> None:
    hits = Searcher(model, index).search(QUERY, k=8, candidates=8, task=task)
    assert [hit.id for hit in hits] == exhaustive(model, QUERY, task)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_without_rescoring_hits_come_in_order_of_cosine(model: d2llm.Model, index: d2llm.FlatIndex) -> None:
    hits = Searcher(model, index).search(QUERY, k=5, candidates=5, rescore=False)
    cosines = model.encode_document(list(TEXTS.values())).vectors @ model.encode_query([QUERY]).vectors[0]
    assert [hit.id for hit in hits] == [list(TEXTS)[i] for i in np.argsort(-cosines)[:5]]
    assert [hit.recall_rank for hit in hits] == [1, 2, 3, 4, 5]
    assert all(hit.score == hit.recall_score for hit in hits)


def test_rescoring_changes_the_order_of_recalled_candidates_only(model: d2llm.Model, index: d2llm.FlatIndex) -> None:
    searcher = Searcher(model, index)
    recalled = [hit.id for hit in searcher.search(QUERY, k=4, candidates=4, rescore=False)]
    rescored = searcher.search(QUERY, k=4, candidates=4)
    assert sorted(hit.id for hit in rescored) == sorted(recalled)
    assert [recalled[hit.recall_rank - 1] for hit in rescored] == [hit.id for hit in rescored]


def test_a_hit_carries_its_document(model: d2llm.Model, index: d2llm.FlatIndex) -> None:
    hit = Searcher(model, index).search(QUERY, k=1, candidates=8)[0]
    assert hit.payload == {"text": TEXTS[hit.id], "length": len(TEXTS[hit.id])}


def test_a_filter_holds_for_every_hit(model: d2llm.Model, index: d2llm.FlatIndex) -> None:
    searcher = Searcher(model, index)
    hits = searcher.search(QUERY, k=8, candidates=8, filter={"length": {"lt": 46}})
    assert {hit.id for hit in hits} == {id_ for id_, text in TEXTS.items() if len(text) < 46}
    assert searcher.search(QUERY, k=8, candidates=8, filter={"length": 7}) == []


def test_an_explanation_times_each_stage_and_tells_of_a_cut_query(model: d2llm.Model, index: d2llm.FlatIndex) -> None:
    found = Searcher(model, index).explain("word " * 200, 3, candidates=5)
    assert list(found.seconds) == ["tokenise", "encode", "recall", "rescore"]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.truncated and found.candidates == 5
    assert not Searcher(model, index).explain(QUERY, 3, candidates=5).truncated


def test_documents_that_something_else_found_are_ranked_as_a_search_ranks_them(
    model: d2llm.Model, index: d2llm.FlatIndex
) -> None:
    searcher = Searcher(model, index)
    some = list(TEXTS)[::2]
    hits = searcher.search(QUERY, k=8, candidates=8)
    ranked = searcher.rerank(QUERY, [*some, "never stored", some[0]])
    assert [(hit.id, hit.payload) for hit in ranked] == [(hit.id, hit.payload) for hit in hits if hit.id in some]
    scores = [hit.score for hit in hits if hit.id in some]
    assert [hit.score for hit in ranked] == pytest.approx(scores, abs=1e-4)
    assert [hit.id for hit in searcher.rerank(QUERY, TEXTS, "symmetric")] == exhaustive(model, QUERY, "symmetric")
    assert searcher.rerank(QUERY, ["never stored"]) == []
    with pytest.raises(DataError, match="the query is empty"):
        searcher.rerank(" ", some)


def test_a_searcher_needs_an_index(model: d2llm.Model) -> None:
    with pytest.raises(TypeError, match="expected an index, such as QdrantIndex or FlatIndex; found 'kb'"):
        Searcher(model, "kb")  # type: ignore[arg-type]  # the wrong type is what is tested


def test_wrong_arguments_are_named(model: d2llm.Model, index: d2llm.FlatIndex) -> None:
    searcher = Searcher(model, index)
    with pytest.raises(ValueError, match="k=20, candidates=10"):
        searcher.search(QUERY, k=20, candidates=10)
    with pytest.raises(ValueError, match="k=0"):
        searcher.search(QUERY, k=0)
    with pytest.raises(ArgumentError, match=r"expected k to be a whole number, found 1\.5"):
        searcher.search(QUERY, k=1.5)  # type: ignore[arg-type]  # that is what the test is about
    assert type(SearchOptions(k=np.int64(3)).k) is int  # type: ignore[arg-type]  # numpy's numbers are taken
    with pytest.raises(DataError, match="query is empty"):
        searcher.search("  ")
    with pytest.raises(TypeError, match=r"expected one query as a string, found \['a'\]"):
        searcher.search(["a"])  # type: ignore[arg-type]  # the wrong type is what is tested
    with pytest.raises(ValueError, match="unknown task 'both'"):
        searcher.search(QUERY, task="both")  # type: ignore[arg-type]  # the wrong type is what is tested
    with pytest.raises(ValueError, match=r"filter on 'year'.*gte"):
        searcher.search(QUERY, filter={"year": {"above": 3}})


def test_searching_an_empty_index_says_so(model: d2llm.Model) -> None:
    with pytest.raises(StoreError, match="index is empty: add documents first"):
        Searcher(model, d2llm.FlatIndex()).search(QUERY)


def test_adding_again_encodes_only_what_changed(model: d2llm.Model) -> None:
    index = d2llm.FlatIndex()
    documents = [{"_id": id_, "text": text} for id_, text in TEXTS.items()]
    assert index.add(model, documents).added == len(TEXTS)
    documents[2]["text"] = "Wait for some seconds."
    report = index.add(model, [*documents, {"_id": "new", "text": "A new one."}])
    assert (report.added, report.unchanged) == (2, len(TEXTS) - 1)
    assert index.get(["sleep"])["sleep"]["text"] == "Wait for some seconds."


def test_adding_counts_cut_documents_and_refuses_bad_ones(model: d2llm.Model) -> None:
    index = d2llm.FlatIndex()
    long = [{"_id": "long", "text": "word " * 500}, {"_id": "short", "text": "word"}]
    assert index.add(model, long, chunk=False).truncated == 1
    bad: list[tuple[dict[str, Any], str]] = [
        ({"_id": "a", "text": " "}, "document 'a' is empty"),
        ({"text": "no id"}, 'document 1: expected an "_id"'),
        ({"_id": "a", "text": "x", "_d2llm": 1}, "'_d2llm': d2llm reserves this name"),
        ({"_id": "a", "text": "x", "when": object()}, "field 'when': JSON has no type object"),
    ]
    for document, message in bad:
        with pytest.raises(DataError, match=message):
            index.add(model, [document])
    surrogate = "cut emoji \ud83d"
    for unwritable, message in [
        (Document("a", surrogate), "document 'a': field 'text': it cannot be written as UTF-8"),
        (Document("a", "x", title=surrogate), "document 'a': field 'title': it cannot be written as UTF-8"),
        (Document(surrogate, "x"), r"document 'cut emoji \\ud83d': field 'id': it cannot be written as UTF-8"),
    ]:
        with pytest.raises(DataError, match=message):
            index.add(model, [unwritable])
    with pytest.raises(DataError, match="duplicate id 'a'"):
        index.add(model, [{"_id": "a", "text": "x"}, {"_id": "b", "text": "y"}, {"_id": "a", "text": "z"}])
    assert index.count() == 2


def test_adding_what_is_no_list_of_documents_is_refused(model: d2llm.Model) -> None:
    index: Any = d2llm.FlatIndex()
    for single in ("corpus.jsonl", {"_id": "a", "text": "x"}, Document("a", "x")):
        with pytest.raises(TypeError, match=r"expected a list of documents, found a single one: pass \[document\]"):
            index.add(model, single)
    with pytest.raises(TypeError, match="document 2: expected a Document or a mapping, found 'x'"):
        index.add(model, [Document("a", "x"), "x"])
    with pytest.raises(TypeError, match="document 12: expected its id to be a string, found 12"):
        index.add(model, [Document(12, "x")])  # type: ignore[arg-type]  # the wrong type is what is tested
    assert index.count() == 0


def test_the_evaluation_agrees_with_searching_query_by_query(model: d2llm.Model, index: d2llm.FlatIndex) -> None:
    queries = {"q1": QUERY, "q2": "wait a moment", "q3": "parse text with a pattern"}
    qrels = {"q1": {"join": 1}, "q2": {"sleep": 1}, "q3": {"regex": 1, "split": 1}}
    data = RetrievalData({id_: Document(id_, text) for id_, text in TEXTS.items()}, queries, qrels)
    found = evaluate_retrieval(model, data, candidates=4)
    searcher = Searcher(model, index)
    for row, rescore in (("recall", False), ("recall + IEM", True)):
        searched = [
            [h.id for h in searcher.search(text, 4, candidates=4, rescore=rescore)] for text in queries.values()
        ]
        assert found.rankings[row].ids == searched
        ranks = [
            next((i for i, id_ in enumerate(ids, 1) if id_ in qrels[q]), 0)
            for q, ids in zip(qrels, searched, strict=True)
        ]
        assert found.table[row]["MRR@10"] == pytest.approx(sum(1 / rank for rank in ranks if rank) / 3)
    assert found.table["exhaustive IEM"]["overlap@10"] == 1.0


def test_the_evaluation_splits_long_documents_as_an_index_does(model: d2llm.Model) -> None:
    names = list(TEXTS)
    filler = " The weather is fine." * model.config.document_max_length
    documents = {
        f"{first}+{last}": Document(f"{first}+{last}", f"{TEXTS[first]}{filler} {TEXTS[last]}", title="Python")
        for first, last in zip(names[::2], names[1::2], strict=False)
    }
    relevant = {last: id_ for id_ in documents for last in [id_.split("+")[1]]}
    queries = {f"q:{last}": TEXTS[last] for last in relevant}
    data = RetrievalData(documents, queries, {f"q:{last}": {id_: 1} for last, id_ in relevant.items()})
    index = d2llm.FlatIndex()
    report = index.add(model, documents.values())
    assert report.split == len(documents) < report.passages
    for candidates in (3, 50):
        found = evaluate_retrieval(model, data, candidates=candidates)
        assert found.passages == report.passages
        for row, rescore in (("recall", False), ("recall + IEM", True)):
            searcher = Searcher(model, index, rescore=rescore)
            for text, ids in zip(queries.values(), found.rankings[row].ids, strict=True):
                assert ids == [hit.id for hit in searcher.search(text, len(ids), candidates=candidates)]
    cut = evaluate_retrieval(model, data, candidates=50, chunk=False)
    assert cut.passages == len(documents)
    for row in ("recall", "exhaustive IEM"):
        assert found.table[row]["MRR@10"] > cut.table[row]["MRR@10"] + 0.2, "what answers is in the second half"


@pytest.mark.parametrize("weight", [-0.1, 1e7, float("nan"), float("inf")])
def test_a_weight_of_words_that_is_no_weight_is_refused(model: d2llm.Model, weight: float) -> None:
    with pytest.raises(ValueError, match=r"bm25_weight from 0 to 1,000,000, found (-0\.1|10000000\.0|nan|inf)"):
        Searcher(model, d2llm.FlatIndex(), bm25_weight=weight)
