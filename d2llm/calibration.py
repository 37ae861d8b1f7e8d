"""Calibration: choose the scales of the IEM's parts by one half of some queries, and test them on the other half.

Q queries, K candidates of a query, C parts of the score, G choices of scales.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from d2llm.errors import ArgumentError
from d2llm.metrics import paired_test
from d2llm.types import Floats

DEPTH = 10
"""The depth of nDCG@10."""
MULTIPLES: dict[str, tuple[float, ...]] = {
    "words": (1 / 3, 1 / 2, 1 / math.sqrt(2), 1, math.sqrt(2), 2, 3),
    "vectors": (0, 1 / 3, 1 / 2, 1 / math.sqrt(2), 1, math.sqrt(2), 2, 3),
}
"""The multiples of a part's scale that are tried. Those of the other parts stay: only the proportions rank."""
FEWEST_JUDGED = 10
"""Fewest judged queries in each half."""
FEWEST = 100
"""Fewest pseudo-queries of each family in each half. With 100, the 95 % interval of a gain reaches 1 to 2 points of
nDCG@10 to each side, as much as other scales gain at best: fewer could show nothing."""
SIGNIFICANT = 0.05


class Evidence(NamedTuple):
    """What one query says about scales: its K candidates as the IEM sees them, and which of them are right."""

    parts_KC: Floats
    """`Model.parts` of the candidates."""
    grades_K: Floats
    """Their grades, 0 for those that are not relevant."""
    ideal: float
    """The DCG@10 of the best possible ranking, above 0."""


@dataclass(frozen=True, slots=True)
class Gain:
    """The mean nDCG@10 of the held-out `queries` with the current scales, and the `difference` that the chosen scales
    make, with the 95 % interval from `low` to `high` and the `p` of `metrics.paired_test`."""

    queries: int
    ndcg_10: float
    difference: float
    low: float
    high: float
    p: float

    @property
    def sure(self) -> bool:
        """Whether this is a gain, and not chance. The interval alone is too narrow for few queries, `p` is not."""
        return self.low > 0 and self.p < SIGNIFICANT


@dataclass(frozen=True, slots=True)
class Calibration:
    """The scales that were `chosen` in place of the `current` ones, by part, and their held-out `gains` by family of
    queries. `queries` counts all usable queries of each family. Without `gains` they were too few."""

    current: dict[str, float]
    chosen: dict[str, float]
    queries: dict[str, int]
    gains: dict[str, Gain]

    @property
    def accepted(self) -> bool:
        """Whether the chosen scales gain in every family."""
        return bool(self.gains) and all(gain.sure for gain in self.gains.values())

    @property
    def scales(self) -> dict[str, float]:
        """The scales to use: the chosen ones if they are accepted, or else the current ones."""
        return self.chosen if self.accepted else self.current


def calibrate(
    families: Mapping[str, Sequence[Evidence]],
    current: Mapping[str, float],
    choices: Sequence[Mapping[str, float]],
    *,
    fewest: int = FEWEST,
    seed: int = 0,
) -> Calibration:
    """Choose scales among `choices` by one half of the queries, and test them on the other half.

    `families` hold the evidence of different kinds of queries. The choice is the one whose gain over the `current`
    scales is largest in the family where it gains least; the current scales if no choice gains in all of them. With
    fewer than `fewest` queries in a half of a family nothing is chosen.

    Raises:
        MissingExtraError: the extra `eval` is not installed.
    """
    queries = {name: len(rows) for name, rows in families.items()}
    kept = Calibration(dict(current), dict(current), queries, {})
    if min(queries.values()) < 2 * fewest:
        return kept
    tried = [current, *choices]  # in front, where it wins a draw
    scales_GC = np.array([[scales[part] for part in current] for scales in tried], np.float32)
    halves = {name: _halves(rows, seed) for name, rows in families.items()}
    gains_G = np.min([_gains(ndcg(choosing, scales_GC)) for choosing, _ in halves.values()], axis=0)
    best = int(gains_G.argmax())
    gains = {name: tested(ndcg(held_out, scales_GC[[0, best]])) for name, (_, held_out) in halves.items()}
    return Calibration(kept.current, dict(tried[best]), queries, gains)


def choices_around(scales: Mapping[str, float]) -> list[dict[str, float]]:
    """Return all combinations of `MULTIPLES` of the scales of a model's parts, those nearest to `scales` first.

    Raises:
        ArgumentError: no part has a scale to multiply.
    """
    free = [part for part in MULTIPLES if scales.get(part)]
    if not free:
        raise ArgumentError(
            f"there is nothing to calibrate: the model scores by {', '.join(scales)}, and neither words nor vectors "
            "have a scale above 0. Make it with a corpus: d2llm init EMBEDDER STUDENT --corpus CORPUS"
        )
    grid = sorted(product(*(MULTIPLES[part] for part in free)), key=_distance)
    return [
        {**scales, **{part: scales[part] * factor for part, factor in zip(free, factors, strict=True)}}
        for factors in grid
    ]


def ideal_dcg(grades: Iterable[float]) -> float:
    """Return the DCG@10 of the best ranking of documents with these grades. Negative grades count as 0."""
    best = np.sort([max(0.0, grade) for grade in grades])[::-1][:DEPTH]
    return float(best @ _discounts(len(best)))


def ndcg(evidence: Sequence[Evidence], scales_GC: Floats) -> npt.NDArray[np.float64]:
    """Return the nDCG@10 [G, Q] of Q queries for G choices of scales. Equal scores keep the order of recall."""
    values_GQ = np.empty((len(scales_GC), len(evidence)))
    for query, (parts_KC, grades_K, ideal) in enumerate(evidence):
        order_KG = np.argsort(-(parts_KC @ scales_GC.T), axis=0, kind="stable")[:DEPTH]
        values_GQ[:, query] = _discounts(len(order_KG)) @ np.maximum(grades_K, 0)[order_KG] / ideal
    return values_GQ


def _discounts(depth: int) -> npt.NDArray[np.float64]:
    discounts: npt.NDArray[np.float64] = 1 / np.log2(np.arange(2, depth + 2))
    return discounts


def _distance(factors: Sequence[float]) -> float:
    return sum(abs(math.log(factor)) if factor else math.inf for factor in factors)


def _halves(rows: Sequence[Evidence], seed: int) -> tuple[list[Evidence], list[Evidence]]:
    shuffled = random.Random(seed).sample(rows, len(rows))
    return shuffled[::2], shuffled[1::2]


def _gains(values_GQ: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean gain [G] over the first choice."""
    gains_G: npt.NDArray[np.float64] = (values_GQ - values_GQ[0]).mean(1)
    return gains_G


def tested(values_2Q: npt.NDArray[np.float64]) -> Gain:
    """Compare the nDCG@10 of queries before and after a change."""
    before, after = values_2Q
    test = paired_test(after.tolist(), before.tolist())
    return Gain(len(before), float(before.mean()), test["difference"], test["low"], test["high"], test["p"])
