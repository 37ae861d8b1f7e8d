"""Measures of rankings and of pair scores, and tests of their differences.

ir-measures computes trec_eval's measures; scipy computes correlations and tests. N is the number of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from d2llm.errors import ArgumentError, DataError, import_extra

Run: TypeAlias = Mapping[str, Mapping[str, float]]
"""Scores of a ranking, `{query id: {document id: score}}`."""
Qrels: TypeAlias = Mapping[str, Mapping[str, int]]
"""Judgements, `{query id: {document id: grade}}`."""

MEASURES = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "Recall@10": "R@10", "Recall@100": "R@100", "MAP": "AP"}
"""The measures, `{BEIR's name, which we use: ir-measures' name}`."""
RESAMPLES = 9999
"""The number of resamples in the randomisation test and in the bootstrap."""


def itself(query: str, qrels: Qrels) -> str | None:
    """Return the id of the document that is the query itself, to leave it out of the query's ranking.

    That document has the id of the query. BEIR leaves it out too (`ignore_identical_ids`), for data sets such as
    ArguAna, whose queries are in the corpus. Unlike BEIR, we rank it if `qrels` judges it relevant to the query: then
    the result is None.
    """
    return None if qrels.get(query, {}).get(query, 0) > 0 else query


def evaluate(run: Run, qrels: Qrels) -> dict[str, float]:
    """Return the mean of each of `MEASURES` over the queries of `qrels`. A query missing from `run` counts as 0."""
    table = evaluate_each(run, qrels)
    return {measure: sum(values[measure] for values in table.values()) / len(table) for measure in MEASURES}


def evaluate_each(run: Run, qrels: Qrels) -> dict[str, dict[str, float]]:
    """Return all `MEASURES` of every query of `qrels`, `{query id: {measure: value}}`.

    A query missing from `run` has 0. A negative grade counts as 0, as in trec_eval.
    """
    ir_measures = import_extra("ir_measures", "eval")
    names = {ir_measures.parse_measure(text): name for name, text in MEASURES.items()}
    table = {query: dict.fromkeys(MEASURES, 0.0) for query in qrels}
    # TREC's grades -1 and -2 mean not relevant too, and trec_eval's code can crash on them.
    grades = {query: {id_: max(0, grade) for id_, grade in judged.items()} for query, judged in qrels.items()}
    for value in ir_measures.iter_calc(list(names), grades, {query: dict(docs) for query, docs in run.items()}):
        table[value.query_id][names[value.measure]] = float(value.value)
    return table


def per_query(run: Run, qrels: Qrels, measure: str) -> dict[str, float]:
    """Return one of `MEASURES` for each query of `qrels`, `{query id: value}`. A query missing from `run` has 0."""
    return {query: values[measure] for query, values in evaluate_each(run, qrels).items()}


def overlap(found: Sequence[Sequence[str]], exact: Sequence[Sequence[str]], k: int = 10) -> float:
    """Return how much of the exact rankings' top `k` the found rankings have in their own top `k`, from 0 to 1.

    `found` and `exact` hold the ranked ids of the same queries in the same order. The result is the mean over the
    queries whose exact ranking is not empty.
    """
    shares = [len(set(a[:k]) & set(b[:k])) / len(b[:k]) for a, b in zip(found, exact, strict=True) if b]
    return sum(shares) / len(shares)


def paired_test(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Test whether the mean of `values` differs from the mean of `baseline`.

    Both hold the values of one measure for the same queries in the same order. The result has

    - `difference`: the mean of `values` minus the mean of `baseline`;
    - `low` and `high`: its 95 % confidence interval (percentile bootstrap over the queries);
    - `p`: of the two-sided paired randomisation test, which flips the signs of the differences at random (or in all
      ways, if there are few). Smucker, Allan and Carterette (CIKM 2007) recommend it for retrieval measures. `p` is not
      corrected for the number of comparisons.

    The same input always gives the same figures.

    Raises:
        ArgumentError: there are fewer than two queries, or the two sides have different numbers of values.
    """
    if len(values) != len(baseline) or len(values) < 2:
        raise ArgumentError(
            f"a paired test needs the same queries on both sides, at least two: found {len(values)} values and "
            f"{len(baseline)} of the baseline"
        )
    stats = import_extra("scipy.stats", "eval")
    differences = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    options = {"n_resamples": RESAMPLES, "vectorized": True, "batch": 500, "rng": 0}  # batch bounds memory
    test = stats.permutation_test((differences,), np.mean, permutation_type="samples", **options)
    interval = stats.bootstrap((differences,), np.mean, method="percentile", **options).confidence_interval
    return {
        "difference": float(differences.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "p": float(test.pvalue),
    }


def correlations(scores_N: npt.ArrayLike, gold_N: npt.ArrayLike) -> dict[str, float]:
    """Return the Pearson and Spearman correlations of scores [N] with judgements [N].

    Raises:
        DataError: the scores or the judgements are fewer than two, or all equal: no correlation is defined.
    """
    stats = import_extra("scipy.stats", "eval")
    scores_N, gold_N = np.asarray(scores_N, np.float64), np.asarray(gold_N, np.float64)
    for name, values_N in (("scores", scores_N), ("judgements", gold_N)):
        if len(values_N) < 2:
            raise DataError(f"a correlation needs at least two scored pairs, found {len(values_N)}: add pairs")
        if len(distinct := np.unique(values_N)) < 2:
            raise DataError(
                f"a correlation needs two different {name}, and all {len(values_N)} pairs have {distinct[0]:g}: add "
                "pairs that differ"
            )
    return {
        "Pearson": float(stats.pearsonr(scores_N, gold_N).statistic),
        "Spearman": float(stats.spearmanr(scores_N, gold_N).statistic),
    }


def best_threshold(scores_N: npt.ArrayLike, labels_N: npt.ArrayLike) -> float:
    """Return the threshold with the highest accuracy, where a score at or above the threshold means yes.

    It lies midway between two scores, at the lowest score (all pairs are yes) or just above the highest score (all are
    no). If several thresholds are equally accurate, the highest is returned.

    Raises:
        DataError: all pairs have the same label.
    """
    scores_C, hits_C, counts_C = _cuts(scores_N, labels_N)
    correct_C = hits_C + (np.size(labels_N) - hits_C[-1]) - (counts_C - hits_C)  # true positives + true negatives
    best = int(np.argmax(correct_C))
    if best == 0:
        return float(np.nextafter(scores_C[1], np.inf))
    return float(scores_C[best] if best == len(scores_C) - 1 else (scores_C[best] + scores_C[best + 1]) / 2)


def classification(scores_N: npt.ArrayLike, labels_N: npt.ArrayLike, threshold: float) -> dict[str, float]:
    """Return accuracy, precision and recall at `threshold`, and average precision (AP).

    The paper's tables 1 and 3 report these on NLI. A score at or above `threshold` means yes. If no pair is a yes,
    precision is 0. AP needs no threshold: it is the sum, over the distinct scores, of the precision times the gain in
    recall.

    Raises:
        DataError: all pairs have the same label.
    """
    _, hits_C, counts_C = _cuts(scores_N, labels_N)
    predictions_N, labels_N = np.asarray(scores_N, np.float64) >= threshold, np.asarray(labels_N, bool)
    hits, positives = int((predictions_N & labels_N).sum()), int(labels_N.sum())
    return {
        "Accuracy": float((predictions_N == labels_N).mean()),
        "AP": float((np.diff(hits_C) / positives * (hits_C / np.maximum(counts_C, 1))[1:]).sum()),
        "Precision": hits / max(int(predictions_N.sum()), 1),
        "Recall": hits / positives,
        "threshold": threshold,
    }


def _cuts(scores_N: npt.ArrayLike, labels_N: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], ...]:
    """Return the C ways to cut the ranking of the pairs between distinct scores.

    The three arrays [C] hold the lowest score above each cut, the number of positive pairs above it, and the number of
    all pairs above it. The first cut is above all pairs.

    Raises:
        DataError: all pairs have the same label, so the measures are not defined.
    """
    scores, labels = np.asarray(scores_N, np.float64), np.asarray(labels_N, bool)
    if labels.all() or not labels.any():
        raise DataError(
            f"all {labels.size} pairs have the same label, so accuracy and AP are not defined: add pairs with the other"
        )
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each group of equal scores
    hits = np.cumsum(labels[order], dtype=np.float64)[last]
    return np.append(np.inf, scores[order][last]), np.append(0.0, hits), np.append(0.0, last + 1.0)
