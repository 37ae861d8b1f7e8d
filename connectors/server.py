"""A collection on a Qdrant server or cluster, through qdrant-client."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2llm.errors import StoreError, import_extra
from d2llm.files import replaced
from d2llm.types import RESERVED

from .engine import Engine, Search, SearchResult, State, StoredPoint, passages_in_graphs
from .schema import HNSW_MIN_KB, CollectionOptions, Metadata, PayloadType
from .server_calls import Connection, ServerCalls
from .server_errors import SEARCH, status_of
from .server_requests import (
    alias_steps,
    batches,
    collection_settings,
    having,
    search_requests,
    search_results,
    stored_point,
)

logger = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between two looks at a server that builds its graphs."""
SETTLED = 3
"""Times in a row that a server must report that it is done: when first asked, an optimizer may not have begun yet."""
BEGIN_PATIENCE = 60.0
"""Seconds within which a server must begin the optimizations that it put off (grey), once a write asked for them."""
STALLED = 600.0
"""Seconds without progress after which a warning is logged. A server counts the passages of a graph when the graph is
complete, which can take hours. So a warning need not mean a fault."""


def pages(scroll: Callable[..., tuple[list[Any], Any]]) -> Iterator[list[Any]]:
    """What repeated calls of `scroll` return, each from the offset where the one before ended."""
    offset = None
    while True:
        records, offset = scroll(offset=offset)
        yield records
        if offset is None:
            return


class ServerEngine(Engine):
    """One collection on a server."""

    shared = True

    def __init__(self, collection: str, connection: Connection) -> None:
        self._collection, self._connection = collection, connection
        self._calls = ServerCalls(connection, collection)
        self._where = f"collection {collection!r} at {self._calls.url}"
        self._options, self._vector_bytes = CollectionOptions(), 0

    def connect(self) -> None:
        self.models = import_extra("qdrant_client.models", "qdrant")
        self._calls.connect()

    def peek(self) -> Metadata | None:
        self.connect()
        if not self._call(self._client.collection_exists):
            return None
        return Metadata.parse((self.info().config.metadata or {}).get(RESERVED), self._where)

    def remember(self, metadata: Metadata) -> None:
        self._update(metadata={RESERVED: metadata.to_json()})

    def open(self) -> Metadata | None:
        if (metadata := self.peek()) is not None:
            self._options, self._vector_bytes = metadata.options, metadata.vector_bytes
        return metadata

    def create(self, metadata: Metadata) -> None:
        self._options, self._vector_bytes = metadata.options, metadata.vector_bytes
        settings = collection_settings(metadata, self.models)
        try:
            self._call(
                self._client.create_collection,
                **settings,
                metadata={RESERVED: metadata.to_json()},
                timeout=self._connection.seconds,
            )
        except StoreError as error:
            # An earlier try may have made this collection, and its answer was lost.
            if status_of(error) != "ALREADY_EXISTS" or self.open() != metadata:
                raise

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        for batch in batches(points, self.models):
            self._write(self._client.upsert, points=batch)

    def query(self, searches: Sequence[Search], *, payloads: bool = True) -> list[SearchResult]:
        requests = search_requests(searches, self.models)
        answers = self._call(self._client.query_batch_points, repeated=SEARCH, **self._read, requests=requests)
        return search_results(searches, answers)

    async def aquery(self, searches: Sequence[Search], *, payloads: bool = True) -> list[SearchResult]:
        client, requests = await self._calls.async_client(), search_requests(searches, self.models)
        named = {"collection_name": self._collection, **self._read}
        return search_results(searches, await self._calls.acall(client.query_batch_points, **named, requests=requests))

    def retrieve(self, ids: Sequence[str], *, without: str = "", only: Sequence[str] = ()) -> list[dict[str, Any]]:
        models = self.models
        keys = (
            models.PayloadSelectorInclude(include=list(only))
            if only
            else models.PayloadSelectorExclude(exclude=[without])
        )
        records = self._call(self._client.retrieve, **self._read, ids=list(ids), with_payload=keys)
        return [record.payload or {} for record in records]

    def scroll(self, size: int, *, only: Sequence[str] = (), vectors: bool = False) -> Iterator[list[StoredPoint]]:
        keys = self.models.PayloadSelectorInclude(include=list(only)) if only else True
        for page in self.records(size, with_payload=keys, with_vectors=vectors):
            yield [stored_point(record) for record in page]

    def records(self, size: int, **selected: Any) -> Iterator[list[Any]]:
        """All points as the client has them, in pages of `size`. `selected` are arguments of its `scroll`."""
        return pages(functools.partial(self._call, self._client.scroll, **self._read, limit=size, **selected))

    def delete(self, ids: Sequence[str]) -> None:
        self._write(self._client.delete, points_selector=self.models.PointIdsList(points=list(ids)))

    def delete_where(self, filter: Any) -> None:
        self._write(self._client.delete, points_selector=self.models.FilterSelector(filter=filter))

    def count(self, filter: Any) -> int:
        seconds = self._connection.seconds
        return int(self._call(self._client.count, count_filter=filter, exact=True, timeout=seconds).count)

    def state(self) -> State:
        info = self.info()
        deferred = info.config.optimizer_config.indexing_threshold == 0
        status = {"green": "ready", "yellow": "building", "grey": "waiting"}.get(info.status.value)
        schema = {path: str(field.data_type.value) for path, field in (info.payload_schema or {}).items()}
        points = info.points_count or 0
        if status is None:
            status = f"{info.status.value}: {info.optimizer_status}"
        return State(points, self._indexed(info), "deferred" if deferred else status, schema, None)

    def _indexed(self, info: Any) -> int:
        kept = sum(map(self.count, having(self._options.kept, self.models)))
        return passages_in_graphs(info.indexed_vectors_count or 0, info.points_count or 0, self._options, kept)

    def index_payload(self, fields: Mapping[str, PayloadType]) -> None:
        indexed = self.info().payload_schema or {}
        for path, kind in fields.items():
            if path not in indexed or indexed[path].data_type.value != kind:
                # Without an ordering, which clients before 1.20 cannot send over gRPC.
                self._call(self._client.create_payload_index, field_name=path, field_schema=kind, wait=True)

    def defer(self) -> None:
        self._set_threshold(0)

    def resume(self) -> None:
        if self.info().config.optimizer_config.indexing_threshold == 0:
            self._set_threshold(HNSW_MIN_KB)

    def optimize(self) -> None:
        """Wait until the server has built its graphs, which it does by itself: until it reports so and the counts
        agree."""
        self.resume()  # from a load that was killed
        status = self.models.CollectionStatus
        settled, before, moved, asked = 0, -1, time.monotonic(), None
        while settled < SETTLED:
            info = self.info()
            indexed, now = self._indexed(info), time.monotonic()
            if info.status == status.RED:
                raise StoreError(
                    f"the server at {self._calls.url} could not index {self._collection!r}: see its log "
                    f"({info.optimizer_status})"
                )
            asked = self._begin(asked, now) if info.status == status.GREY else None
            green = info.status == status.GREEN
            left = ((info.points_count or 0) - indexed) * self._vector_bytes
            if green and left <= HNSW_MIN_KB * 1024 * info.segments_count:
                return
            # A green server that indexes no more is done too: it may keep more and smaller segments than counted here.
            settled = settled + 1 if green and indexed == before else 0
            if indexed != before:
                before, moved = indexed, now
            elif now - moved > STALLED:
                self._report(info, "still builds")
                moved = now
            time.sleep(POLL)
        self._report(info, "is done")

    def _begin(self, asked: float | None, now: float) -> float:
        """Make a server begin the optimizations that it found when it started and puts off until the next write (grey).
        Returns when it was asked to: now, unless it was `asked` before.

        Raises:
            StoreError: it has not begun in time.
        """
        if asked is None:
            self._update(optimizers_config=self.models.OptimizersConfigDiff())  # counts as a write, and changes nothing
            return now
        if now - asked > BEGIN_PATIENCE:
            raise StoreError(
                f"the server at {self._calls.url} does not begin to index {self._collection!r} (it calls it grey): see "
                "its log. All that is stored is there and found, but passages are compared one by one"
            )
        return asked

    def _report(self, info: Any, progress: str) -> None:
        logger.warning(
            "%s at %s: the server %s, with %d of %d passages in its graphs; the others are compared one by one",
            self._collection, self._calls.url, progress, self._indexed(info), info.points_count,
        )  # fmt: skip

    def collections(self) -> tuple[list[str], dict[str, str]]:
        return self._calls.collections()

    def point_alias(self, alias: str) -> None:
        aliases, seconds = self.collections()[1], self._connection.seconds
        name = aliases.get(self._collection, self._collection)  # the server refuses an alias of an alias
        steps = alias_steps(alias, name, alias in aliases, self.models)
        self._calls.call(self._client.update_collection_aliases, change_aliases_operations=steps, timeout=seconds)

    def snapshot(self, file: Path) -> None:
        """Let the server make a snapshot, fetch it, and remove it from the server."""
        # The file is opened before the server begins: it may not be writable.
        with self._calls.snapshots(file) as http, replaced(file) as staging, open(staging, "wb") as out:
            name = http.post("snapshots", params={"wait": "true"}).json()["result"]["name"]
            try:
                with http.stream("GET", f"snapshots/{name}") as answer:
                    for chunk in answer.iter_bytes():
                        out.write(chunk)
            finally:
                http.delete(f"snapshots/{name}")

    def restore(self, file: Path) -> None:
        with self._calls.snapshots(file) as http, open(file, "rb") as content:
            options = {"priority": "snapshot", "wait": "true"}
            http.post("snapshots/upload", params=options, files={"snapshot": (file.name, content)})

    def drop(self) -> None:
        self._call(self._client.delete_collection, timeout=self._connection.seconds)

    def close(self) -> None:
        self._calls.close()

    async def aclose(self) -> None:
        await self._calls.aclose()

    @property
    def _client(self) -> Any:
        return self._calls.client

    @property
    def _read(self) -> dict[str, Any]:
        """How points are read."""
        consistency = self._connection.read_consistency
        if isinstance(consistency, str):
            consistency = self.models.ReadConsistencyType(consistency)
        return {"consistency": consistency, "timeout": self._connection.seconds}

    def _call(self, method: Callable[..., Any], **arguments: Any) -> Any:
        return self._calls.call(method, collection_name=self._collection, **arguments)

    def info(self) -> Any:
        """What the server says about the collection."""
        return self._call(self._client.get_collection)

    def _write(self, method: Callable[..., Any], **arguments: Any) -> None:
        """Change points."""
        ordering = self._connection.write_ordering
        if ordering is not None:
            arguments["ordering"] = self.models.WriteOrdering(ordering)
        self._call(method, **arguments, wait=True)

    def _set_threshold(self, kilobytes: int) -> None:
        self._update(optimizers_config=self.models.OptimizersConfigDiff(indexing_threshold=kilobytes))

    def _update(self, **settings: Any) -> None:
        """Change settings of the collection."""
        self._call(self._client.update_collection, **settings, timeout=self._connection.seconds)
