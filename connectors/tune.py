"""Measurements to choose search settings by: what the HNSW graph misses of the nearest passages, what the candidates of
a small query encoder miss of the full encoder's hits, and the weight of BM25 in hybrid searches.

Every query runs through all settings in turn, so that they can be compared on a machine that has other work to do.
Q queries, E recall width, P bytes of features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from tqdm.auto import tqdm

from d2llm.errors import DataError, StoreError
from d2llm.evaluate import MAIN_MEASURE, Ranking
from d2llm.evidence import judged_candidates
from d2llm.metrics import Qrels, overlap, paired_test, per_query
from d2llm.model import EncoderSize, Model
from d2llm.search import BM25_WEIGHT, add_bm25, default_bm25_weight, rank
from d2llm.types import Candidates, Embeddings, Floats, Task

from .engine import Effort, search_effort
from .qdrant import QdrantIndex

LADDER = (2, 4, 8, 16)
"""Values of `hnsw_ef`, as multiples of the number of candidates. Lower ones have the effect of the first."""
OVERFETCH = (1, 1.25, 1.5, 2, 3)
"""Candidates of a small query encoder, as multiples of the full encoder's."""
DEPTH = 10
"""Number of the full encoder's top hits that over-fetching should include."""
WEIGHTS = (0.0, 0.05, BM25_WEIGHT, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
"""Weights of BM25 beside the IEM."""
WARM_UP = 10
"""Queries that run through all settings before anything is measured."""
EXACT = Effort(exact=True)

Setting = TypeVar("Setting", bound=Hashable)
Figures = TypeVar("Figures")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of a query: median and 95 % quantile."""

    p50: float
    p95: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """The latency of measured queries."""
        return cls(float(np.median(milliseconds)), float(np.percentile(milliseconds, 95)))


@dataclass(frozen=True, slots=True)
class EffortFigures:
    """Searches with one `hnsw_ef`: `recall` is the mean share of the exact nearest passages that they find, `worst` the
    5 % quantile of that share over the queries, `ms` the latency of `QdrantIndex.recall`."""

    hnsw_ef: int
    recall: float
    worst: float
    ms: Latency


@dataclass(frozen=True, slots=True)
class EffortTable:
    """The figures by ascending `hnsw_ef`, with the `default` among them. `exact_ms` is the latency of exact search."""

    figures: list[EffortFigures]
    default: int
    exact_ms: Latency

    @property
    def of_default(self) -> EffortFigures:
        """The figures of the default."""
        return next(figures for figures in self.figures if figures.hnsw_ef == self.default)

    def cheapest(self, target: float) -> EffortFigures:
        """The figures of the smallest `hnsw_ef` whose recall reaches `target`; of the highest recall if none does."""
        return _cheapest(self.figures, lambda figures: figures.recall, target)


@dataclass(frozen=True, slots=True)
class OverfetchFigures:
    """A number of `candidates` of a small query encoder: `held` is the mean share of the full encoder's top hits that
    are among them, `overlap` the share that are among the top hits after rescoring, `ms` the latency of both."""

    candidates: int
    held: float
    overlap: float
    ms: Latency


@dataclass(frozen=True, slots=True)
class OverfetchTable:
    """The figures by ascending number of candidates, all from searches with `hnsw_ef` (None: the default)."""

    figures: list[OverfetchFigures]
    hnsw_ef: int | None

    def cheapest(self, target: float) -> OverfetchFigures:
        """The figures of the fewest candidates that include the share `target` of the full encoder's hits; of the
        highest share if none do."""
        return _cheapest(self.figures, lambda figures: figures.held, target)


@dataclass(frozen=True, slots=True)
class Bm25Figures:
    """Hybrid searches with one `weight` of BM25 beside the IEM: mean nDCG@10, and its `difference` to that of the
    default weight, with the 95 % confidence interval from `low` to `high`."""

    weight: float
    ndcg_10: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bm25Table:
    """The figures by ascending weight, on the same judged queries. Their differences are to the `default` weight."""

    figures: list[Bm25Figures]
    queries: int
    default: float

    @property
    def best(self) -> Bm25Figures:
        """The figures of the highest nDCG@10; among equals, of the smallest weight."""
        return max(self.figures, key=lambda figures: figures.ndcg_10)

    @property
    def suggestion(self) -> float | None:
        """The best weight, or None where it may be better than the default by chance alone."""
        return self.best.weight if self.best.low > 0 else None


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What to set for searches with one query encoder: `hnsw_ef` (None: leave it out) and the number of `candidates`.
    `reached` says whether they reach the target; otherwise they are the best that was measured."""

    hnsw_ef: int | None
    candidates: int
    reached: bool


@dataclass(frozen=True, slots=True)
class Tuning:
    """The measurements of a collection of `passages`, with or without a `graph`, in searches for `candidates`.

    `target` is the share to find: of the nearest passages, and of the full encoder's hits among the small encoder's
    candidates. `overfetch` is None without a small encoder, `bm25` without judgements.
    """

    passages: int
    graph: bool
    queries: int
    candidates: int
    target: float
    efforts: dict[EncoderSize, EffortTable]
    overfetch: OverfetchTable | None
    bm25: Bm25Table | None = None

    def suggest(self, encoder: EncoderSize) -> Suggestion:
        """The cheapest settings that reach the target with `encoder`, or else the best that were measured."""
        table = self.efforts[encoder]
        best = table.cheapest(self.target) if self.graph else table.of_default
        reached = best.recall >= self.target
        if encoder == "small" and self.overfetch is not None:
            fetched = self.overfetch.cheapest(self.target)
            return Suggestion(self.overfetch.hnsw_ef, fetched.candidates, reached and fetched.held >= self.target)
        return Suggestion(None if best.hnsw_ef == table.default else best.hnsw_ef, self.candidates, reached)


def measure_effort(index: QdrantIndex, vectors_QE: Floats, limit: int, *, progress: bool = False) -> EffortTable:
    """Search for the `limit` nearest passages of each query vector with each `hnsw_ef` of `LADDER`, the default, and
    exactly.

    Raises:
        StoreError: the index is empty, missing, cannot be reached, or is in use.
        MismatchError: vectors of another width.
    """
    default = search_effort(limit)
    ladder = sorted({default, *(multiple * limit for multiple in LADDER)})
    searches = {effort: partial(_ids, index, vectors_QE, limit, effort) for effort in [EXACT, *map(Effort, ladder)]}
    ids, ms = in_turns(searches, len(vectors_QE), progress)
    _require_some(ids[EXACT][0])
    figures = []
    for hnsw_ef in ladder:
        pairs_Q = zip(ids[Effort(hnsw_ef)], ids[EXACT], strict=True)
        shares_Q = [overlap([found], [exact], limit) for found, exact in pairs_Q]
        worst = float(np.quantile(shares_Q, 0.05))
        figures.append(EffortFigures(hnsw_ef, float(np.mean(shares_Q)), worst, ms[Effort(hnsw_ef)]))
    return EffortTable(figures, default, ms[EXACT])


def measure_overfetch(
    index: QdrantIndex,
    model: Model,
    full: Embeddings,
    small: Embeddings,
    limit: int,
    *,
    hnsw_ef: int | None = None,
    task: Task = "asymmetric",
    progress: bool = False,
) -> OverfetchTable:
    """Search with Q queries of the `small` encoder for each multiple in `OVERFETCH` of `limit` candidates, and rescore
    them by the IEM of `model`.

    The truth is the result of the `full` encoder for the same queries: the `limit` nearest by exact search, rescored.

    Raises:
        StoreError: the index is empty, missing, cannot be reached, or is in use.
        MismatchError: vectors or features of another size.
    """
    rescored = partial(_rescored, index, model, task)
    truth = [rescored(full, limit, EXACT, query)[1] for query in range(len(full))]
    _require_some(truth[0])
    numbers = sorted({math.ceil(multiple * limit) for multiple in OVERFETCH})
    searches = {number: partial(rescored, small, number, Effort(hnsw_ef)) for number in numbers}
    answers, ms = in_turns(searches, len(small), progress)
    figures = []
    for number in numbers:
        candidates, hits = zip(*answers[number], strict=True)
        held = np.mean([len({*top} & {*ids}) / len(top) for top, ids in zip(truth, candidates, strict=True)])
        figures.append(OverfetchFigures(number, float(held), overlap(hits, truth, DEPTH), ms[number]))
    return OverfetchTable(figures, hnsw_ef)


def measure_bm25(
    index: QdrantIndex,
    model: Model,
    queries: Mapping[str, str],
    embeddings: Embeddings,
    qrels: Qrels,
    limit: int,
    *,
    task: Task = "asymmetric",
    progress: bool = False,
) -> Bm25Table:
    """Rescore the `limit` candidates of a hybrid search with each of `WEIGHTS`.

    `queries` are Q texts by their ids, `embeddings` their embeddings by `model`, `qrels` their judgements. A document
    that is the query `itself` is left out.

    Raises:
        DataError: fewer than two queries, or the collection has none of the documents that `qrels` judges.
        StoreError: the index is empty, missing, cannot be reached, or is in use.
        MismatchError: vectors or features of another size, or the index has no BM25 vectors.
    """
    if len(queries) < 2:
        raise DataError(f"weighing BM25 needs two or more judged queries, found {len(queries)}")
    qrels = {query: qrels[query] for query in queries}
    rankings = {weight: Ranking([]) for weight in WEIGHTS}
    found = judged_candidates(index, queries, embeddings, qrels, limit, hybrid=True)
    with_bar = tqdm(found, desc="weighing BM25", total=len(queries), disable=not progress)
    for row, candidates in enumerate(with_bar):
        scores_K = _scores(index, model, task, embeddings, row, candidates)
        bm25_K = (
            np.zeros_like(scores_K) if candidates.bm25_scores is None else candidates.bm25_scores
        )  # stop words alone have no scores
        for weight in WEIGHTS:
            hits = rank(candidates, add_bm25(scores_K, bm25_K, weight), DEPTH)
            rankings[weight].ids.append([hit.id for hit in hits])
    ndcg = {
        weight: list(per_query(ranking.run(queries), qrels, MAIN_MEASURE).values())
        for weight, ranking in rankings.items()
    }
    figures, default = [], default_bm25_weight(model.config.parts, index.scales_for(model.config).get(task, ()))
    for weight, values in ndcg.items():
        test = paired_test(values, ndcg[default])
        figures.append(Bm25Figures(weight, float(np.mean(values)), test["difference"], test["low"], test["high"]))
    return Bm25Table(figures, len(queries), default)


def _cheapest(figures: Sequence[Figures], share: Callable[[Figures], float], target: float) -> Figures:
    return next((each for each in figures if share(each) >= target), max(figures, key=share))


def _require_some(ids: Sequence[str]) -> None:
    if not ids:
        raise StoreError("the index is empty: add documents first, with Index.add or `d2llm index`")


def _ids(index: QdrantIndex, vectors_QE: Floats, limit: int, effort: Effort, query: int) -> list[str]:
    """Names of the passages found."""
    found = index.recall(vectors_QE[query], limit, effort=effort)
    return [f"{id_}, {passage}" for id_, passage in zip(found.ids, found.passages, strict=True)]


def _rescored(
    index: QdrantIndex, model: Model, task: Task, queries: Embeddings, limit: int, effort: Effort, query: int
) -> tuple[list[str], list[str]]:
    """The ids of the candidates, and the ids of the top hits."""
    candidates = index.recall(queries.vectors[query], limit, effort=effort)
    scores_K = _scores(index, model, task, queries, query, candidates)
    return candidates.ids, [hit.id for hit in rank(candidates, scores_K, DEPTH)]


def _scores(
    index: QdrantIndex, model: Model, task: Task, queries: Embeddings, query: int, candidates: Candidates
) -> Floats:
    """The IEM scores of the candidates [K] of one of the queries, with the scales that a `Searcher` would use."""
    scales = index.scales_for(model.config).get(task)
    features_1H, recall_1K = queries.features[None, query], candidates.scores[None]
    scores_K: Floats = model.score(features_1H, candidates.features[None], recall_1K, task, scales=scales)[0]
    return scores_K


def in_turns(
    searches: Mapping[Setting, Callable[[int], Answer]], queries: int, progress: bool
) -> tuple[dict[Setting, list[Answer]], dict[Setting, Latency]]:
    """The answers of each search to queries 0, 1, ..., and its latency."""
    settings = list(searches)
    for query in range(min(WARM_UP, queries)):
        for setting in settings:
            searches[setting](query)
    answers: dict[Setting, list[Answer]] = {setting: [] for setting in settings}
    ms: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for query in tqdm(range(queries), unit="query", disable=not progress):
        first = query % len(settings)  # the first one finds a cold cache: a different one each time
        for setting in settings[first:] + settings[:first]:
            start = time.perf_counter()
            answer = searches[setting](query)
            ms[setting].append((time.perf_counter() - start) * 1e3)
            answers[setting].append(answer)
    return answers, {setting: Latency.of(ms[setting]) for setting in settings}
