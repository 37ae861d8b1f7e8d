"""The embedded engine: Qdrant Edge, the server's own storage in this process. All that is Edge stays in this file.

A collection is a folder with `collection.json` (ours) and a shard (the engine's), whole or absent. `collection.json`
names the shard, so that another one, built aside, takes its place in one step. `NAME.alias` beside the collections is a
file that holds the name of one.

Whoever opens, makes or removes a collection, or points an alias, holds the lock `.NAME.lock` beside it. The engine has
a lock too, but looks at it last: by then it has already removed files of the collection that another process uses.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from d2llm.errors import D2LLMError, MismatchError, StoreError, import_extra
from d2llm.files import new_folder, write_lines

from .engine import RRF_K, Engine, Found, Search, Sparse, State, StoredPoint
from .lock import FileLock, Locked
from .schema import HNSW_MIN_KB, VECTOR, WORDS, CollectionOptions, Metadata, PayloadType, Quantization

METADATA = "collection.json"
SHARD = "shard"
ALIAS = ".alias"
CHUNK = 512
ROOM = 128 * 2**20
"""Bytes that must be free on the disk before anything is written: four times what the engine adds to a file at once."""
DAMAGED = "If it stays so, remove it (d2llm collection drop), and restore a snapshot or index the corpus again."
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
    """One shard, one call at a time: the engine never releases the interpreter lock, so there is nothing to gain."""

    def __init__(self, location: Path, collection: str) -> None:
        self._location, self._name = location, collection
        self._folder = location / collection
        self._shard: Any = None
        self._held: FileLock | None = None  # against other processes, and other engines in this one
        self._options, self._vector_bytes = CollectionOptions(), 0
        self._lock = threading.RLock()  # of the shard
        self._writing = threading.RLock()  # taken before the lock by whoever changes what is stored
        self._building = threading.RLock()  # taken before both by whoever changes the shard's files
        self._touched: set[str] | None = None  # points that changed while another shard is being built

    def peek(self) -> Metadata | None:
        with self._errors():
            folder = self._resolve(self._name)
            return None if self._missing(folder) else Metadata.parse(self._read(folder), str(folder))

    def remember(self, metadata: Metadata) -> None:
        with self._building, self._errors():
            self._write(self._folder, {**self._read(), **metadata.to_json()})

    def open(self) -> Metadata | None:
        self.models = import_extra("qdrant_edge", "qdrant")
        with self._calling():
            self._folder = self._resolve(self._name)
            if self._missing():
                return None
            with self._holding():
                if not self._missing() and self._resolve(self._name) == self._folder:
                    return self._open_held()
            self._release()  # dropped, or the alias moved, since we looked
            return self.open()

    def _open_held(self) -> Metadata:
        content = self._read()
        metadata = Metadata.parse(content, str(self._folder))
        self._options, self._vector_bytes = metadata.options, metadata.vector_bytes
        shard = self._folder / content.get("shard", SHARD)
        self._shard = self._load(shard)
        for path in self._folder.glob(f"{SHARD}*"):  # what a build left that was killed
            if path != shard:
                shutil.rmtree(path, ignore_errors=True)
        return metadata

    def create(self, metadata: Metadata) -> None:
        with self._calling(), self._making():
            with new_folder(self._folder) as staging:
                self._write(staging, metadata.to_json())
                self.models.EdgeShard.create(str(staging / SHARD), self._config(metadata)).close()
            self._options, self._vector_bytes = metadata.options, metadata.vector_bytes
            self._shard = self._load(self._folder / SHARD)

    def _config(self, metadata: Metadata) -> Any:
        """The schema in the engine's terms. Cached is a memory map that the system may evict; Pinned stays in RAM; Cold
        would ask the disk each time."""
        edge, options = self.models, metadata.options
        datatype = {"float32": "Float32", "float16": "Float16"}[options.datatype]
        return edge.EdgeConfig(
            vectors={
                VECTOR: edge.EdgeVectorParams(
                    size=metadata.embedding_dim,
                    distance=edge.Distance.Cosine,
                    datatype=getattr(edge.VectorStorageDatatype, datatype),
                    memory=edge.Memory.Cached,
                )
            },
            sparse_vectors={WORDS: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)} if options.words else None,
            payload_memory=edge.Memory.Cached,
            quantization_config=self._quantization(options.quantization),
            hnsw_config=edge.HnswIndexConfig(
                m=options.hnsw_m, ef_construct=options.hnsw_ef_construct, full_scan_threshold=HNSW_MIN_KB
            ),
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=INDEXING_THRESHOLD_KB),
            wal_enabled=True,  # off, nothing is locked and a crash loses everything since the last flush
        )

    def _quantization(self, kind: Quantization) -> Any:
        edge = self.models
        if kind == "none":
            return None
        if kind == "int8":
            return edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, memory=edge.Memory.Pinned)
        if kind == "binary":
            return edge.BinaryQuantizationConfig(memory=edge.Memory.Pinned)
        bits = getattr(edge.TurboQuantBitSize, kind.replace("turbo", "Bits"))
        return edge.TurboQuantQuantizationConfig(bits=bits, memory=edge.Memory.Pinned)

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        with self._changing([point.id for point in points]):
            self._require_room(ROOM)
            for start in range(0, len(points), CHUNK):
                self._put(self._shard, points[start : start + CHUNK])
            self._shard.flush()  # the log alone survives the end of the process, not a power cut

    def _put(self, shard: Any, points: Sequence[StoredPoint]) -> None:
        edge = self.models
        made = []
        for point in points:
            vectors: dict[str, Any] = {VECTOR: point.vector}
            if point.words is not None:
                vectors[WORDS] = edge.SparseVector(*point.words)
            made.append(edge.Point(id=point.id, vector=vectors, payload=point.payload))
        shard.update(edge.UpdateOperation.upsert_points(made))

    def query(self, search: Search) -> Found:
        edge = self.models
        nearest = edge.Query.Nearest(search.vector, using=VECTOR)
        common = {"limit": search.limit, "params": search.params}
        if search.words is None:
            request = edge.QueryRequest(query=nearest, filter=search.filter, with_payload=True, **common)
            with self._calling():
                return Found.of(self._shard.query(request))
        words = edge.Query.Nearest(edge.SparseVector(*search.words), using=WORDS)
        both = [
            edge.Prefetch(query=nearest, filter=search.filter, **common),
            edge.Prefetch(query=words, filter=search.filter, limit=search.limit),
        ]
        fusion = edge.Fusion.Rrf(k=RRF_K) if search.fusion == "rrf" else edge.Fusion.Dbsf()
        fused = edge.Prefetch(query=fusion, prefetches=both, limit=search.limit)
        batch = [
            edge.QueryRequest(query=fusion, prefetches=both, limit=search.limit),
            edge.QueryRequest(query=words, prefetches=both, limit=2 * search.limit),
            edge.QueryRequest(query=nearest, prefetches=[fused], with_payload=True, **common),
        ]
        with self._calling():
            return Found.of_hybrid(*self._shard.query_batch(edge.QueryBatchRequest(batch)))

    def retrieve(self, ids: Sequence[str], *, without: str = "", only: Sequence[str] = ()) -> list[dict[str, Any]]:
        selector = self.models.PayloadSelector
        keys = selector.Include(list(only)) if only else selector.Exclude([without])
        with self._calling():
            return [record.payload for record in self._shard.retrieve(list(ids), with_payload=keys, with_vector=False)]

    def scroll(
        self, size: int, *, only: Sequence[str] = (), vectors: bool = False, filter: Any = None
    ) -> Iterator[list[StoredPoint]]:
        edge, offset = self.models, None
        keys = edge.PayloadSelector.Include(list(only)) if only else True
        while True:
            request = edge.ScrollRequest(
                offset=offset, limit=size, with_payload=keys, with_vector=vectors, filter=filter
            )
            with self._calling():
                records, offset = self._shard.scroll(request)
            yield [_stored(record) for record in records]
            if offset is None:
                return

    def delete(self, ids: Sequence[str]) -> None:
        with self._changing(ids):
            self._shard.update(self.models.UpdateOperation.delete_points(list(ids)))
            self._shard.flush()

    def delete_where(self, filter: Any) -> None:
        with self._writing:
            self.delete([point.id for page in self.scroll(CHUNK, only=["-"], filter=filter) for point in page])

    def count(self, filter: Any) -> int:
        with self._calling():
            return int(self._shard.count(self.models.CountRequest(exact=True, filter=filter)))

    def state(self) -> State:
        with self._calling():
            info = self._shard.info()
            schema = {
                path: str(field.data_type).rpartition(".")[2].lower() for path, field in info.payload_schema.items()
            }
        return State(info.points_count, self._indexed(info), "ready", schema, self._used())

    def _indexed(self, info: Any) -> int:
        """Dense vectors in graphs: where there are words, the engine counts those too, all of them."""
        return max(0, int(info.indexed_vectors_count) - (int(info.points_count) if self._options.words else 0))

    def index_payload(self, fields: Mapping[str, PayloadType]) -> None:
        edge = self.models
        types = {"keyword": "Keyword", "integer": "Integer", "float": "Float", "bool": "Bool"}
        with self._building, self._changing([]):
            there = self._shard.info().payload_schema
            for path, kind in fields.items():
                schema = getattr(edge.PayloadSchemaType, types[kind])
                if path not in there or there[path].data_type != schema:
                    self._shard.update(edge.UpdateOperation.create_field_index(path, schema))
            self._shard.flush()

    def optimize(self) -> None:
        """Build a copy in another process (here it would stop every Python thread for the whole build, and keep its
        memory), and put it in the shard's place. Searches and writes go on meanwhile.

        Interrupted, it leaves the shard as it was. Needs room on the disk for a second one.
        """
        with self._building, self._errors():
            content = self._read()
            old = self._folder / content.get("shard", SHARD)
            # A name of its own: a build may outlive the process that began it, and go on writing.
            new = self._folder / f"{SHARD}-{uuid.uuid4().hex[:8]}"
            try:
                with self._writing:
                    with self._lock:
                        if not self._has_much_to_index():
                            return
                        self._shard.flush()
                    self._require_room(ROOM + 2 * self._used())  # the copy, and what is built of it
                    shutil.copytree(old, new)  # searches read on: nothing changes the files
                    self._touched = set()
                command = [sys.executable, "-P", "-c", _OPTIMIZE, str(new)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                    raise StoreError(
                        f"optimizing {self._folder} failed ({said}). Nothing is lost; search works, unindexed."
                    )
                built = self._load(new)
                with self._writing, self._lock:
                    self._replay(built, sorted(self._touched))
                    self._write(self._folder, {**content, "shard": new.name})
                    self._shard.close()
                    self._shard, new = built, old
            finally:
                self._touched = None
                shutil.rmtree(new, ignore_errors=True)  # the old one, if all went well

    def _has_much_to_index(self) -> bool:
        info = self._shard.info()
        threshold = HNSW_MIN_KB if INDEXING_THRESHOLD_KB is None else INDEXING_THRESHOLD_KB
        return (int(info.points_count) - self._indexed(info)) * self._vector_bytes >= threshold * 1024

    def _replay(self, shard: Any, ids: Sequence[str]) -> None:
        """Bring to `shard` what became of these points in ours."""
        for start in range(0, len(ids), CHUNK):
            chunk = list(ids[start : start + CHUNK])
            points = [_stored(record) for record in self._shard.retrieve(chunk, with_payload=True, with_vector=True)]
            if points:
                self._put(shard, points)
            if gone := set(chunk) - {point.id for point in points}:
                shard.update(self.models.UpdateOperation.delete_points(sorted(gone)))
        shard.flush()

    def _used(self) -> int:
        """Bytes that the collection takes on the disk: less than its files are long, since they have holes."""
        files = [path.stat() for path in self._folder.rglob("*") if path.is_file()]
        return int(sum(getattr(file, "st_blocks", file.st_size / 512) * 512 for file in files))

    def _require_room(self, needed: int) -> None:
        """The engine writes into memory-mapped files with holes: where the disk has no room to fill one, the system
        ends the process on the spot, and no error can be caught."""
        if (free := shutil.disk_usage(self._folder).free) < needed:
            raise StoreError(
                f"the disk of {self._folder} has {free / 2**20:,.0f} MiB left, and this needs up to "
                f"{needed / 2**20:,.0f}. What is stored stays; make room, and run this again"
            )

    def collections(self) -> tuple[list[str], dict[str, str]]:
        with self._errors():
            if not self._location.is_dir():
                return [], {}
            # Names with a dot in front are what was being written when a process was killed.
            names = sorted(path.parent.name for path in self._location.glob(f"[!.]*/{METADATA}"))
            aliases = sorted(path.stem for path in self._location.glob(f"[!.]*{ALIAS}") if path.is_file())
            return names, {alias: self._resolve(alias).name for alias in aliases}

    def point_alias(self, alias: str) -> None:
        with self._errors():
            lock = self._lock_name(alias)
            try:
                if (self._location / alias).exists():
                    raise StoreError(f"{self._location / alias} is a collection: an alias needs a name of its own")
                write_lines(self._location / f"{alias}{ALIAS}", [self._folder.name])
            finally:
                lock.release(remove=True)

    def snapshot(self, file: Path) -> None:
        with self._building, self._writing, self._errors():
            with self._lock:
                self._shard.flush()
            staging = file.with_name(f".{file.name}.part")
            try:
                with zipfile.ZipFile(staging, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                    for path in sorted(self._folder.rglob("*")):
                        archive.write(path, path.relative_to(self._folder))
                staging.replace(file)
            except OSError as error:
                raise StoreError(f"{file}: {error.strerror}: the snapshot could not be written") from error
            finally:
                with suppress(OSError):
                    staging.unlink()

    def restore(self, file: Path) -> None:
        with self._errors(), self._making(), new_folder(self._folder) as staging:
            try:
                with zipfile.ZipFile(file) as archive:
                    archive.extractall(staging)  # never outside of it, whatever the file's names are
            except OSError as error:
                raise StoreError(f"{file}: {error.strerror}: the snapshot could not be unpacked") from error
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise StoreError(f"{file} is no snapshot of an embedded collection ({error})") from error
            if not (staging / METADATA).is_file():
                raise StoreError(f"{file} is no snapshot of an embedded collection: it holds no {METADATA}")
            content = self._read(staging)
            Metadata.parse(content, f"the collection in {file}")
            self._load(staging / content.get("shard", SHARD)).close()  # it can be opened

    def drop(self) -> None:
        """Without the engine, so that what it cannot open goes too."""
        with self._building, self._writing, self._calling(), ExitStack() as locks:
            if self._missing():
                raise StoreError(f"there is no collection {self._folder}")
            with self._holding():
                self._require_ours()
                aliases = [alias for alias, name in self.collections()[1].items() if name == self._folder.name]
                for alias in aliases:  # nobody points one elsewhere meanwhile
                    locks.callback(self._lock_name(alias).release, remove=True)
            for alias in aliases:  # first: killed after this, it is dropped by another try
                if self._resolve(alias) == self._folder:
                    (self._location / f"{alias}{ALIAS}").unlink()
            with suppress(Exception):
                self._close_shard()
            trash = self._folder.with_name(f".{self._folder.name}-dropped")
            shutil.rmtree(trash, ignore_errors=True)
            self._folder.replace(trash)  # gone in one step, whatever the removal takes
            shutil.rmtree(trash)
            self._release()

    def close(self) -> None:
        with self._building, self._calling():
            try:
                self._close_shard()
            finally:
                self._release()

    def _close_shard(self) -> None:
        try:
            if self._shard is not None:
                self._shard.flush()
                self._shard.close()
        finally:
            self._shard = None  # a shard that cannot be closed gives its lock back all the same

    def _resolve(self, name: str) -> Path:
        """The folder of a collection, by its name or an alias."""
        alias = self._location / f"{name}{ALIAS}"
        if (self._location / name).exists() or not alias.is_file():
            return self._location / name
        return self._location / alias.read_text(encoding="utf-8").strip()

    def _load(self, shard: Path) -> Any:
        return self.models.EdgeShard.load(str(shard))

    def _write(self, folder: Path, content: Mapping[str, Any]) -> None:
        write_lines(folder / METADATA, [json.dumps(content, indent=2)])

    def _read(self, folder: Path | None = None) -> dict[str, Any]:
        folder = folder or self._folder
        file = folder / METADATA
        if not file.is_file():
            raise MismatchError(
                f"{folder} was made by something else than d2llm (it holds no {METADATA}): choose another "
                "folder or collection name"
            )
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return content
        except ValueError as error:
            raise StoreError(f"{file} is damaged ({error}). {DAMAGED}") from error

    @contextmanager
    def _calling(self) -> Iterator[None]:
        with self._lock, self._errors():
            yield

    @contextmanager
    def _changing(self, ids: Sequence[str]) -> Iterator[None]:
        """Change what is stored: a shard that is being built meanwhile hears of these points."""
        with self._writing, self._calling():
            if (touched := self._touched) is not None:  # a build that fails forgets them at any time
                touched.update(ids)
            yield

    def _missing(self, folder: Path | None = None) -> bool:
        folder = folder or self._folder
        return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))

    def _require_ours(self) -> None:
        """Raise unless d2llm made this, even if it is damaged by now."""
        try:
            Metadata.parse(self._read(), str(self._folder))
        except StoreError:
            if not any(self._folder.glob(f"{SHARD}*")):
                raise

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Take the lock of the collection, if it is not ours yet, and keep it unless the block fails."""
        held = self._held
        self._held = held or self._lock_name(self._folder.name)
        try:
            yield
        except BaseException:  # Ctrl-C too: a lock that nobody uses would keep the collection closed
            if held is None:
                self._release()
            raise

    @contextmanager
    def _making(self) -> Iterator[None]:
        """`_holding`, where the block makes the collection."""
        self._location.mkdir(parents=True, exist_ok=True)
        with self._holding():
            if not self._missing():
                raise StoreError(f"{self._folder} exists already: another process has just made it. Run this again")
            yield

    def _lock_name(self, name: str) -> FileLock:
        """The lock of a collection, which need not exist, or of an alias."""
        try:
            return FileLock(self._location / f".{name}.lock")
        except Locked as error:
            raise self._in_use(name) from error

    def _release(self) -> None:
        if self._held is not None:
            self._held.release(remove=not (self._folder / METADATA).exists())
            self._held = None

    def _in_use(self, name: str) -> StoreError:
        return StoreError(
            f"{self._location / name} is in use by another process, or by another index in this one. Close that one "
            "first; a Qdrant server (--qdrant http://...) serves several at once."
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The one place that reads the engine's errors: bare `Exception`s, and panics that only derive from
        `BaseException`."""
        try:
            yield
        except D2LLMError:
            raise
        except BaseException as error:  # the one seam: every kind is sorted below
            if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
                raise
            if "WouldBlock" in str(error):
                raise self._in_use(self._folder.name) from error
            unopened = self._shard is None and not isinstance(error, OSError)
            raise StoreError(
                f"{self._folder}: {error}. What was stored stays in its log: see that the disk has room and the "
                f"folder can be written, and open it again.{f' {DAMAGED}' if unopened else ''}"
            ) from error


def _stored(record: Any) -> StoredPoint:
    vectors = record.vector or {}
    words = vectors.get(WORDS)
    sparse = None if words is None else Sparse(words.indices, words.values)
    return StoredPoint(str(record.id), vectors.get(VECTOR, []), record.payload or {}, sparse)
