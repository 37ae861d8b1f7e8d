"""Tables of measures: a real model on small judged data, beside what the rankings and scores literally say."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from fusion_references import dbsf, rrf, with_words
from passages import TEXTS

import d2llm
from d2llm.beir import RetrievalData
from d2llm.bm25 import Bm25
from d2llm.errors import DataError
from d2llm.evaluate import (
    STAGES,
    TRAINING_QUERIES,
    Ranking,
    Retrieval,
    evaluate_pairs,
    evaluate_retrieval,
    retention,
    significance,
    tabulate,
    tabulate_queries,
    training_sample,
)
from d2llm.fusion import WEIGHTS
from d2llm.metrics import best_threshold, classification, evaluate, paired_test
from d2llm.pairs import Pair
from d2llm.types import Document, Task

QUERIES = {
    "q1": "how to combine two directory names",
    "q2": "wait a moment",
    "q3": "parse text with a pattern",
    "q4": "pick in random order",
}
QRELS = {"q1": {"join": 2, "split": 1}, "q2": {"sleep": 1}, "q3": {"regex": 1, "dumps": 0}, "q4": {"shuffle": 1}}
BACKWARDS = Ranking([list(reversed(TEXTS))] * 3 + [[]])


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return RetrievalData({id_: Document(id_, text) for id_, text in TEXTS.items()}, QUERIES, QRELS)


@pytest.fixture(scope="module")
def found(model: d2llm.Model, data: RetrievalData) -> Retrieval:
    return evaluate_retrieval(model, data, candidates=5, others={"backwards": BACKWARDS})


def test_each_stage_ranks_as_its_scores_say(model: d2llm.Model, found: Retrieval) -> None:
    documents = model.encode_document(list(TEXTS.values())).vectors
    for row, text in enumerate(QUERIES.values()):
        cosine = dict(zip(TEXTS, (documents @ model.encode_query([text]).vectors[0]).tolist(), strict=True))
        iem = dict(zip(TEXTS, model.score_pairs([text] * len(TEXTS), list(TEXTS.values())).tolist(), strict=True))
        nearest = sorted(TEXTS, key=lambda id_: -cosine[id_])[:5]
        assert found.rankings["recall"].ids[row] == nearest
        assert found.rankings["recall + IEM"].ids[row] == sorted(nearest, key=lambda id_: -iem[id_])
        assert found.rankings["exhaustive IEM"].ids[row] == sorted(TEXTS, key=lambda id_: -iem[id_])[:5]
    assert list(found.table) == list(found.rankings) == [*STAGES, "hybrid + IEM", "RRF", "DBSF", "backwards"]


# hybrid searches without an IEM


def lists_of(model: d2llm.Model, text: str, k: int) -> tuple[dict[str, float], dict[str, float]]:
    """The scores of the best by cosine and of the best by BM25, best first."""
    documents = model.encode_document(list(TEXTS.values())).vectors
    cosine = dict(zip(TEXTS, (documents @ model.encode_query([text]).vectors[0]).tolist(), strict=True))
    bm25 = dict(zip(TEXTS, Bm25(list(TEXTS.values())).scores(text).tolist(), strict=True))
    by_cosine = sorted(TEXTS, key=lambda id_: -cosine[id_])[:k]
    by_bm25 = [id_ for id_ in sorted(TEXTS, key=lambda id_: -bm25[id_])[:k] if bm25[id_] > 0]
    return {id_: cosine[id_] for id_ in by_cosine}, {id_: bm25[id_] for id_ in by_bm25}


def weighted(model: d2llm.Model, text: str, k: int, weight: float) -> list[str]:
    (by_cosine, by_bm25), (cosine, bm25) = lists_of(model, text, k), lists_of(model, text, len(TEXTS))
    ids = sorted(by_cosine.keys() | by_bm25.keys())
    words = np.array([bm25.get(id_, 0.0) for id_ in ids], np.float32)
    scores = with_words(np.array([cosine[id_] for id_ in ids], np.float32), words, weight)
    return [id_ for _, id_ in sorted(zip(scores, ids, strict=True), reverse=True)][:k]


def test_cosine_and_bm25_are_fused_as_qdrant_does(model: d2llm.Model, found: Retrieval) -> None:
    for row, text in enumerate(QUERIES.values()):
        by_cosine, by_bm25 = lists_of(model, text, 5)
        for name, reference in (("RRF", rrf), ("DBSF", dbsf)):
            fused = {id_: round(score, 6) for id_, score in reference(by_cosine, by_bm25).items()}
            order = sorted(fused, key=lambda id_: (-fused[id_], -by_cosine.get(id_, -1)))
            assert found.rankings[name].ids[row] == order[:5]
    assert found.bm25_weight is None


def test_a_hybrid_search_with_the_iem_rescores_the_candidates_of_rrf(
    model: d2llm.Model, data: RetrievalData, found: Retrieval
) -> None:
    for row, text in enumerate(QUERIES.values()):
        candidates = found.rankings["RRF"].ids[row]
        contents = [data.documents[id_].content for id_ in candidates]
        scores = dict(zip(candidates, model.score_pairs([text] * len(candidates), contents).tolist(), strict=True))
        assert found.rankings["hybrid + IEM"].ids[row] == sorted(candidates, key=lambda id_: -scores[id_])


def test_the_weight_of_bm25_is_the_best_on_the_training_queries(model: d2llm.Model, data: RetrievalData) -> None:
    questions = {"t1": "join two directory names", "t2": "turn an object into a string of numeric data"}
    weights = []
    for relevant in (["join", "dumps"], ["split", "median"]):  # the best by cosine, and the best by BM25
        qrels = {query: {id_: 1} for query, id_ in zip(questions, relevant, strict=True)}
        training = RetrievalData(data.documents, questions, qrels)
        found = evaluate_retrieval(model, data, candidates=3, training=training)
        ndcg = {}
        for weight in WEIGHTS:
            ranking = Ranking([weighted(model, text, 3, weight) for text in questions.values()])
            ndcg[weight] = evaluate(ranking.run(questions), qrels)["nDCG@10"]
        best = max(WEIGHTS, key=lambda weight: (ndcg[weight], -weight))
        assert found.bm25_weight == best
        expected = [weighted(model, text, 3, best) for text in QUERIES.values()]
        assert found.rankings["cosine + BM25"].ids == expected
        assert list(found.table) == [*STAGES, "hybrid + IEM", "RRF", "DBSF", "cosine + BM25"]
        weights.append(best)
    assert weights[0] == 0 < weights[1]


def beir_folder(folder: Path, train: dict[str, str], judgements: list[str]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": id_, "text": text}) for id_, text in TEXTS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    rows = [json.dumps({"_id": id_, "text": text}) for id_, text in train.items()]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    (folder / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judgements]))
    return folder


def test_the_sample_of_training_queries_holds_nothing_measured(tmp_path: Path, data: RetrievalData) -> None:
    texts = {f"t{i}": f"question {i}" for i in range(400)} | {"m": QUERIES["q1"], "irrelevant": "another"}
    judgements = [f"{query}\tjoin\t{int(query != 'irrelevant')}" for query in texts]
    folder = beir_folder(tmp_path, texts, judgements)
    sample = training_sample(folder, data)
    assert len(sample.queries) == len(sample.qrels) == TRAINING_QUERIES == 300
    assert sample.queries.items() <= texts.items() and not sample.queries.keys() & {"m", "irrelevant"}
    assert sample.queries == training_sample(folder, data).queries, "always the same"
    assert list(sample.queries) != list(texts)[:300]
    measured = RetrievalData.load(folder, "train")
    with pytest.raises(DataError, match="the split train has 402 queries, but all of them are measured, or have no"):
        training_sample(folder, measured)


# queries that are documents


ARGUED = {"join": {"split": 1}, "sleep": {"regex": 1, "sleep": 0}, "median": {"dumps": 1}, "shuffle": {"shuffle": 1}}
"""As in ArguAna each query is a document of the same id, but for `shuffle`: it is judged relevant to itself."""


def as_beir_ranks(model: d2llm.Model, k: int) -> dict[str, dict[str, dict[str, float]]]:
    """Runs of recall alone and of the IEM over everything by BEIR's code for exact search and for evaluation: fetch one
    more, leave out what has the query's id."""
    runs: dict[str, dict[str, dict[str, float]]] = {"recall": {}, "exhaustive IEM": {}}
    documents = model.encode_document(list(TEXTS.values())).vectors
    for query in ARGUED:
        text = TEXTS[query]
        cosine = (documents @ model.encode_query([text]).vectors[0]).tolist()
        iem = model.score_pairs([text] * len(TEXTS), list(TEXTS.values())).tolist()
        for name, scores in (("recall", cosine), ("exhaustive IEM", iem)):
            best = sorted(zip(TEXTS, scores, strict=True), key=lambda pair: -pair[1])[: k + 1]
            if query != "shuffle":
                best = [(id_, score) for id_, score in best if id_ != query]
            runs[name][query] = dict(best[:k])
    return runs


@pytest.mark.parametrize("recall", [1, 3, 100])
def test_the_document_that_is_the_query_is_left_out_as_beir_does(model: d2llm.Model, recall: int) -> None:
    documents = {id_: Document(id_, text) for id_, text in TEXTS.items()}
    data = RetrievalData(documents, {id_: TEXTS[id_] for id_ in ARGUED}, ARGUED)
    found = evaluate_retrieval(model, data, candidates=recall)
    for row in ("recall", "exhaustive IEM"):
        run = as_beir_ranks(model, recall)[row]
        assert found.rankings[row].ids == [list(ranked) for ranked in run.values()]
        expected = evaluate(run, ARGUED)
        assert {name: found.table[row][name] for name in expected} == pytest.approx(expected)
    for row, ranking in found.rankings.items():
        for query, ids in zip(ARGUED, ranking.ids, strict=True):
            assert len(ids) == min(recall, len(TEXTS) - (query != "shuffle")), row
            assert query == "shuffle" or query not in ids, row
    assert all("shuffle" in ranking.ids[3][:1] for ranking in found.rankings.values()), "it answers itself best"


# further rows


def test_further_rows_are_measured_as_they_are(found: Retrieval) -> None:
    assert found.rankings["backwards"] is BACKWARDS
    row = found.table["backwards"]
    assert row["MRR@10"] == pytest.approx((1 / 7 + 1 / 6 + 1) / 4), "q4 has no results and counts as 0"
    exact = found.rankings["exhaustive IEM"].ids
    assert row["overlap@10"] == pytest.approx(3 / 4), "all eight texts hold any five, and none holds none"
    assert all(len(ids) == 5 for ids in exact)


def test_the_measures_of_the_queries_average_to_the_table(found: Retrieval, data: RetrievalData) -> None:
    tables = tabulate_queries(found.rankings, data)
    assert list(tables) == list(QUERIES)
    for row, measures in found.table.items():
        for measure, value in measures.items():
            if measure != "overlap@10":
                assert statistics.mean(table[row][measure] for table in tables.values()) == pytest.approx(value)


@pytest.mark.parametrize("scores", [[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 2.0]])
def test_a_run_is_ordered_as_trec_eval_orders_it(scores: list[float]) -> None:
    run = {"q1": dict(zip(["b", "d", "a", "c"], scores, strict=True))}
    for relevant in "abcd":
        qrels = {"q1": {relevant: 1}, "q2": {"a": 1}}
        ranking = Ranking.of(run, qrels)
        found, expected = evaluate(ranking.run(qrels), qrels), evaluate(run, qrels)
        assert (found["nDCG@10"], found["MAP"]) == (expected["nDCG@10"], expected["MAP"])
        assert found["MRR@10"] == found["MAP"], "one relevant document; ir-measures itself cuts ties for RR@k otherwise"
    assert [len(ids) for ids in ranking.ids] == [4, 0]


def test_every_row_is_tested_against_the_baseline(found: Retrieval, data: RetrievalData) -> None:
    for baseline in ("recall", "backwards"):
        tests = significance(found.rankings, data, baseline)
        assert list(tests) == [row for row in found.rankings if row != baseline]
        for row, test in tests.items():
            difference = found.table[row]["nDCG@10"] - found.table[baseline]["nDCG@10"]
            assert test["difference"] == pytest.approx(difference)
    tables = tabulate_queries(found.rankings, data).values()
    values, others = ([table[row]["nDCG@10"] for table in tables] for row in ("recall", "backwards"))
    assert tests["recall"] == paired_test(values, others)
    with pytest.raises(ValueError, match="no row 'teacher': the rows are BM25, recall, recall \\+ IEM"):
        significance(found.rankings, data, "teacher")


def test_retention_is_in_percent_of_the_teacher(found: Retrieval) -> None:
    kept = retention(found.table, "recall")
    assert kept["recall"] == 100
    assert kept["backwards"] == pytest.approx(
        100 * found.table["backwards"]["nDCG@10"] / found.table["recall"]["nDCG@10"]
    )
    with pytest.raises(ValueError, match="no row 'teacher': the rows are BM25"):
        retention(found.table, "teacher")
    with pytest.raises(DataError, match="the teacher 'none' has nDCG@10 0"):
        retention({**found.table, "none": {"nDCG@10": 0.0}}, "none")


def test_a_table_can_be_made_of_any_rankings(found: Retrieval, data: RetrievalData) -> None:
    rankings = {name: found.rankings[name] for name in ("backwards", "exhaustive IEM")}
    assert tabulate(rankings, list(QUERIES), data) == {name: found.table[name] for name in rankings}


# pairs


def scores_of(model: d2llm.Model, pairs: list[Pair], task: Task) -> dict[str, list[float]]:
    """Each pair scored by itself."""
    iem = [float(model.score_pairs([pair.text_a], [pair.text_b], task)[0]) for pair in pairs]
    cosine = [
        float(model.encode_query([pair.text_a]).vectors[0] @ model.encode_document([pair.text_b]).vectors[0])
        for pair in pairs
    ]
    return {"cosine": cosine, "IEM": iem}


def ranks(values: list[float]) -> list[float]:
    """Mean rank of each value, literally."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def neighbours(judgements: list[float] | list[bool]) -> list[Pair]:
    texts = list(TEXTS.values())
    labelled = isinstance(judgements[0], bool)
    return [
        Pair(a, b, **({"label": bool(value)} if labelled else {"score": value}))
        for a, b, value in zip(texts, texts[1:], judgements, strict=False)
    ]


@pytest.mark.parametrize("task", ["symmetric", "asymmetric"])
def test_scored_pairs_are_measured_by_the_usual_correlations(model: d2llm.Model, task: Task) -> None:
    gold = [0.0, 1.0, 1.0, 5.0, 2.0, 3.0, 2.0]
    pairs = neighbours(gold)
    table = evaluate_pairs(model, pairs, task)
    for row, scores in scores_of(model, pairs, task).items():
        assert table[row]["Pearson"] == pytest.approx(statistics.correlation(scores, gold), abs=1e-6)
        assert table[row]["Spearman"] == pytest.approx(statistics.correlation(ranks(scores), ranks(gold)), abs=1e-6)


def test_labelled_pairs_are_classified_with_the_best_threshold_on_themselves(model: d2llm.Model) -> None:
    labels = [True, False, False, True, False, True, False]
    pairs = neighbours(labels)
    for row, scores in scores_of(model, pairs, "symmetric").items():
        expected = classification(scores, labels, best_threshold(scores, labels))
        assert evaluate_pairs(model, pairs)[row] == pytest.approx(expected, rel=1e-5)


def test_the_threshold_can_come_from_other_pairs(model: d2llm.Model) -> None:
    pairs, others = neighbours([True, False, False, True, False, True, False]), neighbours([False, True, True])
    table = evaluate_pairs(model, pairs, threshold_pairs=others)
    for row, scores in scores_of(model, others, "symmetric").items():
        threshold = best_threshold(scores, [False, True, True])
        assert table[row]["threshold"] == pytest.approx(threshold, rel=1e-5)
        assert table[row]["AP"] == evaluate_pairs(model, pairs)[row]["AP"], "needs no threshold"


def test_scores_and_labels_do_not_mix(model: d2llm.Model) -> None:
    scored, labelled = neighbours([1.0, 2.0]), neighbours([True, False])
    with pytest.raises(ValueError, match="expected a label on every pair: 2 of 4 have none"):
        evaluate_pairs(model, [*scored, *labelled])
    with pytest.raises(ValueError, match="expected a label on every pair: 2 of 2 have none"):
        evaluate_pairs(model, labelled, threshold_pairs=scored)
    with pytest.raises(DataError, match="all 2 pairs have the same label"):
        evaluate_pairs(model, neighbours([True, True]))
