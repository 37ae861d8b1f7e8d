"""Hybrid searches without an IEM, beside fusions in plain Python."""

import numpy as np
import pytest
from fusion_references import dbsf, rrf, with_words

from d2llm import fusion
from d2llm.fusion import WEIGHTS, Recalled


def make_found(limit: int, matches: int, seed: int = 0) -> Recalled:
    """40 passages, of which BM25 finds `matches`, and the `limit` best of each list."""
    rng = np.random.default_rng(seed)
    cosine_N, bm25_N = rng.normal(size=40).astype(np.float32), np.zeros(40, np.float32)
    bm25_N[rng.choice(40, matches, replace=False)] = rng.uniform(1, 9, matches)
    by_cosine, by_bm25 = (np.argsort(-scores_N)[:limit] for scores_N in (cosine_N, bm25_N))
    return Recalled(cosine_N, bm25_N, by_cosine, by_bm25[bm25_N[by_bm25] > 0])


def as_rankings(found: Recalled) -> list[dict[str, float]]:
    lists = (found.cosine_N, found.by_cosine), (found.bm25_N, found.by_bm25)
    return [{str(row): float(scores_N[row]) for row in rows} for scores_N, rows in lists]


@pytest.mark.parametrize("limit", [1, 2, 10, 40])
@pytest.mark.parametrize("matches", [0, 1, 2, 15])
def test_ranks_are_fused_as_qdrant_does(limit: int, matches: int) -> None:
    found = make_found(limit, matches)
    expected = rrf(*as_rankings(found))
    order = sorted(expected, key=lambda id_: (-expected[id_], -found.cosine_N[int(id_)]))
    assert [str(row) for row in fusion.rrf(found)] == order


@pytest.mark.parametrize("limit", [1, 2, 10, 40])
@pytest.mark.parametrize("matches", [0, 1, 2, 15])
@pytest.mark.parametrize("equal", [False, True])
def test_scores_are_fused_as_qdrant_does(limit: int, matches: int, equal: bool) -> None:
    found = make_found(limit, matches)
    if equal:
        found.bm25_N[found.by_bm25] = 2.0
    expected = dbsf(*as_rankings(found))
    rows = [str(row) for row in fusion.dbsf(found)]
    assert sorted(rows) == sorted(expected)
    scores = [expected[row] for row in rows]
    assert scores == pytest.approx(sorted(scores, reverse=True), abs=1e-6), "rounding may order equal scores"


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weighted_sum_uses_both_scores_of_every_passage(weight: float) -> None:
    found = make_found(10, 15)
    rows = sorted({*found.by_cosine.tolist(), *found.by_bm25.tolist()})
    scores = dict(zip(rows, with_words(found.cosine_N[rows], found.bm25_N[rows], weight), strict=True))
    assert fusion.weighted_sum(found, weight).tolist() == sorted(rows, key=lambda row: -scores[row])
