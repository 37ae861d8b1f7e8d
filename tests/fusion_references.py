"""Fusions of rankings in plain Python, one passage at a time. A ranking is `{id: score}`, best first."""

import statistics
from collections.abc import Mapping

import numpy as np

from d2llm.types import Floats


def rrf(*rankings: Mapping[str, float]) -> dict[str, float]:
    """Reciprocal ranks, as Qdrant takes them: its first has rank 0."""
    fused: dict[str, float] = {}
    for ranking in rankings:
        for place, id_ in enumerate(ranking):
            fused[id_] = fused.get(id_, 0.0) + 1 / (60 + place)
    return fused


def dbsf(*rankings: Mapping[str, float]) -> dict[str, float]:
    """Scores by their distance from three deviations below the mean, in six deviations."""
    fused: dict[str, float] = {}
    for ranking in rankings:
        scores = np.array(list(ranking.values()))
        deviation = scores.std(ddof=1) if len(scores) > 1 else 0.0
        for id_, score in ranking.items():
            part = 0.5 if deviation == 0 else (score - scores.mean() + 3 * deviation) / (6 * deviation)
            fused[id_] = fused.get(id_, 0.0) + part
    return fused


def with_words(scores: Floats, words: Floats, weight: float) -> list[float]:
    """Each words' score in deviations from their mean, as so many deviations of the others."""
    if min(words) == max(words):
        return [float(score) for score in scores]
    of_words, of_scores = statistics.pstdev(words.tolist()), statistics.pstdev(scores.tolist())
    mean = statistics.fmean(words.tolist())
    return [float(one) + weight * of_scores * (word - mean) / of_words for one, word in zip(scores, words, strict=True)]
