"""An index in Qdrant: embedded in this process, or a server. Knows no model beyond its config.

The engines are in `edge.py` and `server.py`; what a collection is made of in `schema.py`; how a point is written in
`points.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tqdm.auto import tqdm

from d2llm.deprecated import warn
from d2llm.errors import ArgumentError, MismatchError, StoreError
from d2llm.folder import ModelConfig
from d2llm.index import Index, check_limit, check_points, check_vector
from d2llm.types import RESERVED, Candidates, Filter, Floats, Fusion, Point

from .edge import EdgeEngine
from .engine import Effort, Engine, Search, StoredPoint
from .location import check_location, shown
from .points import (
    DIGEST,
    FEATURES,
    ID,
    WordEncoder,
    candidates_of,
    check_stored,
    compile_filter,
    indexed_paths,
    own_payloads,
    point_ids,
    read_digests,
    read_ids,
    stored_points,
    with_words,
)
from .schema import (
    HNSW_MIN_KB,
    MOST,
    PAYLOAD_TYPES,
    CollectionInfo,
    CollectionOptions,
    Generation,
    Metadata,
    PayloadType,
)
from .server import ServerEngine
from .server_calls import Connection, ReadConsistency, WriteOrdering

if TYPE_CHECKING:
    from qdrant_client import models

logger = logging.getLogger(__name__)

LONGEST_NAME = 200
"""Characters: the name of a file takes 255, and an embedded collection's files add some of their own."""
PAGE = 512
"""Points read at a time when all are read."""
KNOWN = 20
"""Collections that are named where one is not found."""


class QdrantIndex(Index):
    """Passages in a Qdrant collection, with their features and payloads.

    Opened at first use. Thread-safe; an embedded collection serves one call at a time and one process at a time, and
    is opened after a fork. Vectors are compared exactly until `optimize` has built the graph (embedded), or the
    server has; those kept in 2 bits or 1 a number are searched as such from the first one on.
    """

    def __init__(
        self,
        collection: str,
        location: str | PathLike[str],
        *,
        options: Mapping[str, Any] | None = None,
        generation_of: str | None = None,
        hnsw_ef: int | None = None,
        api_key: str | None = None,
        timeout: float = 30.0,
        patience: float = 10.0,
        grpc_port: int | None = 6334,
        ca_file: str | PathLike[str] | None = None,
        read_consistency: ReadConsistency | None = None,
        write_ordering: WriteOrdering | None = None,
    ) -> None:
        """Name the collection `collection`, or an alias of it, at `location`: a folder (embedded, the collection is a
        folder in it), or the http(s):// address of a server.

        `options` say how the collection is stored, by names of `CollectionOptions`: `{"quantization": "turbo4"}`. A
        collection that is made now has the defaults of all others. One that is there must have been made with the same
        values of those that are named.

        `generation_of`: build this collection to be what that alias names next (`reindex.open_generation`). It must not
        exist, or be one that another such job left unfinished: that job, should it still run, can store nothing more.

        `hnsw_ef`: nodes of the HNSW graph that a search keeps in view; more find more of the nearest passages and take
        longer. None is 4 times what is asked for, at least 128; below 2 times it changes nothing. `d2llm tune` measures
        what a collection needs.

        The rest is for servers. `timeout`: seconds for one call. `patience`: seconds, from its first failure on, for
        which a call is repeated that failed for a reason that passes (connection lost, 429, 500, 502, 503; all but
        searches also when no answer came in time), with growing, jittered pauses, or those that the server asks for.
        `grpc_port` None sends all through the address, which is slower. `ca_file`: certificates (PEM) that https://
        trusts in place of the system's.
        `read_consistency` and `write_ordering` of a cluster are passed through.

        Raises:
            ArgumentError: a name that `check_name` refuses, or a location that `check_location` does; unknown
                `options`; `hnsw_ef` below 1; of what is for servers, what `Connection` refuses.
        """
        check_name(collection)
        place = os.fspath(location)
        check_location(place)
        self._place = shown(place)
        self._collection, self._effort, self._options = collection, Effort(hnsw_ef), {} if options is None else options
        CollectionOptions().changed(self._options)  # what cannot be is said now
        self._generation = None if generation_of is None else Generation(generation_of, job=uuid.uuid4().hex)
        self._engine: Engine = (
            ServerEngine(
                collection,
                Connection(
                    url=place,
                    api_key=api_key,
                    timeout=timeout,
                    patience=patience,
                    grpc_port=grpc_port,
                    ca_file=None if ca_file is None else Path(ca_file),
                    read_consistency=read_consistency,
                    write_ordering=write_ordering,
                ),
            )
            if "://" in place
            else EdgeEngine(Path(place), collection)
        )
        self._lock = threading.RLock()
        self._metadata: Metadata | None = None
        self._words: WordEncoder | None = None
        self._pid: int | None = None

    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        """Make sure the collection holds this model's vectors; make it if it is missing and `create`.

        Raises:
            MismatchError: another passage encoder made it, or something else than d2llm did, or it was made with
                other `options`, or it is no unfinished generation of `generation_of`.
            StoreError: it is missing (without `create`), cannot be reached, or is in use by another process.
            MissingExtraError: the engine is not installed.
        """
        metadata = self._opened(create=config if create else None)
        metadata.require(config, self.where)
        metadata.require_options(self._options, self.where)
        if self._generation not in (None, metadata.generation):
            self._take_over(metadata)

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, replacing those with the same id. On disk when this returns: embedded, that is one flush a
        call (from 6 ms, by the disk), so pass points in hundreds.

        Raises:
            MismatchError: a vector or features of another width.
            DataError: a payload that is no JSON.
            ArgumentError: NaN or infinity, or features beyond the range of float16.
            StoreError: the collection is missing, cannot be reached, or is in use; or, of a generation, another job
                goes on with it.
        """
        metadata = self._opened()
        check_points(points, metadata.embedding_dim, metadata.feature_dim)
        self._require_own_generation()
        if stored := stored_points(points, metadata.feature_dim, self._words):
            self._engine.upsert(stored)

    def digests(self, ids: Iterable[str]) -> dict[str, str]:
        points = point_ids(ids)
        self._opened()
        keys = [f"{RESERVED}.{ID}", f"{RESERVED}.{DIGEST}"]
        return read_digests(self._engine.retrieve(points, only=keys) if points else [])

    def ids(self) -> Iterator[str]:
        self._opened()
        for page in self._engine.scroll(PAGE, only=[f"{RESERVED}.{ID}"]):
            yield from read_ids([point.payload for point in page])

    def recall(
        self,
        vector: Floats,
        limit: int,
        *,
        filter: Filter | models.Filter | None = None,
        query_text: str = "",
        fusion: Fusion = "rrf",
        effort: Effort | None = None,
        words: str | None = None,
    ) -> Candidates:
        """As `Index.recall`. A server also takes Qdrant's own filters. `effort` is for this call, in place of the
        index's `hnsw_ef`. `words` is the old name of `query_text`."""
        if words is not None:
            warn("words", "query_text")
            query_text = words
        metadata = self._opened()
        found = self._engine.query(self._search(metadata, vector, limit, filter, query_text, fusion, effort))
        return candidates_of(found, metadata.feature_dim)

    async def arecall(
        self,
        vector: Floats,
        limit: int,
        *,
        filter: Filter | models.Filter | None = None,
        query_text: str = "",
        fusion: Fusion = "rrf",
    ) -> Candidates:
        self._require_own_process()
        metadata = self._metadata
        if metadata is None:
            metadata = await asyncio.to_thread(self._opened)
        found = await self._engine.aquery(self._search(metadata, vector, limit, filter, query_text, fusion, None))
        return candidates_of(found, metadata.feature_dim)

    def _search(
        self,
        metadata: Metadata,
        vector: Floats,
        limit: int,
        filter: Filter | models.Filter | None,
        query_text: str,
        fusion: Fusion,
        effort: Effort | None,
    ) -> Search:
        check_vector(vector, metadata.embedding_dim)
        check_limit(limit)
        limit = min(limit, MOST)
        compiled = self._compiled(filter)
        params = (effort or self._effort).compile(limit, self._engine.models, filtered=compiled is not None)
        search = Search(vector.tolist(), limit, compiled, params, fusion=fusion)
        if not query_text:
            return search
        if fusion not in get_args(Fusion):
            raise ArgumentError(f"unknown fusion {fusion!r}: choose one of {', '.join(get_args(Fusion))}")
        if self._words is None:
            raise MismatchError(
                f"{self.where} keeps no words for hybrid recall: index the corpus again with them (d2llm index "
                "--hybrid --alias), or copy the collection (d2llm collection migrate --hybrid)"
            )
        sparse = self._words.query(query_text)
        return search._replace(words=sparse) if sparse.indices else search  # stop words alone find nothing

    def get(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        points = point_ids(ids)
        self._opened()
        without = f"{RESERVED}.{FEATURES}"
        return own_payloads(self._engine.retrieve(points, without=without) if points else [])

    def delete(self, ids: Iterable[str]) -> None:
        points = point_ids(ids)
        self._opened()
        self._require_own_generation()
        if points:
            self._engine.delete(points)

    def delete_where(self, filter: Filter | models.Filter) -> int:
        """Remove the documents that pass `filter`, and return how many there were.

        Raises:
            ArgumentError: an empty filter, which all documents pass, or one of another form.
        """
        self._opened()
        compiled = self._compiled(filter)
        if compiled is None:
            raise ArgumentError(
                "an empty filter would remove every document: remove the collection with drop() instead"
            )
        count = self._engine.count(compiled)
        self._engine.delete_where(compiled)
        return count

    def count(self, filter: Filter | models.Filter | None = None) -> int:
        """How many documents are stored, or pass `filter`. A server also takes Qdrant's own filters."""
        self._opened()
        return self._engine.count(self._compiled(filter))

    def has_graph(self) -> bool:
        """Whether the engine has indexed enough vectors to have made an HNSW graph: without one it compares them all,
        and `hnsw_ef` means nothing.

        Raises:
            StoreError: the collection is missing, cannot be reached, or is in use.
        """
        metadata = self._opened()
        return self._engine.state().indexed * metadata.vector_bytes >= HNSW_MIN_KB * 1024

    def info(self) -> CollectionInfo:
        """What the collection is, and how it is.

        Raises:
            StoreError: the collection is missing, cannot be reached, or is in use.
        """
        metadata = self._opened()
        state, (_, aliases) = self._engine.state(), self._engine.collections()
        name = aliases.get(self._collection, self._collection)
        return CollectionInfo(
            name,
            self._place,
            sorted(alias for alias, to in aliases.items() if to == name),
            state.points,
            state.indexed,
            state.status,
            {
                path.strip('"'): kind
                for path, kind in state.payload_indexes.items()
                if not path.startswith(f"{RESERVED}.")
            },
            metadata,
            state.bytes,
        )

    def index_payload(self, fields: Mapping[str, PayloadType]) -> None:
        """Index these payload fields (`{"lang": "keyword", "year": "integer"}`), so that filters on them are fast. Best
        done before a load: a graph that is built later knows of them. Fields that are indexed so already stay; an index
        of another type is replaced, with a warning.

        Raises:
            ArgumentError: an unknown type, or a field name that Qdrant cannot address.
        """
        self._opened()
        paths, there = indexed_paths(fields), self._engine.state().payload_indexes
        for path, kind in paths.items():
            if (former := there.get(path, kind)) != kind:
                logger.warning("%s: %s, indexed as %s, is now indexed as %s", self.where, path.strip('"'), former, kind)
        self._engine.index_payload(paths)

    @contextmanager
    def bulk_load(self) -> Iterator[None]:
        """A block that stores much. A server leaves the graph of a collection that was empty to the end of it, and
        so does one that was left like that by a process that was killed."""
        self._opened()
        if self.count() == 0:
            self._engine.defer()
        try:
            yield
        finally:
            self._engine.resume()
        self.optimize()

    def optimize(self) -> None:
        """Build what makes large collections fast: 8-bit vectors in RAM and an HNSW graph. Call it after loading.

        Embedded, another process builds them beside the collection (which needs as much room again on the disk) while
        searches and writes go on; if that is interrupted, nothing is lost. Where there is little to build, nothing is
        done. A server builds by itself: this waits until it has, and warns every ten minutes without progress.

        Raises:
            StoreError: the build failed or does not begin (what was stored is still there), or the collection cannot be
                opened.
        """
        self._opened()
        self._engine.optimize()

    def collections(self) -> tuple[list[str], dict[str, str]]:
        """Names of all collections at this location, and `{alias: collection}`: also if this one is missing, or in use
        elsewhere."""
        self._connect()
        return self._engine.collections()

    def peek(self) -> Metadata | None:
        """What the collection remembers, also while another process has it open; None if there is no such collection.

        Raises:
            MismatchError: something else than d2llm made it.
            StoreError: it cannot be reached, or is damaged.
        """
        self._connect()
        return self._engine.peek()

    def _connect(self) -> None:
        self._require_own_process()
        with self._lock:
            if self._pid is None:
                self._engine.connect()
                self._pid = os.getpid()

    @property
    def name(self) -> str:
        """Of the collection, or an alias of it, as it was given."""
        return self._collection

    @property
    def follows_aliases(self) -> bool:
        """Whether an open index goes to another collection with the alias that it was opened by: on a server. In a
        folder, it sees that when it opens again."""
        return self._engine.shared

    def point_alias(self, alias: str) -> str | None:
        """Make `alias` a name of this collection, and of no other, in one step: searches under that name go to one or
        to the other (`follows_aliases`). Returns the collection that had it. A generation of that alias is then
        complete.

        Raises:
            ArgumentError: a name that `check_name` refuses.
            StoreError: there is a collection of that name; or, of a generation, another job goes on with it.
        """
        check_name(alias)
        metadata = self._opened()
        names, aliases = self._engine.collections()
        if alias in names:
            raise StoreError(f"{alias!r} at {self._place} is a collection: an alias needs a name of its own")
        self._require_own_generation()
        self._engine.point_alias(alias)
        if metadata.generation is not None and metadata.generation.alias == alias:
            # After the alias has moved: a job that takes over meanwhile looks for the alias last, see `_take_over`.
            self._remember(replace(metadata, generation=Generation(alias)))
            self._generation = None
        return aliases.get(alias)

    def snapshot(self, file: str | PathLike[str]) -> None:
        """Write the whole collection into a file, from which `restore` makes it again in the same kind of place. (To go
        from one kind to the other, use `copy_to`.) Of a cluster it holds the parts on the node that answers.

        Raises:
            StoreError: the file cannot be written.
        """
        self._opened()
        self._engine.snapshot(Path(file))

    def restore(self, file: str | PathLike[str]) -> None:
        """Make this collection, which must not exist, of a snapshot.

        Raises:
            StoreError: the collection exists, or the file is no snapshot.
            MismatchError: the snapshot is of a collection that something else than d2llm made; nothing is left of it.
        """
        if self._try_open() is not None:
            raise StoreError(f"{self.where} exists already: drop it first, or restore under another name")
        self._engine.restore(Path(file))
        try:
            metadata = self._opened()
        except MismatchError:
            self._engine.drop()
            raise
        if metadata.generation is not None:  # whoever restores it has a use of his own for it
            self._remember(replace(metadata, generation=None))

    def drop(self) -> None:
        """Remove the collection, all that is in it, and its aliases. Embedded, also one that cannot be opened.

        Raises:
            StoreError: this is an alias, or the collection is missing or in use.
            MismatchError: something else than d2llm made it.
        """
        if self.shared:
            self._opened()
        aliases = self.collections()[1]
        if self._collection in aliases:
            raise StoreError(f"{self._collection!r} is an alias of {aliases[self._collection]!r}: drop that one")
        self._engine.drop()
        self.close()

    def copy_to(self, target: QdrantIndex, *, progress: bool = False) -> int:
        """Store every document of this collection in `target`, embedded or server: nothing is encoded again. If it is
        made now, it has the options of this one, except for those that `target` names. Returns how many documents were
        stored; those that are there unchanged are left alone, so that an interrupted copy is completed by running it
        again.

        Raises:
            ArgumentError: `target` is this collection.
            MismatchError: `target` holds vectors of another passage encoder, or was made with other options.
            StoreError: either cannot be opened, or `target` holds other documents too.
            DataError: a document that an earlier version stored and no server takes.
        """
        metadata = self._opened()
        if self._identity() == target._identity():
            raise ArgumentError(f"{self.where} would be copied onto itself: give the copy another place or name")
        found = target._try_open()
        if found is None:
            found = replace(metadata, options=metadata.options.changed(target._options), generation=None)
            target._create(found)
        found.require_options(target._options, target.where)
        ours = (metadata.fingerprint, metadata.embedding_dim, metadata.feature_dim)
        theirs = (found.fingerprint, found.embedding_dim, found.feature_dim)
        if ours != theirs:
            raise MismatchError(f"{target.where} holds vectors of {theirs}, {self.where} of {ours}")
        known = {path: kind for path, kind in self._engine.state().payload_indexes.items() if kind in PAYLOAD_TYPES}
        target._engine.index_payload(known)
        copied = 0
        with target.bulk_load(), tqdm(total=self.count(), unit="doc", disable=not progress) as bar:
            for page in self._engine.scroll(PAGE, vectors=True):
                digests = read_digests([point.payload for point in page])
                there = target.digests(list(digests))
                new = [point for point, (id_, digest) in zip(page, digests.items(), strict=True)
                       if there.get(id_) != digest]  # fmt: skip
                if new:
                    check_stored(new)
                    target._engine.upsert(_fitted(new, target._words))
                copied += len(new)
                bar.update(len(page))
        if (expected := self.count()) != (stored := target.count()):
            raise StoreError(
                f"{target.where} holds {stored} documents, {self.where} {expected}: it held others before, or one of "
                "the two changed meanwhile"
            )
        return copied

    def close(self) -> None:
        """Release the folder or the connection. The next call opens it again."""
        with self._lock:
            if self._pid in (None, os.getpid()):  # what a forked child inherited is not its to close
                self._engine.close()
                self._metadata = self._pid = None

    async def aclose(self) -> None:
        """`close`, and release what `arecall` opened on this event loop. Without it, that is released when the loop
        ends (as `asyncio.run` ends it). `async with contextlib.aclosing(index):` calls it."""
        await self._engine.aclose()
        await asyncio.to_thread(self.close)

    def _compiled(self, filter: Filter | models.Filter | None) -> Any:
        if filter is None or isinstance(filter, Mapping):
            return compile_filter(filter or {}, self._engine.models)
        if isinstance(filter, self._engine.models.Filter):
            return filter
        raise ArgumentError(f"filter {filter!r}: expected a mapping, or (on a server) a qdrant_client.models.Filter")

    def _identity(self) -> tuple[str, str]:
        """Equal for two indexes of one collection, if they spell a server's address alike."""
        place = self._place.rstrip("/") if self.shared else os.path.realpath(self._place)
        return place, self.collections()[1].get(self._collection, self._collection)

    @property
    def where(self) -> str:
        """The collection and its place, in words."""
        return f"collection {self._collection!r} at {self._place}"

    @property
    def shared(self) -> bool:
        """Whether several processes may have it open at once: on a server, yes."""
        return self._engine.shared

    def _opened(self, create: ModelConfig | None = None) -> Metadata:
        """Open if need be."""
        metadata = self._try_open()
        if metadata is None and create is not None:
            with self._lock:
                made = Metadata.of(create, CollectionOptions().changed(self._options), self._generation)
                metadata = self._try_open() or self._create(made)
        if metadata is None:
            flags = shlex.join(["--qdrant", self._place, "--collection", self._collection])
            raise StoreError(
                f"no collection {self._collection!r} at {self._place}. {self._known()} Make it with: "
                f"d2llm index MODEL CORPUS.jsonl {flags}"
            )
        return metadata

    def _known(self) -> str:
        """What there is, in a sentence."""
        try:
            names, aliases = self._engine.collections()
        except StoreError:  # a key may be good for some collections alone
            return ""
        known = [*names, *aliases]
        more = f", and {len(known) - KNOWN} more" if len(known) > KNOWN else ""
        return f"There are: {', '.join(known[:KNOWN])}{more}." if known else "There are none."

    def _try_open(self) -> Metadata | None:
        """Open the collection if it exists."""
        self._require_own_process()  # before the lock, which another thread may have at the fork
        if self._metadata is None:
            with self._lock:
                if self._metadata is None and (found := self._engine.open()) is not None:
                    self._ready(found, _word_encoder(found))
        return self._metadata

    def _take_over(self, metadata: Metadata) -> None:
        """Go on with a generation that another job left unfinished."""
        ours, found = self._generation, metadata.generation
        assert ours is not None
        if found is None or found.alias != ours.alias or found.job is None:
            raise MismatchError(f"{self.where} is no unfinished generation of {ours.alias!r}: build another one")
        self._remember(replace(metadata, generation=ours))
        # The other job may still run, and be done: it moves the alias, then marks the collection as complete. Either
        # the alias is seen here, or that mark takes the place of ours, and `_require_own_generation` sees it.
        if self._collection in self._engine.collections()[1].values():
            self._remember(replace(metadata, generation=Generation(ours.alias)))
            raise StoreError(f"another job has just completed {self.where}: run this again to build the next one")

    def _require_own_generation(self) -> None:
        if self._generation is None:
            return
        found = self._engine.peek()
        if found is None or found.generation != self._generation:
            raise StoreError(
                f"another job goes on with {self.where}, which this one was building for the alias "
                f"{self._generation.alias!r}: this one stops. The alias is left to the other job; nothing is removed"
            )

    def _remember(self, metadata: Metadata) -> None:
        self._engine.remember(metadata)
        self._metadata = metadata

    def _require_own_process(self) -> None:
        if self._pid not in (None, os.getpid()):
            raise StoreError(
                f"{self._place} was opened before this process was forked: open a QdrantIndex after the fork"
            )

    def _create(self, metadata: Metadata) -> Metadata:
        words = _word_encoder(metadata)  # an unknown language is said before anything is made
        self._engine.create(metadata)
        self._ready(metadata, words)
        return metadata

    def _ready(self, metadata: Metadata, words: WordEncoder | None) -> None:
        self._pid, self._words, self._metadata = os.getpid(), words, metadata


def _word_encoder(metadata: Metadata) -> WordEncoder | None:
    return None if metadata.options.words is None else WordEncoder(metadata.options.words)


def check_name(name: str) -> None:
    """Raise an `ArgumentError` unless a collection or an alias can be called so: letters, digits, `_`, `-`, `.`, the
    first neither `-` nor `.`, and at most `LONGEST_NAME` in all."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ArgumentError(
            f"collection name {name!r}: use letters, digits, '_', '-' and '.', starting with none of '-' '.'"
        )
    if len(name) > LONGEST_NAME:
        raise ArgumentError(f"collection name {name!r} is {len(name)} long: use at most {LONGEST_NAME} characters")


def _fitted(points: Sequence[StoredPoint], words: WordEncoder | None) -> list[StoredPoint]:
    """The points with words as the collection keeps them, or none."""
    return [point._replace(words=None) for point in points] if words is None else with_words(points, words)
