"""Reads collections that something else than d2llm made, so that d2llm can index their documents. Changes none."""

from __future__ import annotations

import functools
import os
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from d2llm.bad_rows import BadRow, OnError, raise_it
from d2llm.errors import ArgumentError, DataError, MismatchError, StoreError, import_extra
from d2llm.payload import check_document
from d2llm.types import RESERVED, Document, StrPath

from .collection import PAGE, known_names
from .edge_folder import collections_in
from .filters import key_of
from .forms import TITLE, Form, fields_of, recognised
from .old_vectors import OldVectors
from .place import Qdrant
from .qdrant import QdrantIndex
from .schema import PAYLOAD_TYPES, PayloadType
from .server import ServerEngine, pages

SAMPLE = 100
"""Points whose form is looked at."""
LOCAL_PAGE = 2**14
"""Points read at a time in local mode, which holds all of them in memory and sorts them for each page."""


def read_collection(
    collection: str,
    location: StrPath,
    *,
    text_field: str | None = None,
    keep_vectors: bool = False,
    on_error: OnError | None = None,
    **server: Any,
) -> Iterator[Document]:
    """Yield the documents of a collection that something else than d2llm made, for `index.add(model, ...)`.

    `location` is the address of a server, or a folder of qdrant-client's local mode (which keeps pickles: read only
    folders that you trust). `server` has the arguments of `Qdrant`. `text_field` names the field with the text, or a
    path such as `metadata.body`; by default it is found, if LangChain, LlamaIndex, Haystack, fastembed or
    mcp-server-qdrant made the collection, or if it is `text`.

    The id of a document is that of its point, as a string. The payload keeps its keys, but the text moves to `text`,
    another `text` to `source_text`, and a `title` that is no string to `source_title`. The first page is read when the
    first document is asked for.

    With `keep_vectors`, a document has the dense vectors of its point too: one without a name as `old`. The index must
    be made with their sizes and distances as the option `kept` (see `CollectionOptions`).

    Raises:
        StoreError: the collection is missing, in use (in a folder), or cannot be reached.
        MismatchError: d2llm made the collection.
        DataError: the collection has no points, or a form that is not known; or no vectors that can be kept.
        BadRow: a point has no text, or an index cannot store it; or it lacks a vector to keep. With `on_error`, that
            gets it, and the point is left out.

    Example:
        >>> from d2llm.connectors import read_collection
        >>> index.add(model, read_collection("docs", "http://localhost:6333"))  # doctest: +SKIP
    """
    with ForeignCollection(collection, Qdrant(location, **server), text_field, keep_vectors) as source:
        yield from source.documents(on_error)


class ForeignCollection:
    """A collection that something else made: its documents, payload indexes and aliases.

    It opens at first use. In a folder of local mode it is then closed to all others until `close`.
    """

    def __init__(self, name: str, qdrant: Qdrant, text_field: str | None = None, keep_vectors: bool = False) -> None:
        """Name the collection `name`, or an alias of it, at the place `qdrant`. `text_field` and `keep_vectors` are
        those of `read_collection`.

        Raises:
            ArgumentError: an empty name or field.
        """
        if not name or text_field == "":
            raise ArgumentError(f"{'text field' if name else 'collection'} '': expected a name")
        self.name, self._qdrant, self._text_field, self._keep_vectors = name, qdrant, text_field, keep_vectors
        connection = qdrant._connection()
        self._reader = ServerEngine(name, connection) if connection else _LocalMode(Path(qdrant.location), name)

    @property
    def where(self) -> str:
        """The collection and its place, for messages."""
        return f"collection {self.name!r} at {self._qdrant}"

    @functools.cached_property
    def form(self) -> Form:
        """Where the texts are.

        Raises:
            StoreError, MismatchError, DataError: as `read_collection`.
        """
        self._open()
        sample = [record.payload or {} for record in next(self._reader.records(SAMPLE))[:SAMPLE]]
        if not sample:
            raise DataError(f"{self.where} has no points")
        if self._text_field is not None:
            return Form("", self._text_field)
        if (form := recognised(sample)) is None:
            raise DataError(
                f"{self.where} has none of the forms that are known (LangChain, LlamaIndex, Haystack, fastembed, "
                f"mcp-server-qdrant, a field 'text'). Name the field with the text (--text-field; in Python "
                f"text_field). The fields are: {fields_of(sample)}"
            )
        return form

    @functools.cached_property
    def old_vectors(self) -> OldVectors | None:
        """The vectors of the points; None without `keep_vectors`.

        Raises:
            StoreError, MismatchError: as `read_collection`.
            DataError: none of them can be kept.
        """
        if not self._keep_vectors:
            return None
        self._open()
        vectors = OldVectors.of(self._reader.info().config.params)
        if not vectors.names:
            raise DataError(f"{self.where} has no dense vectors, which could be kept: leave --keep-vectors out")
        return vectors

    def documents(self, on_error: OnError | None = None) -> Iterator[Document]:
        """Yield the documents, as `read_collection`. It may be called again."""
        form, old, reject = self.form, self.old_vectors, on_error or raise_it
        for page in self._reader.records(PAGE, with_vectors=old.selector if old else False):
            for record in page:
                try:
                    document = self._document(form, str(record.id), record.payload or {}, record.vector)
                except BadRow as error:
                    reject(error)
                else:
                    yield document

    def _document(self, form: Form, id_: str, payload: dict[str, Any], vector: Any) -> Document:
        where = f"collection {self.name}, point {id_}"
        try:
            text, fields = form.split(payload)
            vectors = self.old_vectors.of_point(vector) if self.old_vectors else {}
            document = Document(id_, text, fields.get(TITLE, ""), fields, vectors)
            check_document(document)
        except ValueError as error:
            raise BadRow(where, str(error), payload, id_) from error
        if not document.content.strip():
            raise BadRow(where, f"the text in the field {form.field!r} is empty", payload, id_)
        return document

    def count(self) -> int:
        """The number of points."""
        self._open()
        return self._reader.count(None)

    def aliases(self) -> list[str]:
        """The aliases of the collection."""
        return sorted(alias for alias, name in self._names()[1].items() if name == self._resolved())

    def payload_indexes(self) -> tuple[dict[str, PayloadType], dict[str, str]]:
        """The payload indexes that d2llm can make, and the others: `{field: type}`. That of the text is left out."""
        self._open()
        own, others = dict[str, PayloadType](), dict[str, str]()
        for path, index in (self._reader.info().payload_schema or {}).items():
            key, kind = key_of(path), index.data_type.value
            if path == self.form.field:
                continue
            if kind in PAYLOAD_TYPES and key is not None:
                own[key] = kind
            else:
                others[path] = kind
        return own, others

    def require_other(self, target: QdrantIndex) -> None:
        """Raise `ArgumentError` if `target` is this collection."""
        place = os.fspath(self._qdrant.location)
        place = str(self._qdrant).rstrip("/") if self._qdrant.shared else os.path.realpath(place)
        if target._collection.identity() == (place, self._resolved()):
            raise ArgumentError(f"{self.where} would be indexed into itself: give the new collection another name")

    def close(self) -> None:
        """Release the folder or the connection. The next use opens it again."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _names(self) -> tuple[list[str], dict[str, str]]:
        self._reader.connect()
        return self._reader.collections()

    def _resolved(self) -> str:
        return self._names()[1].get(self.name, self.name)

    def _open(self) -> None:
        """Check that the collection is there, and that something else made it."""
        names, aliases = self._names()
        known = [*names, *aliases]
        ours = [] if self._qdrant.shared else [name for found in self._qdrant.collections() for name in found]
        if self.name in known and RESERVED not in (self._reader.info().config.metadata or {}):
            return
        if self.name in [*known, *ours]:
            place = shlex.quote(str(self._qdrant))
            raise MismatchError(
                f"{self.where} is d2llm's own: copy it with: d2llm collection migrate {shlex.quote(self.name)} "
                f"--qdrant {place} --to {place} --as NAME. For another model, index its corpus again"
            )
        raise StoreError(f"no collection {self.name!r} at {self._qdrant}. {known_names(known)}")


class _LocalMode:
    """A collection in a folder of qdrant-client's local mode, with the methods of `ServerEngine` that reading needs."""

    def __init__(self, folder: Path, collection: str) -> None:
        self._folder, self._collection = folder, collection
        self._client: Any = None

    def connect(self) -> None:
        """Open the folder, if it is not open yet.

        Raises:
            StoreError: it is no folder of local mode, is in use, or cannot be read.
        """
        if self._client is not None:
            return
        client = import_extra("qdrant_client", "qdrant").QdrantClient
        if not (self._folder / "meta.json").is_file():  # the client would make it
            if ours := collections_in(self._folder)[0]:
                raise MismatchError(
                    f"no collection {self._collection!r}: {self._folder} holds collections of d2llm, none of "
                    f"qdrant-client's local mode. {known_names(ours)} To copy one: d2llm collection migrate NAME "
                    f"--qdrant {shlex.quote(str(self._folder))} --to PATH_OR_URL"
                )
            raise StoreError(
                f"{self._folder} is no folder of qdrant-client's local mode: it has no meta.json. Give the folder of "
                "QdrantClient(path=...), or the address of a server"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that local mode is for small collections
                # Documents are read in another thread than this one. Only one reads at a time.
                self._client = client(path=str(self._folder), force_disable_check_same_thread=True)
        except Exception as error:  # whatever a damaged file, pickle or database raises
            in_use = "already accessed" in str(error)
            reason = "is open elsewhere: close the client that uses it" if in_use else f"cannot be read: {error}"
            raise StoreError(f"{self._folder} {reason}") from error

    def collections(self) -> tuple[list[str], dict[str, str]]:
        """All collections, and `{alias: collection}`."""
        aliases = self._client.get_aliases().aliases
        names = [collection.name for collection in self._client.get_collections().collections]
        return sorted(names), {alias.alias_name: alias.collection_name for alias in aliases}

    def info(self) -> Any:
        """What the client says about the collection."""
        return self._client.get_collection(self._collection)

    def count(self, filter: Any) -> int:
        """How many points pass `filter`; all pass None."""
        return int(self._client.count(self._collection, count_filter=filter).count)

    def records(self, size: int, **selected: Any) -> Iterator[list[Any]]:
        """All points, in pages."""
        size = max(size, LOCAL_PAGE)
        return pages(functools.partial(self._client.scroll, self._collection, limit=size, **selected))

    def close(self) -> None:
        """Close the folder."""
        if self._client is not None:
            self._client.close()
            self._client = None
