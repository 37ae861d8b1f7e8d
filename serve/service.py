"""`Service`: what the server does, without HTTP. It knows a model and an index, and no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import d2llm
from d2llm.errors import ArgumentError, DataError
from d2llm.search import Explanation, Searcher, SearchOptions

from .batching import Batcher
from .metrics import Metrics
from .settings import Settings

MOST_QUERIES = 32
"""Queries that are encoded and scored together."""


class TooLarge(ArgumentError):
    """A request has more or longer texts than the service takes."""


@dataclass(frozen=True)
class Search:
    """Search for queries with the same options. `reasons` also tells why the candidates have their scores."""

    searcher: Searcher
    options: SearchOptions
    reasons: bool = False

    def __call__(self, queries: list[str]) -> list[Explanation]:
        """Return one explanation for each query."""
        options = asdict(self.options)
        return [self.searcher.explain(query, reasons=self.reasons, **options) for query in queries]


class Service:
    """The verbs of the server, for an event loop. Close it at the end: what waits is still answered."""

    def __init__(
        self,
        searcher: Searcher,
        settings: Settings | None = None,
        *,
        metrics: Metrics | None = None,
        name: str = "",
        collection: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """`name` is that of the model. `collection` returns facts about the collection, for `info`."""
        self.searcher, self.model, self.index = searcher, searcher.model, searcher.index
        self.settings, self.name, self._collection = settings or Settings(), name, collection
        self.metrics = metrics or Metrics()
        self._queries = Batcher(
            most=MOST_QUERIES, room=self.settings.max_queue, observe=self.metrics.batch_observer("queries")
        )
        self.metrics.watch_queue("queries", lambda: self._queries.waiting)

    async def search(
        self, queries: Sequence[str], options: Mapping[str, Any], *, reasons: bool = False
    ) -> list[Explanation]:
        """Return the hits of each query. `options` are fields of `SearchOptions`, in place of the searcher's.

        Raises:
            TooLarge: more or longer queries, or a larger `k`, than the settings allow.
            Busy: too many queries wait.
            D2LLMError: see `Searcher.search`.
        """
        self._check_texts(queries, "query", "queries")
        merged = self.searcher.options.changed(options)
        if merged.candidates > self.settings.max_k:  # k is not larger
            raise ArgumentError(f"expected at most {self.settings.max_k} candidates, found {merged.candidates}")
        found = await self._queries.submit(Search(self.searcher, merged, reasons), queries)
        for explanation in found:
            self.metrics.observe_stages(explanation.seconds)
        return found

    def info(self) -> dict[str, Any]:
        """Facts about the model, the collection and the limits."""
        config = self.model.config
        return {
            "version": d2llm.__version__,
            "model": {
                "name": self.name,
                "fingerprint": config.fingerprint,
                "precision": config.precision,
                "device": self.model.device,
                "query_encoder": self.model.query_encoder,
                "embedding_dim": config.embedding_dim,
                "feature_bytes": config.feature_bytes,
                "query_max_length": config.query_max_length,
                "document_max_length": config.document_max_length,
                "parts": config.parts,
                "scales": self.index.scales_for(config),
                "tasks": config.tasks,
            },
            "collection": {"documents": self.index.count(), **self._collection()},
            "writable": self.settings.writable,
            "limits": {
                name: getattr(self.settings, name)
                for name in ("max_body", "max_texts", "max_length", "max_k", "max_queue")
            },
        }

    def close(self) -> None:
        """Answer what waits. The index stays open."""
        self._queries.close()

    def _check_texts(self, texts: Sequence[str], what: str, plural: str) -> None:
        """Refuse what would fail, or take too long, before it waits with others."""
        settings = self.settings
        if len(texts) > settings.max_texts:
            raise TooLarge(f"expected at most {settings.max_texts} {plural}, found {len(texts)}: send several requests")
        for number, text in enumerate(texts):
            if len(text) > settings.max_length:
                raise TooLarge(
                    f"{what} {number} has {len(text)} characters, the most is {settings.max_length}: shorten it"
                )
            if not text.strip():
                raise DataError(f"{what} {number} of {len(texts)} is empty: type at least one word")
