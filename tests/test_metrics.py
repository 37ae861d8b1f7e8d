"""Measures against their definitions in loops."""

import itertools
import math
import random
import statistics

import pytest
import scipy.stats
import sklearn.metrics

from d2llm.errors import DataError
from d2llm.metrics import (
    best_threshold,
    classification,
    correlations,
    evaluate,
    evaluate_each,
    overlap,
    paired_test,
    per_query,
)

Run = dict[str, dict[str, float]]
Qrels = dict[str, dict[str, int]]


def literal_measures(run: Run, qrels: Qrels) -> dict[str, float]:
    found = dict.fromkeys(["nDCG@10", "MRR@10", "Recall@10", "Recall@100", "MAP"], 0.0)
    for query, judged in qrels.items():
        scores = run.get(query, {})
        ranking = sorted(scores, key=lambda document: -scores[document])
        relevant = {document for document, grade in judged.items() if grade > 0}
        for rank, document in enumerate(ranking[:10], 1):
            if document in relevant:
                found["MRR@10"] += 1 / rank
                break
        gain = sum(
            judged.get(document, 0) / math.log2(rank + 1)
            for rank, document in enumerate(ranking[:10], 1)
            if judged.get(document, 0) > 0
        )
        best = sorted((grade for grade in judged.values() if grade > 0), reverse=True)[:10]
        ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(best, 1))
        if relevant:
            found["nDCG@10"] += gain / ideal
            for k in (10, 100):
                found[f"Recall@{k}"] += len(relevant & set(ranking[:k])) / len(relevant)
            ranks = [rank for rank, document in enumerate(ranking, 1) if document in relevant]
            found["MAP"] += sum(hits / rank for hits, rank in enumerate(ranks, 1)) / len(relevant)
    return {name: value / len(qrels) for name, value in found.items()}


def random_rankings(seed: int) -> tuple[Run, Qrels]:
    """30 queries over 300 documents with graded judgements; one query without a run, one without a positive."""
    rng = random.Random(seed)
    documents = [f"d{i}" for i in range(300)]
    qrels = {f"q{i}": {d: rng.choice([0, 1, 1, 2, 3]) for d in rng.sample(documents, 25)} for i in range(30)}
    qrels["q1"] = {"d1": 0, "d2": 0}
    run = {}
    for query, judged in qrels.items():
        chosen = set(rng.sample(documents, 150)) | set(list(judged)[:5])
        order = sorted(chosen)
        rng.shuffle(order)
        run[query] = {document: -float(place) for place, document in enumerate(order)}  # no ties
    del run["q2"]
    return run, qrels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_measures_are_those_of_their_definitions(seed: int) -> None:
    run, qrels = random_rankings(seed)
    found, expected = evaluate(run, qrels), literal_measures(run, qrels)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 < found["MRR@10"] < 1


def test_queries_that_are_not_judged_do_not_count() -> None:
    run, qrels = random_rankings(0)
    assert evaluate({**run, "stray": {"d1": 1.0}}, qrels) == pytest.approx(literal_measures(run, qrels))


def test_a_negative_judgement_counts_as_not_relevant() -> None:
    run, qrels = random_rankings(0)
    negative = {query: {id_: grade or -2 for id_, grade in judged.items()} for query, judged in qrels.items()}
    assert negative != qrels
    assert evaluate_each(run, negative) == evaluate_each(run, qrels)


def test_a_perfect_run_measures_one_and_an_empty_one_zero() -> None:
    qrels = {"q1": {"a": 2, "b": 1}, "q2": {"c": 1}}
    assert evaluate({q: {d: float(g) for d, g in judged.items()} for q, judged in qrels.items()}, qrels) == {
        "nDCG@10": 1.0, "MRR@10": 1.0, "Recall@10": 1.0, "Recall@100": 1.0, "MAP": 1.0,
    }  # fmt: skip
    assert set(evaluate({}, qrels).values()) == {0.0}


def test_each_query_is_measured_as_if_it_were_alone() -> None:
    run, qrels = random_rankings(0)
    each = evaluate_each(run, qrels)
    assert list(each) == list(qrels)
    for query in ("q0", "q1", "q2"):  # one like the others, one without a positive, one without a run
        alone = literal_measures({query: run.get(query, {})}, {query: qrels[query]})
        assert each[query] == pytest.approx(alone, abs=1e-9)
    assert per_query(run, qrels, "MAP") == {query: values["MAP"] for query, values in each.items()}


def test_overlap_counts_what_both_have_among_their_first() -> None:
    assert overlap([["a", "b", "c"]], [["b", "a", "d"]], k=2) == 1
    assert overlap([["a", "b", "c"]], [["c", "x", "y"]], k=2) == 0, "c stands third"
    assert overlap([["a"], ["b", "c"]], [["a"], ["b", "z"]], k=10) == pytest.approx(0.75)
    assert overlap([["a", "b"], ["x"]], [["a", "b"], []]) == 1, "nothing to find cannot be missed"
    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        overlap([["a"]], [["a"], ["b"]])


# Is it better?


def literal_p(differences: list[float]) -> float:
    """Share of all sign flips whose mean lies as far from zero as the one that was found."""
    found = abs(sum(differences))
    flips = list(itertools.product([-1, 1], repeat=len(differences)))
    far = sum(abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= found - 1e-12 for signs in flips)
    return far / len(flips)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_the_randomisation_test_is_that_of_all_sign_flips(shift: float) -> None:
    rng = random.Random(5)
    baseline = [rng.random() for _ in range(10)]
    values = [value + rng.gauss(shift, 0.2) for value in baseline]
    found = paired_test(values, baseline)
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    assert found["p"] == pytest.approx(literal_p(differences))
    assert found["difference"] == pytest.approx(statistics.mean(differences))


def test_on_many_queries_test_and_interval_agree_with_student() -> None:
    rng = random.Random(6)
    baseline = [rng.random() for _ in range(800)]
    values = [value + rng.gauss(0.008, 0.15) for value in baseline]
    found, student = paired_test(values, baseline), scipy.stats.ttest_rel(values, baseline)
    interval = student.confidence_interval(0.95)
    assert 0.005 < student.pvalue < 0.2, "a case where it matters"
    assert found["p"] == pytest.approx(student.pvalue, abs=0.01)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), abs=0.001)
    assert paired_test(values, baseline) == found, "the same figures each time"
    mirrored = paired_test(baseline, values)
    assert (mirrored["difference"], mirrored["p"]) == pytest.approx((-found["difference"], found["p"]))


def test_rankings_that_are_the_same_do_not_differ() -> None:
    assert paired_test([0.5, 0.0, 1.0], [0.5, 0.0, 1.0]) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


@pytest.mark.parametrize(("values", "baseline"), [([1.0], [0.0]), ([], []), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_a_paired_test_needs_pairs(values: list[float], baseline: list[float]) -> None:
    message = f"at least two: found {len(values)} values and {len(baseline)} of the baseline"
    with pytest.raises(ValueError, match=message):
        paired_test(values, baseline)


# pairs


def ranks(values: list[float]) -> list[float]:
    """Mean rank of each value, literally."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def random_pairs(seed: int, n: int = 60) -> tuple[list[float], list[bool]]:
    """Scores with many ties, and labels that they tell something about."""
    rng = random.Random(seed)
    labels = [rng.random() < 0.35 for _ in range(n)]
    return [round(rng.gauss(1.0 if label else 0.0, 0.8), 1) for label in labels], labels


def test_correlations_are_those_of_their_definitions() -> None:
    scores, _ = random_pairs(0)
    gold = [round(2 * score + random.Random(i).gauss(0, 2)) / 2 for i, score in enumerate(scores)]
    assert correlations(scores, gold) == pytest.approx(
        {
            "Pearson": statistics.correlation(scores, gold),
            "Spearman": statistics.correlation(ranks(scores), ranks(gold)),
        }
    )


def test_a_constant_has_no_correlation() -> None:
    with pytest.raises(DataError, match=r"two different judgements, and all 3 pairs have 2:"):
        correlations([0.1, 0.2, 0.3], [2.0, 2.0, 2.0])
    with pytest.raises(DataError, match=r"two different scores, and all 3 pairs have 0\.5:"):
        correlations([0.5, 0.5, 0.5], [1.0, 2.0, 3.0])


def test_one_pair_has_no_correlation() -> None:
    with pytest.raises(DataError, match="a correlation needs at least two scored pairs, found 1: add pairs"):
        correlations([0.5], [1.0])


def literal_average_precision(scores: list[float], labels: list[bool]) -> float:
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        said = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        precision, recall = sum(said) / len(said), sum(said) / sum(labels)
        total, recall_before = total + (recall - recall_before) * precision, recall
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("threshold", [-9.0, 0.5, 0.55, 9.0])
def test_classification_agrees_with_scikit_learn(seed: int, threshold: float) -> None:
    scores, labels = random_pairs(seed)
    said = [score >= threshold for score in scores]
    found = classification(scores, labels, threshold)
    assert found == pytest.approx(
        {
            "Accuracy": sklearn.metrics.accuracy_score(labels, said),
            "AP": sklearn.metrics.average_precision_score(labels, scores),
            "Precision": sklearn.metrics.precision_score(labels, said, zero_division=0),
            "Recall": sklearn.metrics.recall_score(labels, said),
            "threshold": threshold,
        }
    )
    assert found["AP"] == pytest.approx(literal_average_precision(scores, labels))


@pytest.mark.parametrize("seed", range(10))
def test_no_threshold_is_more_accurate_than_the_best(seed: int) -> None:
    scores, labels = random_pairs(seed, n=12)
    candidates = [score + shift for score in scores for shift in (-0.01, 0.0, 0.01)]
    best = max(classification(scores, labels, threshold)["Accuracy"] for threshold in candidates)
    assert classification(scores, labels, best_threshold(scores, labels))["Accuracy"] == best


def test_a_threshold_lies_midway_and_may_say_yes_or_no_to_all() -> None:
    assert best_threshold([0.9, 0.8, 0.4, 0.2], [True, True, False, False]) == pytest.approx(0.6)
    assert best_threshold([0.5, 0.3, 0.1], [True, False, True]) == 0.4, "the highest of equally good ones"
    assert best_threshold([0.1, 0.2, 0.3], [True, True, False]) == 0.1
    none = best_threshold([0.1, 0.2, 0.3], [True, False, False])
    assert 0.3 < none < 0.3000001


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone_cannot_be_told_apart(label: bool) -> None:
    for measure in (lambda: best_threshold([1.0, 2.0], [label] * 2), lambda: classification([1.0], [label], 0.5)):
        with pytest.raises(DataError, match=r"all [12] pairs have the same label"):
            measure()
