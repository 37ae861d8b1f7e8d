"""An index in Qdrant, embedded in this process or on a server. Knows no model but for its config."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from d2llm.deprecated import warn
from d2llm.errors import ArgumentError
from d2llm.folder import ModelConfig
from d2llm.types import Filter, Point, Scales, StrPath

from . import manage
from .collection import Collection
from .documents import Documents
from .engine import Effort
from .recall import QdrantRecall, compiled
from .schema import CollectionInfo, PayloadType
from .server_calls import ReadConsistency, WriteOrdering, connection_to

if TYPE_CHECKING:
    from qdrant_client import models


def _moved(old: str, new: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that moved from `QdrantIndex` to `Qdrant`: warns, and calls `function` with the collection."""

    def method(index: QdrantIndex, *arguments: Any, **named: Any) -> Any:
        warn(f"QdrantIndex.{old}", f"Qdrant.{new}")
        return function(index._collection, *arguments, **named)

    return method


class QdrantIndex(QdrantRecall):
    """Passages in a Qdrant collection, with their features and payloads. Thread-safe.

    The collection opens at first use. An embedded collection serves one call at a time and one process at a time; open
    the index after a fork. Vectors are compared exactly until the graph is built: by `optimize` in a folder, by itself
    on a server. 2-bit and binary quantization apply from the first insert.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from d2llm.connectors import QdrantIndex
        >>> from d2llm.folder import ModelConfig
        >>> from d2llm.types import Point
        >>> config = ModelConfig(embedding_dim=2, feature_bytes=1, precision="fp32", fingerprint="0123")
        >>> vector, features = np.array([0.6, 0.8], np.float32), np.ones(1, np.uint8)
        >>> with QdrantIndex("kb", tempfile.mkdtemp()) as index:
        ...     index.open_for(config)  # index.add(model, documents) does both of these
        ...     index.upsert([Point("a", vector, features, {"text": "A passage."}, digest="")])
        ...     index.recall(vector, 10).ids
        ['a']
    """

    def __init__(
        self,
        collection: str,
        location: StrPath,
        *,
        options: Mapping[str, Any] | None = None,
        generation_of: str | None = None,
        hnsw_ef: int | None = None,
        api_key: str | None = None,
        timeout: float = 30.0,
        patience: float = 10.0,
        grpc_port: int | None = 6334,
        ca_file: StrPath | None = None,
        read_consistency: ReadConsistency | None = None,
        write_ordering: WriteOrdering | None = None,
    ) -> None:
        """Name the collection `collection`, or an alias of it, at `location`: a folder (embedded; the collection is a
        folder in it), or the http(s):// address of a server. Nothing is opened or made yet.

        `options` say how the collection is stored, by the names of `CollectionOptions`: `{"quantization": "turbo4"}`.
        When the collection is made, all others have their defaults. If it exists, it must have been made with the
        values that are named.

        `generation_of` builds the collection as the next one of that alias (see `Qdrant.open_generation`). It must not
        exist, or be one that another such job left unfinished. If that job still runs, it can store nothing more.

        `hnsw_ef` is the effort of a search, see `Effort`. `d2llm tune` measures what a collection needs.

        The other arguments are for servers, and are those of `Qdrant`.

        Raises:
            ArgumentError: a name, a location, an option or another argument that is not possible.
        """
        self._effort = Effort(hnsw_ef)
        self._location = location
        self._server = {
            "api_key": api_key, "timeout": timeout, "patience": patience, "grpc_port": grpc_port, "ca_file": ca_file,
            "read_consistency": read_consistency, "write_ordering": write_ordering,
        }  # fmt: skip
        self._collection = Collection(
            collection, location, connection_to(location, **self._server), options, generation_of
        )
        self._engine, self._documents = self._collection.engine, Documents(self._collection)

    @property
    def name(self) -> str:
        """The name of the collection, or its alias, as it was given."""
        return self._collection.name

    @property
    def where(self) -> str:
        """The collection and its place, for messages."""
        return self._collection.where

    @property
    def scales(self) -> Scales | None:
        """The stored scales, in place of the model's, or None. A searcher reads them when it is made."""
        return self._collection.open().scales

    @scales.setter
    def scales(self, scales: Scales | None) -> None:
        self._collection.remember(scales=scales)

    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        """As `Index.open_for`.

        Raises:
            MismatchError: also if it has other `options`, or is not an unfinished generation of `generation_of`.
            MissingExtraError: the engine is not installed.
        """
        self._collection.open_for(config, create=create)

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, replacing those with the same id. They are on the disk when this returns. In a folder, each
        call flushes once, which takes 6 ms or more: pass hundreds of points at a time.

        Raises:
            MismatchError: a vector or features of another size.
            DataError: a payload that is not JSON.
            ArgumentError: NaN or infinity.
            StoreError: the collection cannot be opened, or is a generation that another job has taken over.
        """
        self._documents.upsert(points)

    def digests(self, ids: Iterable[str]) -> dict[str, str]:
        return self._documents.digests(ids)

    def ids(self) -> Iterator[str]:
        return self._documents.ids()

    def get(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        return self._documents.get(ids)

    def delete(self, ids: Iterable[str]) -> None:
        self._documents.delete(ids)

    def tidy(self) -> None:
        self._documents.tidy()

    def delete_where(self, filter: Filter | models.Filter) -> int:
        """Remove the documents that pass `filter`, and return how many there were.

        Raises:
            ArgumentError: an empty filter, which all documents pass, or one of another form.
        """
        self._collection.open()
        condition = compiled(self._collection, filter)
        if condition is None:
            raise ArgumentError("an empty filter would remove every document: to remove the collection, use drop()")
        count = self._documents.count(condition)
        self._engine.delete_where(condition)
        return count

    def count(self, filter: Filter | models.Filter | None = None) -> int:
        """How many documents are stored, or pass `filter`. A server also takes Qdrant's own filters."""
        self._collection.open()
        return self._documents.count(compiled(self._collection, filter))

    def has_graph(self) -> bool:
        """Whether the engine has indexed enough vectors for an HNSW graph. Without one it compares all vectors, and
        `hnsw_ef` has no effect."""
        return self._collection.has_graph()

    def info(self) -> CollectionInfo:
        """What the collection is, and its state."""
        return self._collection.info()

    def index_payload(self, fields: Mapping[str, PayloadType]) -> None:
        """Index these payload fields (`{"lang": "keyword", "year": "integer"}`), so that filters on them are fast. Do
        so before a load if you can: a graph that is built later knows of them. An index of the same type stays; one of
        another type is replaced, with a warning.

        Raises:
            ArgumentError: an unknown type, or a field name that Qdrant cannot address.
        """
        self._collection.index_payload(fields)

    @contextmanager
    def bulk_load(self) -> Iterator[None]:
        """A block that stores many documents, and ends with `optimize`. If the collection was empty, a server builds no
        graph before the end of the block; nor if a killed process left it so."""
        with self._collection.deferred():
            yield
        self.optimize()

    def optimize(self) -> None:
        """Build what makes large collections fast: quantized vectors in RAM and an HNSW graph. Call it after loading.

        In a folder, another process builds them on a copy, for which the disk needs room, while searches and writes go
        on. If that is interrupted, nothing is lost. If there is little to build, nothing is done. A server builds by
        itself: this waits until it has, and warns every ten minutes without progress.

        Raises:
            StoreError: the collection cannot be opened, or the build fails or does not begin (nothing is lost then).
        """
        self._collection.open()
        self._engine.optimize()

    def warm(self) -> None:
        """Read vectors and features into memory, so that the first searches are as fast as later ones. Without it, each
        is read from the disk when a search first needs it.

        In a folder, 100,000 passages take some seconds. The features of 160,000 passages or so are kept (256 MB), and
        the system keeps the vectors as long as it has memory. A server has its own caches, and this does nothing.
        """
        width = self._collection.open().embedding_dim
        if not self._engine.shared:
            # This compares all vectors, and so reads them in one go. Other searches read them page by page.
            self.recall(np.ones(width, np.float32), 1, effort=Effort(exact=True))
            self._engine.warm()

    def snapshot(self, file: StrPath) -> None:
        """`Qdrant.snapshot` of this collection."""
        manage.snapshot(self._collection, file)

    def copy_to(self, target: QdrantIndex, *, replace_others: bool = True, progress: bool = False) -> int:
        """`Qdrant.copy` of this collection."""
        return manage.copy(self._collection, target._collection, replace_others=replace_others, progress=progress)

    def drop(self) -> None:
        """`Qdrant.drop` of this collection."""
        manage.drop(self._collection)

    def close(self) -> None:
        """Release the folder or the connection. The next call opens it again."""
        self._collection.close()

    async def aclose(self) -> None:
        """`close`, and release what `arecall` opened on this event loop. Without it, that is released when the loop
        ends, as `asyncio.run` ends it. `async with contextlib.aclosing(index):` calls it."""
        await self._engine.aclose()
        await asyncio.to_thread(self.close)

    def beside(self, name: str, **options: Any) -> QdrantIndex:
        """An index of another collection at the same place, reached in the same way. `options` as for `QdrantIndex`."""
        return QdrantIndex(name, self._location, **{**self._server, **options})

    collections = _moved("collections", "collections", Collection.collections)
    peek = _moved("peek", "peek", Collection.peek)
    point_alias = _moved("point_alias", "point_alias", manage.point_alias)
    restore = _moved("restore", "restore", manage.restore)
    shared = property(_moved("shared", "shared", lambda collection: collection.engine.shared))
    follows_aliases = property(_moved("follows_aliases", "shared", lambda collection: collection.engine.shared))
