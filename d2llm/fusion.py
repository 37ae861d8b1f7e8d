"""Hybrid search without an IEM: the passages that cosine and BM25 find for one query, fused into one ranking.

N is the number of passages, L of passages that one of the two finds, U of passages that either finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from d2llm.search import add_bm25
from d2llm.types import Floats

RRF_K = 60
"""The constant k of reciprocal rank fusion, as in its paper. Qdrant's own default is 2."""
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Weights of BM25 beside the cosine, as multiples of the cosine's standard deviation (see `weighted_sum`)."""

Rows = npt.NDArray[np.int64]
"""Row numbers of passages."""


class Recalled(NamedTuple):
    """The passages that cosine and BM25 recall for one query.

    `cosine_N`, `bm25_N` [N] float32: the scores of all passages.
    `by_cosine`, `by_bm25` [L] int64: the passages that each recalls, best first.
    """

    cosine_N: Floats
    bm25_N: Floats
    by_cosine: Rows
    by_bm25: Rows


def rrf(recalled: Recalled) -> Rows:
    """Return the passages [U] by reciprocal rank fusion (Cormack et al. 2009), best first.

    A list adds 1 / (k + rank) to each of its passages. As in Qdrant, the first rank is 0.
    """
    return _fuse(recalled, lambda scores_L: 1 / (RRF_K + np.arange(len(scores_L))))


def dbsf(recalled: Recalled) -> Rows:
    """Return the passages [U] by distribution-based score fusion as in Qdrant, best first.

    A list adds a score to each of its passages, scaled so that three standard deviations below the mean are 0 and three
    above are 1. If all scores of a list are equal, each counts 0.5.
    """

    return _fuse(recalled, _scaled)


def weighted_sum(recalled: Recalled, weight: float) -> Rows:
    """Return the passages [U] by the cosine plus `weight` times BM25, best first.

    Each passage has both scores, whichever found it. BM25 is brought to the cosine's scale as in `search.add_bm25`.
    """
    rows_U = np.union1d(recalled.by_cosine, recalled.by_bm25)
    return _sorted(recalled, rows_U, add_bm25(recalled.cosine_N[rows_U], recalled.bm25_N[rows_U], weight))


def _scaled(scores_L: Floats) -> npt.NDArray[np.float64]:
    scores = scores_L.astype(np.float64)
    deviation = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
    if deviation == 0:
        return np.full(len(scores), 0.5)
    scaled: npt.NDArray[np.float64] = (scores - scores.mean() + 3 * deviation) / (6 * deviation)
    return scaled


def _fuse(recalled: Recalled, parts: Callable[[Floats], npt.NDArray[np.float64]]) -> Rows:
    """Rank by the sum of the parts [L] that each list adds. `parts` gets the scores [L] of a list, best first."""
    sums_N = np.zeros(len(recalled.cosine_N))
    for scores_N, rows_L in ((recalled.cosine_N, recalled.by_cosine), (recalled.bm25_N, recalled.by_bm25)):
        sums_N[rows_L] += parts(scores_N[rows_L])
    rows_U = np.union1d(recalled.by_cosine, recalled.by_bm25)
    return _sorted(recalled, rows_U, sums_N[rows_U])


def _sorted(recalled: Recalled, rows_U: Rows, scores_U: npt.NDArray[np.floating]) -> Rows:
    """Sort by score. Equal scores are sorted by cosine, as `QdrantIndex` does."""
    return rows_U[np.lexsort((-recalled.cosine_N[rows_U], -scores_U))]
