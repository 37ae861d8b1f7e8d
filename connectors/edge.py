"""The embedded engine: Qdrant Edge, the server's own storage in this process. All that is Edge stays in this file.

A collection is a folder with `collection.json` (ours) and `shard/` (the engine's), whole or absent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2llm.errors import D2LLMError, MismatchError, StoreError, import_extra
from d2llm.folder import written_atomically

from .engine import (
    HNSW_EF_CONSTRUCT,
    HNSW_M,
    HNSW_MIN_KB,
    VECTOR,
    Engine,
    Metadata,
    StoredPoint,
)

METADATA = "collection.json"
SHARD = "shard"
CHUNK = 512
INDEXING_THRESHOLD_KB: int | None = None
"""Vectors in a segment from which `optimize` indexes it; the engine's own default is 10 MB, scanned in half a ms."""

_OPTIMIZE = """
import sys, qdrant_edge
shard = qdrant_edge.EdgeShard.load(sys.argv[1])
shard.optimize()
shard.flush()
shard.close()
"""


class EdgeEngine(Engine):
    """One shard. Not thread-safe: the engine never releases the interpreter lock, so there is nothing to gain."""

    exclusive = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard: Any = None

    def open(self) -> Metadata | None:
        self.models = import_extra("qdrant_edge", "qdrant")
        with self._errors():
            if not self._folder.exists() or (self._folder.is_dir() and not any(self._folder.iterdir())):
                return None
            metadata = self._read_metadata()
            self._load()
        return metadata

    def create(self, metadata: Metadata) -> None:
        edge = self.models
        config = edge.EdgeConfig(
            # Cached is a memory map that the system may evict; Pinned stays in RAM. Cold would ask the disk each time.
            vectors={
                VECTOR: edge.EdgeVectorParams(
                    size=metadata.embedding_dim, distance=edge.Distance.Cosine, memory=edge.Memory.Cached
                )
            },
            payload_memory=edge.Memory.Cached,
            quantization_config=edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, memory=edge.Memory.Pinned),
            hnsw_config=edge.HnswIndexConfig(m=HNSW_M, ef_construct=HNSW_EF_CONSTRUCT, full_scan_threshold=HNSW_MIN_KB),
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=INDEXING_THRESHOLD_KB),
            wal_enabled=True,  # off, nothing is locked and a crash loses everything since the last flush
        )
        with self._errors():
            with written_atomically(self._folder) as staging:
                (staging / METADATA).write_text(json.dumps(metadata.to_json(), indent=2) + "\n", encoding="utf-8")
                edge.EdgeShard.create(str(staging / SHARD), config).close()
            self._load()

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        edge = self.models
        with self._errors():
            for start in range(0, len(points), CHUNK):
                chunk = [
                    edge.Point(id=point.id, vector={VECTOR: point.vector}, payload=point.payload)
                    for point in points[start : start + CHUNK]
                ]
                self._shard.update(edge.UpdateOperation.upsert_points(chunk))
            self._shard.flush()  # the log alone survives the end of the process, not a power cut

    def query(
        self, vector: list[float], limit: int, filter: Any, params: Any
    ) -> tuple[list[float], list[dict[str, Any]]]:
        edge = self.models
        request = edge.QueryRequest(
            limit=limit,
            query=edge.Query.Nearest(vector, using=VECTOR),
            filter=filter,
            with_payload=True,
            params=params,
        )
        with self._errors():
            hits = self._shard.query(request)
        return [hit.score for hit in hits], [hit.payload for hit in hits]

    def retrieve(self, ids: Sequence[str], *, without: str = "", only: Sequence[str] = ()) -> list[dict[str, Any]]:
        selector = self.models.PayloadSelector
        with self._errors():
            keys = selector.Include(list(only)) if only else selector.Exclude([without])
            return [record.payload for record in self._shard.retrieve(list(ids), with_payload=keys, with_vector=False)]

    def delete(self, ids: Sequence[str]) -> None:
        with self._errors():
            self._shard.update(self.models.UpdateOperation.delete_points(list(ids)))
            self._shard.flush()

    def count(self, filter: Any) -> int:
        with self._errors():
            return int(self._shard.count(self.models.CountRequest(exact=True, filter=filter)))

    def indexed(self) -> int:
        with self._errors():
            return int(self._shard.info().indexed_vectors_count)

    def optimize(self) -> None:
        """Build in another process: here it would stop every Python thread for the whole build, and keep its memory.

        Interrupted, it leaves the old segments as they were.
        """
        with self._errors():
            self._shard.flush()
            self._shard.close()
            try:
                command = [sys.executable, "-P", "-c", _OPTIMIZE, str(self._folder / SHARD)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            finally:  # subprocess.run has ended the child also when this process was interrupted
                self._load()
            if done.returncode:
                said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                raise StoreError(
                    f"optimizing {self._folder} failed ({said}). Nothing is lost; search works, unindexed."
                )

    def close(self) -> None:
        if self._shard is not None:
            with self._errors():
                self._shard.flush()
                self._shard.close()
            self._shard = None

    def _load(self) -> None:
        self._shard = self.models.EdgeShard.load(str(self._folder / SHARD))

    def _read_metadata(self) -> Metadata:
        file = self._folder / METADATA
        if not file.is_file():
            raise MismatchError(
                f"{self._folder} was made by something else than d2llm (it holds no {METADATA}): choose another "
                "folder or collection name"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{file} is damaged ({error}): restore it, or index the corpus again") from error
        return Metadata.parse(content, str(self._folder))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The one place that reads the engine's errors, which are all bare `Exception`s."""
        try:
            yield
        except D2LLMError:
            raise
        except Exception as error:  # the one seam: every kind is sorted below
            if "WouldBlock" in str(error):
                raise StoreError(
                    f"{self._folder} is in use by another process, or by another index in this one. Close that one "
                    "first; a Qdrant server (--qdrant http://...) serves several at once."
                ) from error
            raise StoreError(
                f"{self._folder}: {error}. What was stored stays in its log: see that the disk has room and the "
                "folder can be written, and open it again."
            ) from error
