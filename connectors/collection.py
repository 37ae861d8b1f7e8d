"""One collection as this process uses it: opened when it is needed, made if it is missing, checked, closed."""

from __future__ import annotations

import logging
import os
import shlex
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2llm.errors import MismatchError, StoreError
from d2llm.folder import ModelConfig
from d2llm.types import RESERVED, StrPath

from .bm25 import Bm25Encoder
from .edge import EdgeEngine
from .engine import Engine
from .filters import indexed_paths, key_of, of_documents
from .location import check_location, check_name, shown
from .points import (
    NUMBER_PATH,
)
from .schema import HNSW_MIN_KB, CollectionInfo, CollectionOptions, Generation, Metadata, PayloadType
from .server import ServerEngine
from .server_calls import Connection

logger = logging.getLogger(__name__)

PAGE = 512
"""Points read at a time when all points are read."""
KNOWN = 20
"""Collections that an error names if the one asked for is missing."""


class Collection:
    """A collection in one engine, by its name or an alias. Thread-safe.

    It opens at first use, and again after `close`. `options` name how it is stored; `generation_of` is the alias that
    it is built for, if any (see `QdrantIndex`). `metadata` and `bm25_encoder` are there while it is open.
    """

    def __init__(
        self,
        name: str,
        location: StrPath,
        connection: Connection | None,
        options: Mapping[str, Any] | None = None,
        generation_of: str | None = None,
    ) -> None:
        """Check the arguments. `connection` is for a server, None for a folder.

        Raises:
            ArgumentError: a name or a location that is not possible, or unknown options.
        """
        check_name(name)
        check_location(os.fspath(location))
        self.name, self.place = name, shown(os.fspath(location))
        self.options = {} if options is None else options
        CollectionOptions().changed(self.options)  # raises for unknown options
        self.generation = None if generation_of is None else Generation(generation_of, job=uuid.uuid4().hex)
        self.engine: Engine = EdgeEngine(Path(location), name) if connection is None else ServerEngine(name, connection)
        self.metadata: Metadata | None = None
        self.bm25_encoder: Bm25Encoder | None = None
        self._lock = threading.RLock()
        self._pid: int | None = None

    @property
    def where(self) -> str:
        """The collection and its place, for messages."""
        return f"collection {self.name!r} at {self.place}"

    def identity(self) -> tuple[str, str]:
        """The place, and the name of the collection behind an alias. Equal for the same collection; but two spellings
        of one server's address count as two places."""
        place = self.place.rstrip("/") if self.engine.shared else os.path.realpath(self.place)
        return place, self.collections()[1].get(self.name, self.name)

    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        """See `QdrantIndex.open_for`."""
        metadata = self.try_open()
        if metadata is None and create:
            with self._lock:
                made = Metadata.of(config, CollectionOptions().changed(self.options), self.generation)
                metadata = self.try_open() or self.make(made)
        metadata = metadata or self.open()
        metadata.require_made_by(config, self.where)
        metadata.require_options(self.options, self.where)
        if self.generation not in (None, metadata.generation):
            self._take_over(metadata)

    def open(self) -> Metadata:
        """Open the collection if it is not open yet.

        Raises:
            StoreError: it is missing, cannot be reached, or is in use.
        """
        metadata = self.try_open()
        if metadata is None:
            flags = shlex.join(["--qdrant", self.place, "--collection", self.name])
            raise StoreError(f"{self._missing()} Make it with: d2llm index MODEL CORPUS.jsonl {flags}")
        return metadata

    def try_open(self) -> Metadata | None:
        """`open`, but None if there is no such collection."""
        self.require_own_process()  # before the lock, which another thread may hold at the fork
        if self.metadata is None:
            with self._lock:
                if self.metadata is None and (metadata := self.engine.open()) is not None:
                    self._ready(metadata, _bm25_encoder(metadata))
        return self.metadata

    def make(self, metadata: Metadata) -> Metadata:
        """Make the collection, and open it."""
        bm25_encoder = _bm25_encoder(metadata)  # raises for an unknown language before anything is made
        self.engine.create(metadata)
        self._ready(metadata, bm25_encoder)
        self.engine.index_payload({NUMBER_PATH: "integer"})
        return metadata

    def collections(self) -> tuple[list[str], dict[str, str]]:
        """All collections of the place, and `{alias: collection}`, whether this one is there and free or not."""
        self._connect()
        return self.engine.collections()

    def peek(self) -> Metadata | None:
        """What the collection remembers, read without opening it; None if there is no such collection."""
        self._connect()
        return self.engine.peek()

    def info(self) -> CollectionInfo:
        """See `QdrantIndex.info`."""
        metadata = self.open()
        state, (_, aliases) = self.engine.state(), self.engine.collections()
        name = aliases.get(self.name, self.name)
        return CollectionInfo(
            name,
            self.place,
            sorted(alias for alias, to in aliases.items() if to == name),
            self.engine.count(of_documents(None, self.engine.models)),
            state.points,
            state.indexed,
            state.status,
            {
                key_of(path) or path: kind
                for path, kind in state.payload_indexes.items()
                if not path.startswith(f"{RESERVED}.")
            },
            metadata,
            state.bytes,
        )

    def remember(self, **changes: Any) -> None:
        """Change what the collection remembers: the fields of `Metadata` that are named.

        The other fields stay, also those that another process has changed meanwhile, such as calibrated scales.
        """
        metadata = self.open()
        if self.engine.shared:
            metadata = self.engine.peek() or metadata
        self.metadata = replace(metadata, **changes)
        self.engine.remember(self.metadata)

    def has_graph(self) -> bool:
        """See `QdrantIndex.has_graph`."""
        metadata = self.open()
        return self.engine.state().indexed * metadata.vector_bytes >= HNSW_MIN_KB * 1024

    def index_payload(self, fields: Mapping[str, PayloadType]) -> None:
        """See `QdrantIndex.index_payload`."""
        self.open()
        paths, indexed = indexed_paths(fields), self.engine.state().payload_indexes
        for path, kind in paths.items():
            if (former := indexed.get(path, kind)) != kind:
                logger.warning("%s: %s, indexed as %s, is now indexed as %s", self.where, key_of(path), former, kind)
        self.engine.index_payload(paths)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which no graph is built if the collection was empty before. Call `optimize` of the engine after
        it."""
        self.open()
        if self.engine.count(None) == 0:
            self.engine.defer()
        try:
            yield
        finally:
            self.engine.resume()

    def _take_over(self, metadata: Metadata) -> None:
        """Continue a generation that another job left unfinished."""
        own, other = self.generation, metadata.generation
        assert own is not None
        if other is None or other.alias != own.alias or other.job is None:
            raise MismatchError(f"{self.where} is no unfinished generation of {own.alias!r}: build another one")
        self.remember(generation=own)
        # The other job may still run, and complete: it moves the alias, then marks the collection as complete. Either
        # the alias is seen here, or its mark replaces ours, and `require_own_generation` sees that.
        if self.name in self.engine.collections()[1].values():
            self.remember(generation=Generation(own.alias))
            raise StoreError(f"another job has just completed {self.where}: run this again to build the next one")

    def require_own_generation(self) -> None:
        """Raise `StoreError` if another job has taken over the generation that this one builds."""
        if self.generation is None:
            return
        metadata = self.engine.peek()
        if metadata is None or metadata.generation != self.generation:
            raise StoreError(
                f"another job goes on with {self.where}, which this one was building for the alias "
                f"{self.generation.alias!r}: this one stops. The alias is left to the other job; nothing is removed"
            )

    def require_own_process(self) -> None:
        """Raise `StoreError` in a process that was forked while the collection was open."""
        if self._pid not in (None, os.getpid()):
            raise StoreError(
                f"{self.place} was opened before this process was forked: open a QdrantIndex after the fork"
            )

    def close(self) -> None:
        """Release the folder or the connection. The next call opens it again."""
        with self._lock:
            if self._pid in (None, os.getpid()):  # a forked child must not close what it inherited
                self.engine.close()
                self.metadata = self._pid = None

    def _connect(self) -> None:
        self.require_own_process()
        with self._lock:
            if self._pid is None:
                self.engine.connect()
                self._pid = os.getpid()

    def _ready(self, metadata: Metadata, bm25_encoder: Bm25Encoder | None) -> None:
        self._pid, self.bm25_encoder, self.metadata = os.getpid(), bm25_encoder, metadata

    def _missing(self) -> str:
        """Say that there is no such collection, and which there are."""
        missing = f"no collection {self.name!r} at {self.place}."
        try:
            names, aliases = self.engine.collections()
        except StoreError:  # an API key may be for some collections only
            return missing
        if self.name in aliases:
            missing = f"{self.name!r} at {self.place} is an alias of {aliases[self.name]!r}, which is gone."
        return f"{missing} {known_names([*names, *(alias for alias, to in aliases.items() if to in names)])}"


def known_names(names: Sequence[str]) -> str:
    """A sentence that names collections and aliases."""
    more = f", and {len(names) - KNOWN} more" if len(names) > KNOWN else ""
    return f"There are: {', '.join(names[:KNOWN])}{more}." if names else "There are none."


def _bm25_encoder(metadata: Metadata) -> Bm25Encoder | None:
    options = metadata.options.bm25
    return None if options is None else Bm25Encoder(options, split=metadata.split_words)
