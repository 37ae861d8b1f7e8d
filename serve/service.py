"""`Service`: what the server does, without HTTP. It knows a model and an index, and no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import d2llm
from d2llm.corpus import parse_document
from d2llm.errors import ArgumentError, DataError
from d2llm.filters import why_nothing_passes
from d2llm.indexing import AddReport
from d2llm.search import Explanation, Searcher
from d2llm.types import Filter, Hit, Task, is_utf8

from .batching import Batcher
from .metrics import Metrics
from .settings import Settings
from .work import Add, Delete, Embed, Embedded, Pairs, Rerank, RerankStored, Scores, Search, Stored

MOST_QUERIES, MOST_TEXTS = 32, 64
"""Queries, and other texts, of several requests that are computed together."""
Side = Literal["query", "passage"]


class TooLarge(ArgumentError):
    """A request has more or longer texts than the service takes."""


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
        # Two queues, so that a search never waits for passages to be encoded.
        self._queries = self._queue("queries", MOST_QUERIES, self.settings.max_queue)
        self._passages = self._queue("passages", MOST_TEXTS, max(self.settings.max_queue, self.settings.max_texts))

    def _queue(self, name: str, most: int, room: int) -> Batcher:
        batcher = Batcher(most=most, room=room, observe=self.metrics.batch_observer(name))
        self.metrics.watch_queue(name, lambda: batcher.waiting)
        return batcher

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
            raise ArgumentError(
                f"expected at most {self.settings.max_k} candidates, found {merged.candidates}: ask for fewer, or "
                "start the service with a larger --max-k"
            )
        work = Search(self.searcher, merged, reasons, self.metrics.observe_stages)
        return await self._queries.submit(work, queries)

    def why_nothing(self, filter: Filter | None) -> list[str]:
        """Say why a search with this filter (None: the searcher's) has no hits: what the filter asks for in vain."""
        filter = self.searcher.options.filter if filter is None else filter
        if not self.index.count():
            return ["the collection has no documents"]
        return why_nothing_passes(filter or {}, self.index)

    async def embed(self, texts: Sequence[str], side: Side, *, truncate: bool = True) -> list[Embedded]:
        """Return the vectors of queries or passages. Without `truncate`, a text above the model's limit is refused.

        Raises:
            TooLarge: more or longer texts than allowed.
            Busy: too many texts wait.
            DataError: a text is empty.
        """
        self._check_texts(texts, "text", "texts")
        if side == "query":
            found = await self._queries.submit(Embed(self.model.query), texts)
        else:
            found = await self._passages.submit(Embed(self.model.document), texts)
        if not truncate and (cut := [number for number, each in enumerate(found) if each.truncated]):
            config = self.model.config
            limit = config.query_max_length if side == "query" else config.document_max_length
            raise TooLarge(f"text {cut[0]} has more than {limit} tokens: shorten it, or leave truncate out to cut it")
        return found

    async def rerank(
        self, query: str, texts: Sequence[str], *, task: Task | None = None, truncate: bool = True
    ) -> list[float]:
        """Return the score of each text with the query, as a search would score it as a passage.

        Raises:
            TooLarge: more or longer texts than allowed; without `truncate` also for the model's limits.
            Busy: too many texts wait.
            DataError: a text is empty.
        """
        self._check_texts([query], "query", "queries")
        self._check_texts(texts, "text", "texts")
        work = Rerank(self.model, self.index, self.searcher.options.task if task is None else task)
        found: Scores = (await self._passages.submit(work, [Pairs(query, texts)], size=len(texts)))[0]
        if found.truncated and not truncate:
            raise TooLarge("a text has more tokens than the model reads: shorten it, or leave truncate out to cut it")
        return list(found.scores)

    async def rerank_stored(self, query: str, ids: Sequence[str], *, task: Task | None = None) -> list[Hit]:
        """Rank stored documents, see `Searcher.rerank`. Only the query is encoded.

        Raises:
            TooLarge: a longer query or more ids than allowed.
            Busy: too many queries wait.
            DataError: the query is empty, or an id cannot be written as UTF-8.
        """
        self._check_texts([query], "query", "queries")
        self._check_number(ids, "ids")
        work = RerankStored(self.searcher, self.searcher.options.task if task is None else task)
        return (await self._queries.submit(work, [Stored(query, ids)]))[0]

    async def add(self, documents: Sequence[Mapping[str, Any]], *, chunk: bool = True) -> AddReport:
        """Store documents. They are on the disk when this returns.

        Raises:
            TooLarge: more documents than allowed.
            Busy: too many texts wait.
            DataError: a document that no index can store. Then none is stored.
        """
        self._check_number(documents, "documents")
        parsed = [parse_document(document, f"document {number}") for number, document in enumerate(documents)]
        if len({document.id for document in parsed}) < len(parsed):
            raise DataError("an id occurs twice among the documents: give each its own")
        return (await self._passages.submit(Add(self.index, self.model, chunk), [parsed], size=len(parsed)))[0]

    async def delete(self, ids: Sequence[str]) -> int:
        """Remove documents, and return how many of them were there.

        Raises:
            TooLarge: more ids than allowed.
            Busy: too many texts wait.
        """
        self._check_number(ids, "ids")
        return (await self._passages.submit(Delete(self.index), [ids]))[0]

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
        self._passages.close()

    def _check_texts(self, texts: Sequence[str], what: str, plural: str) -> None:
        """Refuse what would fail, or take too long, before it waits with others."""
        self._check_number(texts, plural)
        most = self.settings.max_length
        for number, text in enumerate(texts):
            if len(text) > most:
                raise TooLarge(f"{what} {number} has {len(text)} characters, the most is {most}: shorten it")
            if not is_utf8(text):
                raise DataError(f"{what} {number} cannot be written as UTF-8: it has half of a surrogate pair")
            if not text.strip():
                raise DataError(f"{what} {number} of {len(texts)} is empty: type at least one word")

    def _check_number(self, values: Sequence[Any], plural: str) -> None:
        if len(values) > self.settings.max_texts:
            raise TooLarge(
                f"expected at most {self.settings.max_texts} {plural}, found {len(values)}: send several requests"
            )
