"""An index in Qdrant: embedded in this process, or a server. Knows no model beyond its config.

The engines are in `edge.py` and `server.py`; how a point is written is in `points.py`.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.errors import StoreError
from d2llm.folder import ModelConfig
from d2llm.index import RESERVED, Index, Point, check_points, check_vector
from d2llm.types import Candidates, Filter, Floats

from .edge import EdgeEngine
from .engine import HNSW_MIN_KB, Effort, Engine, Metadata
from .points import (
    DIGEST,
    FEATURES,
    ID,
    candidates_of,
    compile_filter,
    own_payloads,
    point_id,
    read_digests,
    stored_points,
)
from .server import ServerEngine

if TYPE_CHECKING:
    from qdrant_client import models


class QdrantIndex(Index):
    """Passages in a Qdrant collection, with their features and payloads.

    Opened at first use. Thread-safe; an embedded collection serves one call at a time and one process at a time, and
    is opened after a fork. Vectors are compared exactly until `optimize` has built the graph (embedded), or the
    server has.
    """

    def __init__(
        self,
        collection: str,
        location: str | PathLike[str],
        *,
        hnsw_ef: int | None = None,
        api_key: str | None = None,
        timeout: float = 30.0,
        grpc_port: int | None = 6334,
    ) -> None:
        """Name the collection `collection` at `location`: a folder (embedded, the collection is a folder in it), or
        the http(s):// address of a server.

        `hnsw_ef`: nodes of the HNSW graph that a search keeps in view; more find more of the nearest passages and take
        longer. None is 4 times what is asked for, at least 128; below 2 times it changes nothing. `d2llm tune` measures
        what a collection needs.

        `api_key`, `timeout` in seconds, and `grpc_port` (None: all through the address, slower) are for servers.

        Raises:
            ValueError: a collection name with other characters than letters, digits, `_`, `-`, `.`, or that starts
                with `-` or `.`; an address of another kind; `hnsw_ef` below 1.
        """
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", collection):
            raise ValueError(
                f"collection name {collection!r}: use letters, digits, '_', '-' and '.', starting with none of '-' '.'"
            )
        self._place = os.fspath(location)
        scheme, found, _ = self._place.partition("://")
        if found and scheme not in ("http", "https"):
            raise ValueError(f"location {self._place!r}: expected a folder, or an address with http:// or https://")
        self._collection, self._effort = collection, Effort(hnsw_ef)
        self._engine: Engine = (
            ServerEngine(collection, self._place, api_key, timeout, grpc_port)
            if found
            else EdgeEngine(Path(self._place) / collection)
        )
        self._lock = threading.RLock()
        self._metadata: Metadata | None = None
        self._pid: int | None = None

    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        """Make sure the collection holds this model's vectors; make it if it is missing and `create`.

        Raises:
            MismatchError: another passage encoder made it, or something else than d2llm did.
            StoreError: it is missing (without `create`), cannot be reached, or is in use by another process.
            MissingExtraError: the engine is not installed.
        """
        with self._opened(create=config if create else None) as metadata:
            metadata.require(config, f"collection {self._collection!r} at {self._place}")

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, replacing those with the same id. On disk when this returns: embedded, that is one flush a
        call (from 6 ms, by the disk), so pass points in hundreds.

        Raises:
            MismatchError: a vector or features of another width.
            DataError: a payload that is no JSON.
            ValueError: NaN or infinity, or features beyond the range of float16.
            StoreError: the collection is missing, cannot be reached, or is in use.
        """
        with self._opened() as metadata:
            check_points(points, metadata.embedding_dim)
            if stored := stored_points(points, metadata.feature_dim):
                self._engine.upsert(stored)

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        with self._opened():
            keys = [f"{RESERVED}.{ID}", f"{RESERVED}.{DIGEST}"]
            return read_digests(self._engine.retrieve([point_id(id_) for id_ in ids], only=keys))

    def recall(
        self,
        vector: Floats,
        limit: int,
        *,
        filter: Filter | models.Filter | None = None,
        effort: Effort | None = None,
    ) -> Candidates:
        """The `limit` nearest passages to `vector` [E] by cosine, best first, among those that `filter` lets pass.
        A server also takes Qdrant's own filters. `effort` is for this call, in place of the index's `hnsw_ef`.

        Raises:
            MismatchError: a vector of another width.
            ValueError: NaN or infinity in it, or a filter of another form.
            StoreError: the collection is missing, cannot be reached, or is in use.
        """
        with self._opened() as metadata:
            check_vector(vector, metadata.embedding_dim)
            params = (effort or self._effort).compile(limit, self._engine.models)
            scores, payloads = self._engine.query(vector.tolist(), limit, self._compiled(filter), params)
        return candidates_of(scores, payloads, metadata.feature_dim)

    def get(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        with self._opened():
            found = self._engine.retrieve([point_id(id_) for id_ in ids], without=f"{RESERVED}.{FEATURES}")
        return own_payloads(found)

    def delete(self, ids: Sequence[str]) -> None:
        with self._opened():
            if ids:
                self._engine.delete([point_id(id_) for id_ in ids])

    def count(self, filter: Filter | models.Filter | None = None) -> int:
        """How many documents are stored, or pass `filter`. A server also takes Qdrant's own filters."""
        with self._opened():
            return self._engine.count(self._compiled(filter))

    def has_graph(self) -> bool:
        """Whether the engine has indexed enough vectors to have made an HNSW graph: without one it compares them all,
        and `hnsw_ef` means nothing.

        Raises:
            StoreError: the collection is missing, cannot be reached, or is in use.
        """
        with self._opened() as metadata:
            return self._engine.indexed() * metadata.embedding_dim * 4 >= HNSW_MIN_KB * 1024  # float32

    def optimize(self) -> None:
        """Build what makes large collections fast: 8-bit vectors in RAM and an HNSW graph. Call it after loading.

        Embedded, another process builds it and calls to this index wait; if that is interrupted, nothing is lost. A
        server builds by itself: this waits until it has.

        Raises:
            StoreError: the build failed (what was stored is still there), or the collection cannot be opened.
        """
        with self._opened():
            self._engine.optimize()

    def close(self) -> None:
        """Release the folder or the connection. The next call opens it again."""
        with self._lock:
            if self._pid in (None, os.getpid()):  # what a forked child inherited is not its to close
                self._engine.close()
                self._metadata = self._pid = None

    def _compiled(self, filter: Filter | models.Filter | None) -> Any:
        if filter is None or isinstance(filter, Mapping):
            return compile_filter(filter or {}, self._engine.models)
        if isinstance(filter, self._engine.models.Filter):
            return filter
        raise ValueError(f"filter {filter!r}: expected a mapping, or (on a server) a qdrant_client.models.Filter")

    @contextmanager
    def _opened(self, create: ModelConfig | None = None) -> Iterator[Metadata]:
        """Open if need be; hold the lock for the whole call if the engine takes one at a time."""
        if self._pid not in (
            None,
            os.getpid(),
        ):  # asked before the lock, which another thread may have held at the fork
            raise StoreError(
                f"{self._place} was opened before this process was forked: open a QdrantIndex after the fork"
            )
        with self._lock:
            if self._metadata is None:
                self._metadata = self._open(create)
                self._pid = os.getpid()
            metadata = self._metadata
            if self._engine.exclusive:
                yield metadata
                return
        yield metadata

    def _open(self, create: ModelConfig | None) -> Metadata:
        metadata = self._engine.open()
        if metadata is None and create is not None:
            metadata = Metadata.of(create)
            self._engine.create(metadata)
        if metadata is None:
            raise StoreError(
                f"no collection {self._collection!r} at {self._place}. Make it with: d2llm index MODEL CORPUS.jsonl "
                f"--qdrant {self._place} --collection {self._collection}"
            )
        return metadata
