"""Search: recall from an index, then rescoring by the IEM. Knows neither torch nor Qdrant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypedDict, Unpack, get_args

import numpy as np

from d2llm.deprecated import renamed
from d2llm.errors import ArgumentError, DataError, StoreError
from d2llm.filters import check_filter
from d2llm.index import Index
from d2llm.model import Model
from d2llm.types import Candidates, Filter, Floats, Fusion, Hit, Task, task_id

BM25_WEIGHT = 0.1
"""What BM25 counts beside the IEM in a hybrid search: the best of eight values on training queries of medquad, a domain
that the model was trained on. In other domains a higher weight is better (docs/results.md)."""

MAX_BM25_WEIGHT = 1e6
"""Above this weight only BM25 counts, and sums in float32 overflow."""

OLD_NAMES = {"recall": "candidates", "words_weight": "bm25_weight"}
"""Options that had another name in the last release."""


class SearchKeywords(TypedDict, total=False):
    """The fields of `SearchOptions` but `k`, as keyword arguments."""

    candidates: int
    filter: Filter | None
    task: Task
    rescore: bool
    hybrid: Fusion | None
    bm25_weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """How to search.

    Raises:
        ArgumentError: `k` or `candidates` below 1, `candidates` below `k`, an unknown task or fusion, a filter of
            another form, a weight that is negative or above `MAX_BM25_WEIGHT`.

    Example:
        >>> options = SearchOptions(k=3, candidates=50)
        >>> options.changed({"filter": {"lang": "en"}}).filter
        {'lang': 'en'}
    """

    k: int = 10
    """Hits to return."""
    candidates: int = 100
    """Passages that recall fetches and the IEM rescores."""
    filter: Filter | None = None
    """Only passages whose payload passes; see `Filter`."""
    task: Task = "asymmetric"
    """The branch of the IEM."""
    rescore: bool = True
    """Whether the IEM orders the candidates; otherwise recall does."""
    hybrid: Fusion | None = None
    """How recall fuses the nearest passages by cosine with the best by BM25; None recalls by cosine alone."""
    bm25_weight: float = BM25_WEIGHT
    """What BM25 counts beside the IEM in a hybrid search (`add_bm25`)."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.candidates:
            raise ArgumentError(
                f"k must be at least 1 and at most candidates; found k={self.k}, candidates={self.candidates}"
            )
        task_id(self.task)
        if self.hybrid is not None and self.hybrid not in get_args(Fusion):
            raise ArgumentError(f"unknown fusion {self.hybrid!r}: choose one of {', '.join(get_args(Fusion))}, or None")
        if not 0 <= self.bm25_weight <= MAX_BM25_WEIGHT:
            raise ArgumentError(f"bm25_weight must be from 0 to {MAX_BM25_WEIGHT:,.0f}, found {self.bm25_weight}")
        if self.filter:
            check_filter(self.filter)

    def changed(self, changes: Mapping[str, Any]) -> SearchOptions:
        """These options with `changes`, which may use the names of the last release.

        Raises:
            ArgumentError: see the class.
            TypeError: there is no option of that name.
        """
        return replace(self, **renamed(changes, OLD_NAMES))


@dataclass(frozen=True, slots=True)
class Explanation:
    """The hits of one search and the seconds that each stage took: tokenise, encode, recall, rescore."""

    hits: list[Hit]
    candidates: int
    truncated: bool
    seconds: dict[str, float] = field(default_factory=dict)


class Searcher:
    """A model and an index that the model's passage encoder made.

    Example:
        >>> index = d2llm.FlatIndex()
        >>> report = index.add(model, [{"id": "a", "text": "Refunds take five days."}])
        >>> d2llm.Searcher(model, index).search("how long does a refund take?")[0].id
        'a'
    """

    def __init__(self, model: Model, index: Index, **options: Unpack[SearchKeywords]) -> None:
        """Check that model and index belong together. `options` are the defaults of every search.

        Raises:
            ArgumentError: an option out of range; see `SearchOptions`.
            MismatchError: another passage encoder made the index.
            StoreError: there is no such index, or it cannot be reached.
        """
        self.options = SearchOptions().changed(options)
        index.open_for(model.config, create=False)
        self.model, self.index = model, index

    def search(self, query: str, k: int | None = None, **options: Unpack[SearchKeywords]) -> list[Hit]:
        """The `k` best hits for `query`: recall fetches the nearest passages by cosine, the IEM reorders them.

        `options` are fields of `SearchOptions`; those that are not given are the searcher's own.

        Cost: one query encoding, one index query for the candidates and their features, one IEM call.

        Raises:
            DataError: the query is empty.
            StoreError: the index is empty, cannot be reached, or is in use.
            MismatchError: a hybrid search, and the index has no BM25 vectors.
            ArgumentError: an option out of range; see `SearchOptions`.
            TypeError: the query is no string, or there is no option of that name.
        """
        return self.explain(query, k, **options).hits

    def explain(self, query: str, k: int | None = None, **options: Unpack[SearchKeywords]) -> Explanation:
        """`search`, with the time that each stage took."""
        chosen = self._chosen(k, options)
        _check_query(query)
        seconds: dict[str, float] = {}
        encoded = self._encode(query, seconds)
        with _timed(seconds, "recall"):
            candidates = self.index.recall(
                encoded.vector_E, chosen.candidates, filter=chosen.filter, **_hybrid(query, chosen)
            )
        return self._explain(encoded, candidates, chosen, seconds)

    async def asearch(self, query: str, k: int | None = None, **options: Unpack[SearchKeywords]) -> list[Hit]:
        """`search` for an event loop: it awaits a server without a thread, and computes in one."""
        chosen = self._chosen(k, options)
        _check_query(query)
        seconds: dict[str, float] = {}
        encoded = await asyncio.to_thread(self._encode, query, seconds)
        candidates = await self.index.arecall(
            encoded.vector_E, chosen.candidates, filter=chosen.filter, **_hybrid(query, chosen)
        )
        explanation = await asyncio.to_thread(self._explain, encoded, candidates, chosen, seconds)
        return explanation.hits

    def _chosen(self, k: int | None, options: Mapping[str, Any]) -> SearchOptions:
        return self.options.changed(options if k is None else {**options, "k": k})

    def _encode(self, query: str, seconds: dict[str, float]) -> _Encoded:
        with _timed(seconds, "tokenise"):
            tokens = self.model.query.tokenize([query])
        with _timed(seconds, "encode"):
            vectors_1E, features_1H = self.model.query.run(tokens, keep_features=True)
        return _Encoded(vectors_1E[0], features_1H, tokens[0].truncated)

    def _explain(
        self, query: _Encoded, candidates: Candidates, options: SearchOptions, seconds: dict[str, float]
    ) -> Explanation:
        if not options.filter and not len(candidates):
            raise StoreError("the index is empty: add documents first, with Index.add or `d2llm index`")
        scores_K = None
        if options.rescore and len(candidates):
            with _timed(seconds, "rescore"):
                features_1KH, recall_1K = candidates.features[None], candidates.scores[None]
                scores_K = self.model.score(query.features_1H, features_1KH, recall_1K, options.task)[0]
                if candidates.bm25_scores is not None:
                    scores_K = add_bm25(scores_K, candidates.bm25_scores, options.bm25_weight)
        return Explanation(rank(candidates, scores_K, options.k), len(candidates), query.truncated, seconds)


class _Encoded(NamedTuple):
    """A query's vector [E], and its features [1, H] where the model left them."""

    vector_E: Floats
    features_1H: Any
    truncated: bool


def _check_query(query: str) -> None:
    if not isinstance(query, str):
        raise TypeError(f"expected one query, a string, found {query!r}")
    if not query.strip():
        raise DataError("the query is empty: there is nothing to search for")


def _hybrid(query: str, options: SearchOptions) -> dict[str, Any]:
    """The arguments of `Index.recall` for a hybrid search; none for a search by cosine alone."""
    return {} if options.hybrid is None else {"query_text": query, "fusion": options.hybrid}


def add_bm25(iem_K: Floats, bm25_K: Floats, weight: float) -> Floats:
    """IEM scores [K] plus `weight` times the BM25 scores [K].

    The two have no scale in common, so the BM25 scores are first shifted to mean 0 and scaled to the standard deviation
    that the IEM scores have among the candidates.
    """
    spread = float(bm25_K.std())
    if spread == 0:
        return iem_K
    scores_K: Floats = iem_K + weight * iem_K.std() * (bm25_K - bm25_K.mean()) / spread
    return scores_K


def rank(candidates: Candidates, scores_K: Floats | None, k: int) -> list[Hit]:
    """The `k` candidates with the highest score; equal scores keep their order of recall, and without scores all do."""
    best = range(len(candidates)) if scores_K is None else np.argsort(-scores_K, kind="stable").tolist()
    scores_K = candidates.scores if scores_K is None else scores_K
    return [
        Hit(candidates.ids[i], float(scores_K[i]), float(candidates.scores[i]), i + 1, candidates.payloads[i])
        for i in best[:k]
    ]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
