"""Where collections are, and what can be done there: open, list, name, save, copy, remove and reindex them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

from d2llm.errors import ArgumentError
from d2llm.folder import ModelConfig
from d2llm.indexing import AddReport
from d2llm.model import Model
from d2llm.types import Document, StrPath

from . import manage, reindex
from .collection import Collection
from .edge_folder import collections_in
from .location import shown
from .qdrant import QdrantIndex
from .schema import Metadata, PayloadType
from .server_calls import Connection, ReadConsistency, ServerCalls, WriteOrdering, connection_to


@dataclass(frozen=True, repr=False)
class Qdrant:
    """A place for collections: a folder (Qdrant's embedded engine), or the http(s):// address of a server.

    It holds no connection: each method opens one, and closes it. In a folder, a method that works on a collection
    cannot do so while the collection is open elsewhere. Pass the open index then, in place of the name.

    The other fields are for servers. `timeout`: seconds for one call. `patience`: seconds for which a call is repeated
    after its first failure, if the failure may pass (connection lost, 429, 500, 502, 503; all calls but searches also
    when no answer came in time). The pauses grow, with jitter, or are those that the server asks for. `grpc_port` None
    sends everything through the address, which is slower. `ca_file`: certificates (PEM) that https:// trusts in place
    of the system's. `read_consistency` and `write_ordering` of a cluster are passed through.

    Raises:
        ArgumentError: a location, key, port, time or choice that is not possible. Nothing is reached or made yet.

    Example:
        >>> import tempfile
        >>> from d2llm.connectors import Qdrant
        >>> qdrant = Qdrant(tempfile.mkdtemp())
        >>> qdrant.collections()
        ([], {})
        >>> index = qdrant.index("kb", options={"quantization": "turbo4"})
    """

    location: StrPath
    _: KW_ONLY
    api_key: str | None = None
    timeout: float = 30.0
    patience: float = 10.0
    grpc_port: int | None = 6334
    ca_file: StrPath | None = None
    read_consistency: ReadConsistency | None = None
    write_ordering: WriteOrdering | None = None

    def __post_init__(self) -> None:
        self._connection()

    def __str__(self) -> str:
        """The location, without what is secret in an address."""
        return shown(os.fspath(self.location))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    @property
    def shared(self) -> bool:
        """Whether several processes may have a collection open at once, and an open index follows its alias to another
        collection: on a server. In a folder, an index sees that an alias has moved when it opens again."""
        return "://" in os.fspath(self.location)

    def index(self, name: str, **options: Any) -> QdrantIndex:
        """An index of the collection or alias `name`. `options` are those of `QdrantIndex`. It opens at first use.

        Raises:
            ArgumentError: a name or an option that is not possible.
        """
        return QdrantIndex(name, self.location, **{**self._server, **options})

    def collections(self) -> tuple[list[str], dict[str, str]]:
        """The names of all collections, made by d2llm or not, open elsewhere or not; and `{alias: collection}`.

        Raises:
            StoreError: the place cannot be reached or read.
        """
        if (connection := self._connection()) is None:
            return collections_in(Path(self.location))
        with closing(ServerCalls(connection)) as calls:
            calls.connect()
            return calls.collections()

    def peek(self, name: str) -> Metadata | None:
        """The metadata of a collection, also while another process has it open; None if there is no such collection.

        Raises:
            MismatchError: something else than d2llm made it.
            StoreError: it cannot be reached, or is damaged.
        """
        with self._collection(name) as collection:
            return collection.peek()

    def point_alias(self, alias: str, collection: str | QdrantIndex) -> str | None:
        """Make `alias` a name of `collection`, and of no other, in one step: each search under the alias goes to the
        one or the other. Returns the collection that had it.

        Raises:
            ArgumentError: a name that is not possible, or `collection` is that very alias.
            StoreError: there is a collection called `alias`, or `collection` cannot be opened; or it is a generation
                that another job has taken over.
        """
        with self._collection(collection) as opened:
            return manage.point_alias(opened, alias)

    def snapshot(self, collection: str | QdrantIndex, file: StrPath) -> None:
        """Write the whole collection into `file`, from which `restore` makes it again in the same kind of place. (For
        the other kind, use `copy`.) From a cluster it contains the shards on the node that answers.

        Raises:
            StoreError: the collection cannot be opened, or the file cannot be written.
        """
        with self._collection(collection) as opened:
            manage.snapshot(opened, file)

    def restore(self, name: str, file: StrPath) -> None:
        """Make the collection `name`, which must not exist, from a snapshot.

        Raises:
            StoreError: the collection exists, or the file is not a snapshot.
            MismatchError: the snapshot is of a collection that something else than d2llm made; nothing is left of it.
        """
        with self._collection(name) as collection:
            manage.restore(collection, file)

    def drop(self, collection: str | QdrantIndex) -> None:
        """Remove the collection with all its documents and aliases. In a folder, this works on damaged collections too.

        Raises:
            StoreError: this is an alias, or the collection is missing or in use.
            MismatchError: something else than d2llm made it.
        """
        with self._collection(collection) as opened:
            manage.drop(opened)

    def copy(
        self,
        collection: str | QdrantIndex,
        target: QdrantIndex,
        *,
        replace_others: bool = True,
        progress: bool = False,
    ) -> int:
        """Store every document of the collection in `target`, here or at another place: nothing is encoded again.

        If `target` does not exist, it gets the options of the collection, except for those that it names itself.
        Documents that it has unchanged are left alone, so that an interrupted copy is completed by running it again.
        Other versions of them are replaced, or refused without `replace_others`. Returns how many documents were
        stored.

        Raises:
            ArgumentError: `target` is this collection.
            MismatchError: `target` holds vectors of another passage encoder, or was made with other options.
            StoreError: either cannot be opened, or `target` holds other documents, or other versions that may not be
                replaced. Nothing was copied then.
            DataError: a document that an earlier version stored and no server takes.
        """
        with self._collection(collection) as opened:
            return manage.copy(opened, target._collection, replace_others=replace_others, progress=progress)

    def reindex(
        self,
        alias: str,
        model: Model,
        documents: Iterable[Document | Mapping[str, Any]],
        *,
        options: Mapping[str, Any] | None = None,
        payload_indexes: Mapping[str, PayloadType] | None = None,
        progress: bool = False,
    ) -> AddReport:
        """Index a whole corpus again without a pause: `open_generation`, `Index.add` and `switch_over` in one.

        Searches under the alias go to the old collection until the new one is complete. Then the alias moves, and the
        old collection is dropped. A job that was interrupted is continued.

        Raises:
            DataError, MismatchError, StoreError: as `open_generation`, `Index.add` and `switch_over`.
        """
        with self.open_generation(alias, model.config, options=options, payload_indexes=payload_indexes) as index:
            with index.bulk_load():
                report = index.add(model, documents, prune=True, progress=progress)
            self.switch_over(index, alias, report.added + report.unchanged)
        return report

    def open_generation(
        self,
        alias: str,
        config: ModelConfig,
        *,
        options: Mapping[str, Any] | None = None,
        payload_indexes: Mapping[str, PayloadType] | None = None,
        average_words: float | None = None,
    ) -> QdrantIndex:
        """The collection to fill for `alias` with a model: NAME-2 beside NAME-1, or the next number that is free.

        A generation that an interrupted job left unfinished is continued. A new one has the options and payload indexes
        of the collection that has the alias now, except for the `options` (as for `QdrantIndex`) and `payload_indexes`
        given here. `average_words` is the mean length of a passage in the new corpus, if it is known: for BM25 options
        that are taken over.

        Raises:
            StoreError: there is a collection called `alias`.
            MismatchError: open searches would follow the alias to vectors of another passage encoder; or an unfinished
                generation has another encoder, or other options than those given.
        """
        with self.index(alias) as under_alias:
            return reindex.open_generation_of(under_alias, config, options, payload_indexes, average_words)

    def switch_over(self, index: QdrantIndex, alias: str, expected: int, *, keep_former: bool = False) -> str | None:
        """Check that `index`, from `open_generation`, is complete, give it the alias, and drop the collection that had
        it. Returns the name of the dropped collection.

        That collection stays, with a warning, if another process has it open, if another alias names it, if it is not a
        generation of this alias, or with `keep_former`: rows of the corpus were skipped, whose documents it may have.

        Raises:
            StoreError: `index` holds another number of documents than `expected`, or another job has taken it over; the
                alias stays where it was.
        """
        return reindex.complete(index, alias, expected, keep_former)

    def _connection(self) -> Connection | None:
        return connection_to(self.location, **self._server)

    @property
    def _server(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "location"}

    @contextmanager
    def _collection(self, collection: str | QdrantIndex) -> Iterator[Collection]:
        """The collection of that name, closed after the block; or that of an open index, which stays open."""
        if not isinstance(collection, str):
            if collection._collection.place != str(self):
                raise ArgumentError(f"{collection.where} is not at {self}")
            yield collection._collection
            return
        with closing(Collection(collection, self.location, self._connection())) as opened:
            yield opened
