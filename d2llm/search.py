"""Search: recall from an index, then rescoring by the IEM. Knows neither torch nor Qdrant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from d2llm.errors import ArgumentError, DataError, StoreError
from d2llm.filters import check_filter
from d2llm.index import Index
from d2llm.model import Model
from d2llm.types import Candidates, Filter, Floats, Fusion, Hit, Task

WORDS_WEIGHT = 0.1
"""What BM25 counts beside the IEM in a hybrid search: the best of eight values on training queries of medquad, where
the model is at home. Where it is not, more is better (docs/results.md)."""

MAX_WORDS_WEIGHT = 1e6
"""From where on only the words count, and sums in float32 would come to an end."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The hits of one search and the seconds that each stage took: tokenise, encode, recall, rescore."""

    hits: list[Hit]
    candidates: int
    truncated: bool
    seconds: dict[str, float] = field(default_factory=dict)


class Searcher:
    """A model and an index that its passage encoder made."""

    def __init__(self, model: Model, index: Index, *, words_weight: float = WORDS_WEIGHT) -> None:
        """Check that the two belong together. `words_weight` is what BM25 counts beside the IEM in a hybrid search.

        Raises:
            ArgumentError: `words_weight` is negative, or above `MAX_WORDS_WEIGHT`.
            MismatchError: the index was made by another passage encoder.
            StoreError: there is no such index, or it cannot be reached.
        """
        if not 0 <= words_weight <= MAX_WORDS_WEIGHT:
            raise ArgumentError(f"words_weight must be from 0 to {MAX_WORDS_WEIGHT:,.0f}, found {words_weight}")
        index.open_for(model.config, create=False)
        self.model, self.index, self.words_weight = model, index, words_weight

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        recall: int = 100,
        filter: Filter | None = None,
        task: Task = "asymmetric",
        rescore: bool = True,
        hybrid: Fusion | None = None,
    ) -> list[Hit]:
        """The `k` best hits for `query`: the `recall` nearest by cosine, reordered by the IEM (unless not `rescore`).

        `hybrid` fuses the nearest by cosine with the best by BM25, in an index that keeps words; the words' score is
        then added to the IEM's (`add_words`).

        Cost: one query encoding, one index query for `recall` candidates and their features, one IEM call.

        Raises:
            DataError: the query is empty.
            StoreError: the index is empty, cannot be reached, or is in use.
            MismatchError: `hybrid`, and the index keeps no words.
            ArgumentError: `k` or `recall` below 1, `recall` below `k`, a filter of another form, an unknown task.
            TypeError: the query is no string.
        """
        return self.explain(query, k, recall=recall, filter=filter, task=task, rescore=rescore, hybrid=hybrid).hits

    def explain(
        self,
        query: str,
        k: int = 10,
        *,
        recall: int = 100,
        filter: Filter | None = None,
        task: Task = "asymmetric",
        rescore: bool = True,
        hybrid: Fusion | None = None,
    ) -> Explanation:
        """`search`, with the time that each stage took."""
        _check(query, k, recall, filter)
        seconds: dict[str, float] = {}
        encoded = self._encode(query, seconds)
        with _timed(seconds, "recall"):
            candidates = self.index.recall(encoded.vector_E, recall, filter=filter, **_words(query, hybrid))
        return self._explain(encoded, candidates, k, filter, task if rescore else None, seconds)

    async def asearch(
        self,
        query: str,
        k: int = 10,
        *,
        recall: int = 100,
        filter: Filter | None = None,
        task: Task = "asymmetric",
        rescore: bool = True,
        hybrid: Fusion | None = None,
    ) -> list[Hit]:
        """`search` for an event loop: a server is asked without a thread, and what computes runs in one."""
        _check(query, k, recall, filter)
        seconds: dict[str, float] = {}
        encoded = await asyncio.to_thread(self._encode, query, seconds)
        candidates = await self.index.arecall(encoded.vector_E, recall, filter=filter, **_words(query, hybrid))
        found = await asyncio.to_thread(
            self._explain, encoded, candidates, k, filter, task if rescore else None, seconds
        )
        return found.hits

    def _encode(self, query: str, seconds: dict[str, float]) -> _Encoded:
        with _timed(seconds, "tokenise"):
            tokens = self.model.query.tokenize([query])
        with _timed(seconds, "encode"):
            vectors_1E, features_1H = self.model.query.run(tokens, keep_features=True)
        return _Encoded(vectors_1E[0], features_1H, tokens[0].truncated)

    def _explain(
        self,
        query: _Encoded,
        candidates: Candidates,
        k: int,
        filter: Filter | None,
        task: Task | None,
        seconds: dict[str, float],
    ) -> Explanation:
        if not filter and not len(candidates):
            raise StoreError("the index is empty: add documents first, with Index.add or `d2llm index`")
        scores_K = None
        if task is not None and len(candidates):
            with _timed(seconds, "rescore"):
                features_1KH, recall_1K = candidates.features[None], candidates.scores[None]
                scores_K = self.model.score(query.features_1H, features_1KH, recall_1K, task)[0]
                if candidates.words is not None:
                    scores_K = add_words(scores_K, candidates.words, self.words_weight)
        hits = rank(candidates, scores_K, k)
        return Explanation(hits, len(candidates), query.truncated, seconds)


class _Encoded(NamedTuple):
    """A query's vector [E], and its features [1, H] where the model left them."""

    vector_E: Floats
    features_1H: Any
    truncated: bool


def _check(query: str, k: int, recall: int, filter: Filter | None) -> None:
    if not 1 <= k <= recall:
        raise ArgumentError(f"k must be at least 1 and at most recall; found k={k}, recall={recall}")
    if not isinstance(query, str):
        raise TypeError(f"expected one query, a string, found {query!r}")
    if not query.strip():
        raise DataError("the query is empty: there is nothing to search for")
    if filter:
        check_filter(filter)


def _words(query: str, hybrid: Fusion | None) -> dict[str, Any]:
    """What recall is told of the words: nothing, if it goes by cosine alone."""
    return {} if hybrid is None else {"words": query, "fusion": hybrid}


def add_words(iem_K: Floats, words_K: Floats, weight: float) -> Floats:
    """IEM scores [K] plus `weight` times the BM25 scores [K], these brought to the spread of the former among the
    candidates: the two have no scale in common."""
    spread = float(words_K.std())
    if spread == 0:
        return iem_K
    scores_K: Floats = iem_K + weight * iem_K.std() * (words_K - words_K.mean()) / spread
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
