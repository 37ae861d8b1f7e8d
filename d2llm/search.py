"""Search: recall from an index, then rescoring by the IEM. Knows neither torch nor Qdrant."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from d2llm.errors import DataError, StoreError
from d2llm.index import Index, check_filter
from d2llm.model import Model
from d2llm.types import Candidates, Filter, Floats, Hit, Task


@dataclass(frozen=True, slots=True)
class Explanation:
    """The hits of one search and the seconds that each stage took: tokenise, encode, recall, rescore."""

    hits: list[Hit]
    candidates: int
    truncated: bool
    seconds: dict[str, float] = field(default_factory=dict)


class Searcher:
    """A model and an index that its passage encoder made."""

    def __init__(self, model: Model, index: Index) -> None:
        """Check that the two belong together.

        Raises:
            MismatchError: the index was made by another passage encoder.
            StoreError: there is no such index, or it cannot be reached.
        """
        index.open_for(model.config, create=False)
        self.model, self.index = model, index

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        recall: int = 100,
        filter: Filter | None = None,
        task: Task = "asymmetric",
        rescore: bool = True,
    ) -> list[Hit]:
        """The `k` best hits for `query`: the `recall` nearest by cosine, reordered by the IEM (unless not `rescore`).

        Cost: one query encoding, one index query for `recall` candidates and their features, one IEM call.

        Raises:
            DataError: the query is empty.
            StoreError: the index is empty, cannot be reached, or is in use.
            ValueError: `k` or `recall` below 1, `recall` below `k`, a filter of another form, an unknown task.
        """
        return self.explain(query, k, recall=recall, filter=filter, task=task, rescore=rescore).hits

    def explain(
        self,
        query: str,
        k: int = 10,
        *,
        recall: int = 100,
        filter: Filter | None = None,
        task: Task = "asymmetric",
        rescore: bool = True,
    ) -> Explanation:
        """`search`, with the time that each stage took."""
        if not 1 <= k <= recall:
            raise ValueError(f"k must be at least 1 and at most recall; found k={k}, recall={recall}")
        if not query.strip():
            raise DataError("the query is empty: there is nothing to search for")
        if filter:
            check_filter(filter)
        seconds: dict[str, float] = {}
        with _timed(seconds, "tokenise"):
            tokens = self.model.query.tokenize([query])
        with _timed(seconds, "encode"):
            vectors_1E, features_1H = self.model.query.run(tokens, keep_features=True)
        with _timed(seconds, "recall"):
            candidates = self.index.recall(vectors_1E[0], recall, filter=filter)
        if not filter and not len(candidates):
            raise StoreError("the index is empty: add documents first, with Index.add or `d2llm index`")
        scores_K = candidates.scores
        if rescore and len(candidates):
            with _timed(seconds, "rescore"):
                scores_K = self.model.score(features_1H, candidates.features[None], candidates.scores[None], task)[0]
        hits = rank(candidates, scores_K, k)
        return Explanation(hits, len(candidates), tokens[0].truncated, seconds)


def rank(candidates: Candidates, scores_K: Floats, k: int) -> list[Hit]:
    """The `k` candidates with the highest score; equal scores keep their order of recall."""
    best = np.argsort(-scores_K, kind="stable")[:k]
    return [
        Hit(candidates.ids[i], float(scores_K[i]), float(candidates.scores[i]), int(i) + 1, candidates.payloads[i])
        for i in best
    ]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
