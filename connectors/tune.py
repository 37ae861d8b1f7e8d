"""How hard a collection must be searched: what the HNSW graph misses of the nearest passages, and what the candidates
of a small query encoder miss of the full one's hits, each at several settings and with what it costs. And what words
are to count beside the IEM in hybrid searches.

Every query goes through all settings in turn, so that they can be compared on a machine that has other work to do.
Q queries, E recall width, H feature width.
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
from d2llm.metrics import Qrels, itself, overlap, paired_test, per_query
from d2llm.model import EncoderSize, Model
from d2llm.search import BM25_WEIGHT, add_bm25, rank
from d2llm.types import Candidates, Embeddings, Floats, Task

from .engine import Effort, search_effort
from .qdrant import QdrantIndex

LADDER = (2, 4, 8, 16)
"""`hnsw_ef` as multiples of the candidates asked for. The engines take lower ones for the first (`OVERSAMPLING`)."""
OVERFETCH = (1, 1.25, 1.5, 2, 3)
"""Candidates of a small query encoder, as multiples of the full one's."""
DEPTH = 10
"""Of the hits that over-fetching is to keep."""
WEIGHTS = (0.0, 0.05, BM25_WEIGHT, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
"""What words may count beside the IEM."""
WARM_UP = 10
"""Queries that go through all settings before anything is measured."""
EXACT = Effort(exact=True)

Setting = TypeVar("Setting", bound=Hashable)
Figures = TypeVar("Figures")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of a query: the median, and what 95 % of the queries stay below."""

    p50: float
    p95: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """Those of measured queries."""
        return cls(float(np.median(milliseconds)), float(np.percentile(milliseconds, 95)))


@dataclass(frozen=True, slots=True)
class EffortFigures:
    """What searches with one `hnsw_ef` find: `recall` is the mean share of the exact nearest passages, `worst` that
    share at its 5 % quantile over the queries; `ms` of `QdrantIndex.recall`."""

    hnsw_ef: int
    recall: float
    worst: float
    ms: Latency


@dataclass(frozen=True, slots=True)
class EffortTable:
    """The figures by ascending `hnsw_ef`, `default` (a search without one) among them; `exact_ms` of exact search."""

    figures: list[EffortFigures]
    default: int
    exact_ms: Latency

    @property
    def of_default(self) -> EffortFigures:
        """The figures of the default."""
        return next(one for one in self.figures if one.hnsw_ef == self.default)

    def cheapest(self, target: float) -> EffortFigures:
        """Those of the smallest `hnsw_ef` whose recall reaches `target`; of the highest recall if none does."""
        return _cheapest(self.figures, lambda one: one.recall, target)


@dataclass(frozen=True, slots=True)
class OverfetchFigures:
    """What `candidates` of a small query encoder are worth: `held` is the mean share of the full encoder's top hits
    that is among them, `overlap` the share that is among the top hits after rescoring; `ms` of recall and rescoring."""

    candidates: int
    held: float
    overlap: float
    ms: Latency


@dataclass(frozen=True, slots=True)
class OverfetchTable:
    """The figures by ascending number of candidates, all searched for with `hnsw_ef` (None: the default)."""

    figures: list[OverfetchFigures]
    hnsw_ef: int | None

    def cheapest(self, target: float) -> OverfetchFigures:
        """Those of the fewest candidates that hold `target` of the full one's hits; of the highest share if none do."""
        return _cheapest(self.figures, lambda one: one.held, target)


@dataclass(frozen=True, slots=True)
class Bm25Figures:
    """What hybrid searches are worth when words count `weight` beside the IEM: mean nDCG@10; `difference` to the
    default weight's, with its 95 % confidence interval from `low` to `high`."""

    weight: float
    ndcg_10: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bm25Table:
    """The figures by ascending weight, `BM25_WEIGHT` among them, on the same judged queries."""

    figures: list[Bm25Figures]
    queries: int

    @property
    def best(self) -> Bm25Figures:
        """Those of the highest nDCG@10; of equals, of the smallest weight."""
        return max(self.figures, key=lambda one: one.ndcg_10)

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
    """What was measured of a collection of `passages`, with a `graph` or without, in searches for `candidates`.

    `target` is the share to be found: of the nearest passages, and of the full encoder's hits by the small one's
    candidates. `overfetch` is there if `efforts` has a small encoder, `words` if judgements were given.
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
        """The cheapest settings that reach the target with `encoder`, or the best of those measured."""
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
    found, ms = in_turns(searches, len(vectors_QE), progress)
    _require_some(found[EXACT][0])
    figures = []
    for hnsw_ef in ladder:
        ids_Q = found[Effort(hnsw_ef)]
        shares_Q = [overlap([ids], [exact], limit) for ids, exact in zip(ids_Q, found[EXACT], strict=True)]
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

    The truth is what the `full` encoder makes of the same queries: the `limit` nearest, by exact search, rescored.

    Raises:
        StoreError: the index is empty, missing, cannot be reached, or is in use.
        MismatchError: vectors or features of another width.
    """
    rescored = partial(_rescored, index, model, task)
    truth = [rescored(full, limit, EXACT, query)[1] for query in range(len(full))]
    _require_some(truth[0])
    numbers = sorted({math.ceil(multiple * limit) for multiple in OVERFETCH})
    searches = {number: partial(rescored, small, number, Effort(hnsw_ef)) for number in numbers}
    found, ms = in_turns(searches, len(small), progress)
    figures = []
    for number in numbers:
        candidates, hits = zip(*found[number], strict=True)
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

    `queries` are Q texts by their ids, `embeddings` what `model` makes of them, `qrels` judges them. The document that
    is the query `itself` is left out.

    Raises:
        DataError: fewer than two queries, or the collection has none of the documents that `qrels` judges.
        StoreError: the index is empty, missing, cannot be reached, or is in use.
        MismatchError: vectors or features of another width, or the index has no BM25 vectors.
    """
    if len(queries) < 2:
        raise DataError(f"weighing BM25 needs two or more judged queries, found {len(queries)}")
    qrels = {query: qrels[query] for query in queries}
    judged = sorted({document for grades in qrels.values() for document in grades})
    if not index.digests(judged):
        raise DataError(f"none of the {len(judged)} documents judged is in the collection, such as {judged[0]!r}")
    rankings = {weight: Ranking([]) for weight in WEIGHTS}
    known = index.digests(list(queries))
    for row, (query, text) in enumerate(tqdm(queries.items(), desc="weighing BM25", disable=not progress)):
        own = itself(query, qrels) if query in known else None
        candidates = _without(
            own, index.recall(embeddings.vectors[row], limit + (own is not None), query_text=text), limit
        )
        scores_K = _scores(model, task, embeddings, row, candidates)
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
    figures = []
    for weight, values in ndcg.items():
        test = paired_test(values, ndcg[BM25_WEIGHT])
        figures.append(Bm25Figures(weight, float(np.mean(values)), test["difference"], test["low"], test["high"]))
    return Bm25Table(figures, len(queries))


def _without(id_: str | None, candidates: Candidates, limit: int) -> Candidates:
    """The first `limit` candidates, but for the one of that id."""
    kept = [place for place, found in enumerate(candidates.ids) if found != id_][:limit]
    return Candidates(
        [candidates.ids[place] for place in kept],
        candidates.scores[kept],
        candidates.features[kept],
        [candidates.payloads[place] for place in kept],
        None if candidates.bm25_scores is None else candidates.bm25_scores[kept],
    )


def _cheapest(figures: Sequence[Figures], share: Callable[[Figures], float], target: float) -> Figures:
    return next((one for one in figures if share(one) >= target), max(figures, key=share))


def _require_some(ids: Sequence[str]) -> None:
    if not ids:
        raise StoreError("the index is empty: add documents first, with Index.add or `d2llm index`")


def _ids(index: QdrantIndex, vectors_QE: Floats, limit: int, effort: Effort, query: int) -> list[str]:
    return index.recall(vectors_QE[query], limit, effort=effort).ids


def _rescored(
    index: QdrantIndex, model: Model, task: Task, queries: Embeddings, limit: int, effort: Effort, query: int
) -> tuple[list[str], list[str]]:
    """The ids of the candidates, and those of the top hits."""
    candidates = index.recall(queries.vectors[query], limit, effort=effort)
    scores_K = _scores(model, task, queries, query, candidates)
    return candidates.ids, [hit.id for hit in rank(candidates, scores_K, DEPTH)]


def _scores(model: Model, task: Task, queries: Embeddings, query: int, candidates: Candidates) -> Floats:
    """What the IEM gives each candidate [K] of one of the queries."""
    features_1H, recall_1K = queries.features[None, query], candidates.scores[None]
    scores_K: Floats = model.score(features_1H, candidates.features[None], recall_1K, task)[0]
    return scores_K


def in_turns(
    searches: Mapping[Setting, Callable[[int], Answer]], queries: int, progress: bool
) -> tuple[dict[Setting, list[Answer]], dict[Setting, Latency]]:
    """What each search finds for queries 0, 1, ..., and the time it takes."""
    settings = list(searches)
    for query in range(min(WARM_UP, queries)):
        for setting in settings:
            searches[setting](query)
    answers: dict[Setting, list[Answer]] = {setting: [] for setting in settings}
    ms: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for query in tqdm(range(queries), unit="query", disable=not progress):
        first = query % len(settings)  # who goes first finds a cold cache: each in its turn
        for setting in settings[first:] + settings[:first]:
            start = time.perf_counter()
            answer = searches[setting](query)
            ms[setting].append((time.perf_counter() - start) * 1e3)
            answers[setting].append(answer)
    return answers, {setting: Latency.of(ms[setting]) for setting in settings}
