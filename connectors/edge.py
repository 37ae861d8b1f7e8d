"""The embedded engine: Qdrant Edge, the server's own storage, in this process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from d2llm.errors import StoreError, import_extra
from d2llm.files import new_folder
from d2llm.types import RESERVED

from . import edge_folder
from .cache import FeatureCache
from .edge_folder import SHARD, CollectionFolder, collections_in, engine_errors
from .edge_requests import collection_config, having, hybrid, nearest, stored_point, upsert_operation
from .engine import Engine, Search, SearchResult, State, StoredPoint, merged_hits, passages_in_graphs
from .schema import HNSW_MIN_KB, CollectionOptions, Metadata, PayloadType

CHUNK = 512
ROOM = 128 * 2**20
"""Bytes that must be free on the disk before anything is written: four times what the engine adds to a file at once."""
INDEXING_THRESHOLD_KB: int | None = None
"""Vectors in a segment from which `optimize` indexes it. The engine's own default is 10 MB, which a search scans in
half a millisecond."""

_OPTIMIZE = """
import sys, qdrant_edge
shard = qdrant_edge.EdgeShard.load(sys.argv[1])
shard.optimize()
shard.flush()
shard.close()
"""


class EdgeEngine(Engine):
    """One collection in a folder: one shard, which serves one call at a time.

    The engine never releases the interpreter lock, so several calls at a time would gain nothing.
    """

    def __init__(self, location: Path, collection: str) -> None:
        self._files = CollectionFolder(location, collection)
        self._shard: Any = None
        self._options, self._vector_bytes, self._cache = CollectionOptions(), 0, FeatureCache(0)
        self._lock = threading.RLock()  # on the shard
        self._writing = threading.RLock()  # taken before `_lock` by whoever changes what is stored
        self._building = threading.RLock()  # taken before both by whoever changes the shard's files
        self._touched: set[str] | None = None  # points that changed while another shard is being built

    # ---- the life of the shard ----

    def peek(self) -> Metadata | None:
        with self._errors():
            return self._files.metadata()

    def remember(self, metadata: Metadata) -> None:
        with self._building, self._errors():
            self._files.write({**self._files.read(), **metadata.to_json()})

    def open(self) -> Metadata | None:
        self.models = import_extra("qdrant_edge", "qdrant")
        with self._calling():
            self._files.look_up()
            if self._files.missing():
                return None
            with self._files.holding():
                if not self._files.missing() and not self._files.has_moved():
                    return self._open_held()
            self._files.release()  # dropped, or the alias moved, since we looked
            return self.open()

    def _open_held(self) -> Metadata:
        content = self._files.read()
        metadata = Metadata.parse(content, str(self._files.path))
        self._know(metadata)
        shard = self._files.path / content.get("shard", SHARD)
        self._shard = self._load(shard)
        for path in self._files.shards():
            if path != shard:  # left by a build that was killed
                shutil.rmtree(path, ignore_errors=True)
        return metadata

    def create(self, metadata: Metadata) -> None:
        with self._calling(), self._files.making(ROOM):
            with new_folder(self._files.path) as staging:
                edge_folder.write(staging, metadata.to_json())
                config = collection_config(metadata, self.models, INDEXING_THRESHOLD_KB)
                self.models.EdgeShard.create(str(staging / SHARD), config).close()
            self._know(metadata)
            self._shard = self._load(self._files.path / SHARD)

    def _know(self, metadata: Metadata) -> None:
        self._options, self._vector_bytes = metadata.options, metadata.vector_bytes
        self._cache = FeatureCache(metadata.feature_bytes)

    def optimize(self) -> None:
        """Build a copy of the shard in another process, and put it in the shard's place.

        In this process, the build would stop every Python thread until it ends, and keep its memory. Searches and
        writes go on meanwhile. If the build is interrupted, the shard stays as it was. The disk needs room for a second
        shard.
        """
        with self._building, self._errors():
            content = self._files.read()
            old = self._files.path / content.get("shard", SHARD)
            # A new name each time: a build may outlive the process that began it, and go on writing.
            new = self._files.new_shard()
            try:
                with self._writing:
                    with self._lock:
                        if not self._has_much_to_index():
                            return
                        self._shard.flush()
                    self._files.require_room(ROOM + 2 * self._files.used_bytes())  # the copy, and what is built of it
                    shutil.copytree(old, new)  # searches read on: nothing changes the files
                    self._touched = set()
                _build_graph(new)
                built = self._load(new)
                with self._writing, self._lock:
                    _replay(self._shard, built, sorted(self._touched), self.models)
                    self._files.write({**content, "shard": new.name})
                    self._shard.close()
                    self._shard, new = built, old
            finally:
                self._touched = None
                shutil.rmtree(new, ignore_errors=True)  # the old one, if all went well

    def _has_much_to_index(self) -> bool:
        info = self._shard.info()
        threshold = HNSW_MIN_KB if INDEXING_THRESHOLD_KB is None else INDEXING_THRESHOLD_KB
        return (int(info.points_count) - self._indexed(info)) * self._vector_bytes >= threshold * 1024

    def collections(self) -> tuple[list[str], dict[str, str]]:
        return collections_in(self._files.location)

    def point_alias(self, alias: str) -> None:
        with self._errors():
            self._files.point_alias(alias)

    def snapshot(self, file: Path) -> None:
        with self._building, self._writing, self._errors():
            with self._lock:
                self._shard.flush()
            edge_folder.pack(self._files.path, file)

    def restore(self, file: Path) -> None:
        with self._errors(), self._files.making(ROOM), new_folder(self._files.path) as staging:
            content = edge_folder.unpack(file, staging)
            self._load(staging / content.get("shard", SHARD)).close()  # it can be opened

    def drop(self) -> None:
        """Remove the collection without the engine, so that one which the engine cannot open goes too."""
        with self._building, self._writing, self._calling(), ExitStack() as locks:
            if self._files.missing():
                raise StoreError(f"there is no collection {self._files.path}")
            with self._files.holding():
                self._files.require_ours()
                aliases = locks.enter_context(self._files.aliases_locked())
            with suppress(Exception):
                self._close_shard()
            self._files.remove(aliases)
            self._files.release()

    def close(self) -> None:
        with self._building, self._calling():
            try:
                self._close_shard()
            finally:
                self._files.release()

    def _close_shard(self) -> None:
        try:
            if self._shard is not None:
                self._shard.flush()
                self._shard.close()
        finally:
            self._shard = None  # a shard that cannot be closed gives its lock back all the same

    def _load(self, shard: Path) -> Any:
        return self.models.EdgeShard.load(str(shard))

    # ---- its points ----

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        with self._changing([point.id for point in points]):
            self._files.require_room(ROOM)
            for start in range(0, len(points), CHUNK):
                self._shard.update(upsert_operation(points[start : start + CHUNK], self.models))
            self._shard.flush()  # the log alone survives the end of the process, not a power cut

    def query(self, searches: Sequence[Search], *, payloads: bool = True) -> list[SearchResult]:
        # One by one: a batch takes the engine as long, and everybody else waits for all of it.
        return [self._query(search, payloads) for search in searches]

    def _query(self, search: Search, payloads: bool) -> SearchResult:
        with self._calling():
            payloads = payloads or search.limit > self._cache.most
            if search.sparse is None:
                hits, bm25_scores = self._shard.query(nearest(search, self.models, payloads)), None
            else:
                hits, bm25_scores = merged_hits(*self._shard.query_batch(hybrid(search, self.models, payloads)))
            if payloads:
                return SearchResult.of(hits)._replace(bm25_scores=bm25_scores)
            known = self._cache.known([hit.id for hit in hits], partial(_reserved, self._shard, self.models))
            return SearchResult([hit.score for hit in hits], known.payloads, bm25_scores, known.features)

    def retrieve(self, ids: Sequence[str], *, without: str = "", only: Sequence[str] = ()) -> list[dict[str, Any]]:
        selector = self.models.PayloadSelector
        keys = selector.Include(list(only)) if only else selector.Exclude([without])
        with self._calling():
            return [record.payload for record in self._shard.retrieve(list(ids), with_payload=keys, with_vector=False)]

    def scroll(self, size: int, *, only: Sequence[str] = (), vectors: bool = False) -> Iterator[list[StoredPoint]]:
        return self._pages(size, self.models.PayloadSelector.Include(list(only)) if only else True, vectors=vectors)

    def _pages(
        self, size: int, payload: Any, *, vectors: bool = False, filter: Any = None
    ) -> Iterator[list[StoredPoint]]:
        """Points that pass `filter`, in pages of `size`. `payload` selects keys: all (True), none (False) or some."""
        request, offset = self.models.ScrollRequest, None
        while True:
            with self._calling():
                records, offset = self._shard.scroll(
                    request(offset, limit=size, with_payload=payload, with_vector=vectors, filter=filter)
                )
            yield [stored_point(record) for record in records]
            if offset is None:
                return

    def warm(self) -> None:
        _fill(self._cache, self._calling, lambda: self._shard, self.models)

    def delete(self, ids: Sequence[str]) -> None:
        with self._changing(ids):
            self._shard.update(self.models.UpdateOperation.delete_points(list(ids)))
            self._shard.flush()

    def delete_where(self, filter: Any) -> None:
        with self._writing:
            self.delete([point.id for page in self._pages(CHUNK, payload=False, filter=filter) for point in page])

    def count(self, filter: Any) -> int:
        with self._calling():
            return int(self._shard.count(self.models.CountRequest(exact=True, filter=filter)))

    def state(self) -> State:
        with self._calling():
            info = self._shard.info()
            schema = {
                path: str(field.data_type).rpartition(".")[2].lower() for path, field in info.payload_schema.items()
            }
        return State(info.points_count, self._indexed(info), "ready", schema, self._files.used_bytes())

    def _indexed(self, info: Any) -> int:
        kept = sum(map(self.count, having(self._options.kept, self.models)))
        return passages_in_graphs(int(info.indexed_vectors_count), int(info.points_count), self._options, kept)

    def index_payload(self, fields: Mapping[str, PayloadType]) -> None:
        with self._building, self._changing([]):
            indexed = self._shard.info().payload_schema
            for path, kind in fields.items():
                schema = getattr(self.models.PayloadSchemaType, kind.capitalize())
                if path not in indexed or indexed[path].data_type != schema:
                    self._shard.update(self.models.UpdateOperation.create_field_index(path, schema))
            self._shard.flush()

    @contextmanager
    def _calling(self) -> Iterator[None]:
        with self._lock, self._errors():
            yield

    @contextmanager
    def _changing(self, ids: Sequence[str]) -> Iterator[None]:
        """Change what is stored. If a shard is being built meanwhile, these points are brought to it at the end."""
        with self._writing, self._calling():
            self._cache.forget(ids)
            if (touched := self._touched) is not None:  # a build that fails forgets them at any time
                touched.update(ids)
            yield

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with engine_errors(self._files.path, lambda: self._shard is not None):
            yield


def _build_graph(shard: Path) -> None:
    """Build the graph of a shard that nobody has open, in another process."""
    command = [sys.executable, "-P", "-c", _OPTIMIZE, str(shard)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise StoreError(f"optimizing {shard.parent} failed ({reason}). Nothing is lost; search works, unindexed.")


def _replay(source: Any, target: Any, ids: Sequence[str], models: Any) -> None:
    """Bring these points in the shard `target` to the state that they have in the shard `source`."""
    for start in range(0, len(ids), CHUNK):
        chunk = list(ids[start : start + CHUNK])
        records = source.retrieve(chunk, with_payload=True, with_vector=True)
        points = [stored_point(record) for record in records]
        if points:
            target.update(upsert_operation(points, models))
        if deleted := set(chunk) - {point.id for point in points}:
            target.update(models.UpdateOperation.delete_points(sorted(deleted)))
    target.flush()


def _reserved(shard: Any, models: Any, ids: list[uuid.UUID]) -> dict[uuid.UUID, dict[str, Any]]:
    """The reserved part of the payloads of points."""
    keys = models.PayloadSelector.Include([RESERVED])
    return {record.id: record.payload for record in shard.retrieve(ids, with_payload=keys, with_vector=False)}


def _fill(
    cache: FeatureCache, calling: Callable[[], AbstractContextManager[None]], shard: Callable[[], Any], models: Any
) -> None:
    """Read points of a shard into its cache until it is full. Searches go on meanwhile."""
    keys, offset, room = models.PayloadSelector.Include([RESERVED]), None, True
    while room:
        with calling():  # nothing changes between reading points and keeping them
            page = models.ScrollRequest(offset, limit=CHUNK, with_payload=keys, with_vector=False)
            records, offset = shard().scroll(page)
            room = cache.fill({record.id: record.payload for record in records}) and offset is not None
