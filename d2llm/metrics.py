"""How good a ranking is and whether another is better; how well scores of pairs agree with judgements.

trec_eval's measures through ir-measures, correlations and tests through scipy. N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from d2llm.errors import ArgumentError, DataError, import_extra

Run: TypeAlias = Mapping[str, Mapping[str, float]]
"""`{query id: {document id: score}}`."""
Qrels: TypeAlias = Mapping[str, Mapping[str, int]]

MEASURES = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "Recall@10": "R@10", "Recall@100": "R@100", "MAP": "AP"}
"""Our names (BEIR's) and those of ir-measures."""
RESAMPLES = 9999
"""Of the randomisation test and of the bootstrap."""


def itself(query: str, qrels: Qrels) -> str | None:
    """The id of the document that a query is itself, which does not belong into its ranking: the one with the same id.

    BEIR has this rule (`ignore_identical_ids`) for data sets such as ArguAna, whose queries are in the corpus. Unlike
    there, a document that `qrels` calls relevant to the query of the same id may be ranked: the answer is None.
    """
    return None if qrels.get(query, {}).get(query, 0) > 0 else query


def evaluate(run: Run, qrels: Qrels) -> dict[str, float]:
    """Mean of each of `MEASURES` over the queries of `qrels`; a query missing from `run` counts as 0."""
    found = evaluate_each(run, qrels)
    return {measure: sum(values[measure] for values in found.values()) / len(found) for measure in MEASURES}


def evaluate_each(run: Run, qrels: Qrels) -> dict[str, dict[str, float]]:
    """`{query id: {measure: value}}` for every query of `qrels` and all of `MEASURES`; 0 for one missing from `run`.

    A negative grade counts as 0, as in trec_eval.
    """
    ir_measures = import_extra("ir_measures", "eval")
    names = {ir_measures.parse_measure(text): name for name, text in MEASURES.items()}
    found = {query: dict.fromkeys(MEASURES, 0.0) for query in qrels}
    # TREC's -1 and -2 are not relevant either, and trec_eval's code can crash on them
    grades = {query: {id_: max(0, grade) for id_, grade in judged.items()} for query, judged in qrels.items()}
    for value in ir_measures.iter_calc(list(names), grades, {query: dict(docs) for query, docs in run.items()}):
        found[value.query_id][names[value.measure]] = float(value.value)
    return found


def per_query(run: Run, qrels: Qrels, measure: str) -> dict[str, float]:
    """One of `MEASURES` for each query of `qrels`; a query missing from `run` has 0."""
    return {query: values[measure] for query, values in evaluate_each(run, qrels).items()}


def overlap(found: Sequence[Sequence[str]], exact: Sequence[Sequence[str]], k: int = 10) -> float:
    """Mean share of the first `k` ids of the exact rankings that the found rankings have among their first `k`."""
    shares = [len(set(a[:k]) & set(b[:k])) / len(b[:k]) for a, b in zip(found, exact, strict=True) if b]
    return sum(shares) / len(shares)


def paired_test(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Is the mean of `values` another than that of `baseline`, a measure of the same queries in the same order?

    `difference` of the means, `low` and `high` of its 95 % confidence interval (percentile bootstrap over queries), and
    `p` of the two-sided paired randomisation test (signs of the differences flipped at random; all flips when they are
    few), which Smucker, Allan and Carterette (CIKM 2007) recommend for measures of retrieval. The same input always
    gives the same figures. `p` is of this one comparison: not corrected for how many are made.

    Raises:
        ArgumentError: fewer than two queries, or not the same number on both sides.
    """
    if len(values) != len(baseline) or len(values) < 2:
        raise ArgumentError(f"a paired test needs two or more pairs of values, found {len(values)} and {len(baseline)}")
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
    """Pearson and Spearman correlation of scores with judgements.

    Raises:
        DataError: either side has fewer than two different values, so that correlation is not defined.
    """
    stats = import_extra("scipy.stats", "eval")
    scores_N, gold_N = np.asarray(scores_N, np.float64), np.asarray(gold_N, np.float64)
    for name, values_N in (("scores", scores_N), ("judgements", gold_N)):
        if len(different := np.unique(values_N)) < 2:
            raise DataError(f"no correlation without two different {name}: {len(values_N)} pairs have {different}")
    return {
        "Pearson": float(stats.pearsonr(scores_N, gold_N).statistic),
        "Spearman": float(stats.spearmanr(scores_N, gold_N).statistic),
    }


def best_threshold(scores_N: npt.ArrayLike, labels_N: npt.ArrayLike) -> float:
    """The threshold with the highest accuracy when scores at or above it mean yes (the highest such threshold).

    It lies midway between two scores, at the lowest (all are yes) or just above the highest (none is).
    """
    scores_C, hits_C, counts_C = _cuts(scores_N, labels_N)
    correct_C = hits_C + (np.size(labels_N) - hits_C[-1]) - (counts_C - hits_C)  # yes that are, no that are not
    best = int(np.argmax(correct_C))
    if best == 0:
        return float(np.nextafter(scores_C[1], np.inf))
    return float(scores_C[best] if best == len(scores_C) - 1 else (scores_C[best] + scores_C[best + 1]) / 2)


def classification(scores_N: npt.ArrayLike, labels_N: npt.ArrayLike, threshold: float) -> dict[str, float]:
    """What the paper's tables 1 and 3 report on NLI: accuracy, precision and recall at `threshold`, and AP.

    A score at or above `threshold` means yes. Average precision needs no threshold: the sum over the distinct scores of
    precision times what it adds to recall. Without a yes, precision is 0.
    """
    _, hits_C, counts_C = _cuts(scores_N, labels_N)
    said_N, labels_N = np.asarray(scores_N, np.float64) >= threshold, np.asarray(labels_N, bool)
    hits, positives = int((said_N & labels_N).sum()), int(labels_N.sum())
    return {
        "Accuracy": float((said_N == labels_N).mean()),
        "AP": float((np.diff(hits_C) / positives * (hits_C / np.maximum(counts_C, 1))[1:]).sum()),
        "Precision": hits / max(int(said_N.sum()), 1),
        "Recall": hits / positives,
        "threshold": threshold,
    }


def _cuts(scores_N: npt.ArrayLike, labels_N: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], ...]:
    """The C ways to cut the ranking between distinct scores: lowest score above the cut, hits and pairs above it.

    The first cut is above everything. Raises `DataError` unless both labels occur: the measures are not defined then.
    """
    scores, labels = np.asarray(scores_N, np.float64), np.asarray(labels_N, bool)
    if labels.all() or not labels.any():
        raise DataError(f"nothing to tell apart: all {labels.size} pairs have the same label")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each group of equal scores
    hits = np.cumsum(labels[order], dtype=np.float64)[last]
    return np.append(np.inf, scores[order][last]), np.append(0.0, hits), np.append(0.0, last + 1.0)
