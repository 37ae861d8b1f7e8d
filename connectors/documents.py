"""Documents in a collection: a document is one point or, if it is longer than the model's limit, several.

The points of a document are its passages. The first one, the head, decides which of the others count: those of the same
version (see `point_id`). So a document is replaced in one step, though the engines know no transactions.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from d2llm.errors import ChangedError, StoreError
from d2llm.index import check_points
from d2llm.types import RESERVED, Candidates, Point

from .collection import PAGE, Collection
from .engine import Search, SearchResult
from .filters import of_documents
from .points import (
    DIGEST,
    FEATURES,
    HEAD_KEYS,
    ID,
    PASSAGE,
    POINT,
    TIME,
    check_kept,
    completed,
    current,
    headless,
    is_head,
    living,
    own_payloads,
    point_ids,
    read_digests,
    read_ids,
    stored_points,
    tail_ids,
    versions,
    wider_searches,
)

TRIES = 4
"""How often a search is made, or documents are read, that are replaced meanwhile."""
SETTLED = 3600.0
"""Seconds after which a passage on a server that does not count is certainly not one that a job is just storing."""


class Documents:
    """The documents in a collection. Methods that are those of `QdrantIndex` are described there."""

    def __init__(self, collection: Collection) -> None:
        self._collection, self._engine = collection, collection.engine
        self._storing = threading.Lock()
        self._left_untidy: bool | None = None
        """Whether an earlier job left passages that this one has not looked for yet. None: not known."""
        self._swept = True
        """Whether all that was left has been removed."""

    def upsert(self, points: Sequence[Point]) -> None:
        metadata = self._collection.open()
        check_points(points, metadata.embedding_dim, metadata.feature_bytes)
        check_kept(points, metadata.options.kept, self._collection.where)
        self._collection.require_own_generation()
        stored = stored_points(points, metadata.feature_bytes, self._collection.bm25_encoder)
        heads = [point for point in stored if is_head(point)]
        if not heads:
            return
        tails = [point for point in stored if not is_head(point)]
        replaced = self._tails([head.id for head in heads]) - {tail.id for tail in tails}
        if not (tails or replaced):
            self._engine.upsert(heads)
            return
        with self._storing:
            self._untidy()
            if tails:
                self._engine.upsert(tails)
            self._engine.upsert(heads)  # from now on the new tails count, and the replaced ones do not: see `point_id`
            if replaced:
                self._engine.delete(sorted(replaced))

    def delete(self, ids: Iterable[str]) -> None:
        heads = point_ids(ids)
        self._collection.open()
        self._collection.require_own_generation()
        if heads:
            self._engine.delete([*heads, *sorted(self._tails(heads))])

    def get(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        heads = point_ids(ids)
        self._collection.open()
        for _ in range(TRIES if heads else 0):
            payloads = self._engine.retrieve(heads, without=f"{RESERVED}.{FEATURES}")
            tails = {id_: payload for payload in payloads for id_ in tail_ids(payload)}
            if tails:
                payloads += self._engine.retrieve([*tails], without=f"{RESERVED}.{FEATURES}")
            missing = tails.keys() - versions(payloads).keys()
            if not missing:
                return own_payloads(payloads)
            # A document was replaced between the two requests: ask again.
        if heads:
            id_ = tails[min(missing)][RESERVED][ID]
            raise StoreError(f"{self._collection.where}: passages of {id_!r} are missing: delete and index it again")
        return {}

    def points(self, ids: Iterable[str]) -> list[str]:
        """The points of all passages of the stored documents among `ids`, and `point_id` of those that are missing."""
        heads = point_ids(ids)
        self._collection.open()
        return [*heads, *sorted(self._tails(heads))] if heads else []

    def count(self, filter: Any = None) -> int:
        """How many documents pass `filter`, a condition of the engine. All pass None."""
        self._collection.open()
        return self._engine.count(of_documents(filter, self._engine.models))

    def search(self, searches: Sequence[Search], *, payloads: bool = True) -> list[SearchResult]:
        """The passages that each search finds, of the current versions of their documents. Without `payloads`, an
        engine may leave these out."""
        results, found = list[SearchResult](), list[SearchResult]()
        for _ in range(TRIES if searches else 0):
            results = self._engine.query(searches, payloads=payloads)
            missing = headless(results)
            found, complete = current(results, self.digests(missing) if missing else {})
            if complete:
                break
        if wider := wider_searches(searches, results, found):
            for row, result in zip(wider, self.search([*wider.values()], payloads=payloads), strict=True):
                found[row] = result.first(searches[row].limit)
        return found

    async def asearch(self, searches: Sequence[Search], *, payloads: bool = True) -> list[SearchResult]:
        """`search` in an event loop. It waits without a thread, unless the first passage of a document is to be asked
        for."""
        results, found = list[SearchResult](), list[SearchResult]()
        for _ in range(TRIES if searches else 0):
            results = await self._engine.aquery(searches, payloads=payloads)
            missing = headless(results)
            found, complete = current(results, await asyncio.to_thread(self.digests, missing) if missing else {})
            if complete:
                break
        if wider := wider_searches(searches, results, found):
            for row, result in zip(wider, await self.asearch([*wider.values()], payloads=payloads), strict=True):
                found[row] = result.first(searches[row].limit)
        return found

    def with_payloads(self, candidates: Candidates) -> Candidates:
        """Candidates that a search found without payloads, complete.

        Raises:
            ChangedError: the document of one has another version now, or is gone.
        """
        points = [payload[RESERVED][POINT] for payload in candidates.payloads]
        payloads = self._engine.retrieve(points, without=f"{RESERVED}.{FEATURES}")
        if (complete := completed(candidates, payloads)) is None:
            raise ChangedError(f"a document in {self._collection.where} was replaced during a search: search again")
        return complete

    def tidy(self) -> None:
        untidy = self._collection.open().untidy
        if self._left_untidy is None:
            self._left_untidy = untidy
        if self._left_untidy:
            self._swept, self._left_untidy = self.sweep(), False
        if untidy and self._swept:
            self._collection.remember(untidy=False)

    def _untidy(self) -> None:
        """Note that passages of several versions will be there, until `tidy`."""
        untidy = self._collection.open().untidy
        if self._left_untidy is None:
            self._left_untidy = untidy
        if not untidy:
            self._collection.remember(untidy=True)

    def sweep(self) -> bool:
        """Remove passages of versions that do not count, and say whether all are removed. On a server, another job may
        be about to make them count: those of the last hour stay."""
        youngest, clean = time.time() - (SETTLED if self._engine.shared else 0), True
        for page in self._engine.scroll(PAGE, only=[*HEAD_KEYS, f"{RESERVED}.{TIME}"]):
            with self._storing:
                payloads = [point.payload for point in page if not is_head(point)]
                rows = {*living(payloads, self.digests({payload[RESERVED][ID] for payload in payloads}))}
                dead = [payload for row, payload in enumerate(payloads) if row not in rows]
                old = [payload for payload in dead if payload[RESERVED][TIME] <= youngest]
                if old:
                    self._engine.delete([*versions(old)])
                clean = clean and len(old) == len(dead)
        return clean

    def _tails(self, heads: Sequence[str]) -> set[str]:
        """The points of the further passages of the documents that have these first ones."""
        return {id_ for payload in self._engine.retrieve(heads, only=HEAD_KEYS) for id_ in tail_ids(payload)}

    def ids(self) -> Iterator[str]:
        self._collection.open()
        for page in self._engine.scroll(PAGE, only=[f"{RESERVED}.{ID}", f"{RESERVED}.{PASSAGE}"]):
            yield from read_ids([point.payload for point in page])

    def digests(self, ids: Iterable[str]) -> dict[str, str]:
        points = point_ids(ids)
        self._collection.open()
        keys = [f"{RESERVED}.{ID}", f"{RESERVED}.{DIGEST}"]
        return read_digests(self._engine.retrieve(points, only=keys) if points else [])
