"""Turn documents into points in four stages that overlap: read, compare with the index, tokenise, encode."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from d2llm.corpus import parse_document
from d2llm.errors import DataError
from d2llm.model import Model, Tokens
from d2llm.payload import check_document
from d2llm.pipeline import prefetched
from d2llm.types import Document, Point

CHUNK = 512
"""How many documents are encoded and stored at a time. An interrupted job keeps the chunks that it has stored."""


@dataclass(slots=True)
class AddReport:
    """The number of documents that `Index.add` handled in each way.

    `added` documents were stored. `unchanged` documents were in the index already with the same content. `truncated` of
    the added documents were cut to the length limit. `pruned` documents were removed because they are not in the corpus
    any more.
    """

    added: int = 0
    unchanged: int = 0
    truncated: int = 0
    pruned: int = 0


@dataclass(slots=True)
class Chunk:
    """Up to `CHUNK` documents on their way into an index.

    `new` holds the documents to store, `digests` their content digests, `tokens` and `points` the results of the later
    stages. `unchanged` is the number of documents that the index has already, `truncated` the number of new documents
    that were cut to the length limit.
    """

    new: list[Document]
    digests: list[str]
    unchanged: int
    tokens: list[Tokens] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    truncated: int = 0


def encoded_chunks(
    model: Model,
    documents: Iterable[Document | Mapping[str, Any]],
    stored: Callable[[list[str]], Mapping[str, str]],
    seen: set[int] | None,
) -> Generator[Chunk, None, None]:
    """Yield the documents in chunks and encode the new ones.

    `stored` returns the digests of the ids that the index holds. The hash of every id is added to `seen`, unless it is
    None. Close the generator to stop its threads.

    Raises:
        DataError: a document cannot be stored, or an id occurs twice within a chunk.
        TypeError: a document is neither a `Document` nor a mapping.
    """
    compared = prefetched(_compared(_parsed(documents), stored, seen))
    return prefetched(_encoded(model, prefetched(_tokenized(model, compared))))


def _compared(
    documents: Iterator[Document], stored: Callable[[list[str]], Mapping[str, str]], seen: set[int] | None
) -> Iterator[Chunk]:
    while chunk := list(islice(documents, CHUNK)):
        digests: dict[str, str] = {}
        for document in chunk:
            if document.id in digests:
                raise DataError(f"duplicate id {document.id!r}: ids must be unique")
            digests[document.id] = digest_of(document)
        if seen is not None:
            seen.update(map(hash, digests))
        stored_digests = stored(list(digests))
        new = [document for document in chunk if stored_digests.get(document.id) != digests[document.id]]
        yield Chunk(new, [digests[document.id] for document in new], len(chunk) - len(new))


def _tokenized(model: Model, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        chunk.tokens = model.document.tokenize([document.content for document in chunk.new])
        yield chunk


def _encoded(model: Model, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        if chunk.new:
            embeddings = model.document.encode_tokens(chunk.tokens)
            rows = zip(chunk.new, chunk.digests, embeddings.vectors, embeddings.features, strict=True)
            chunk.points = [
                Point(document.id, vector_E, features_H, payload_of(document), digest)
                for document, digest, vector_E, features_H in rows
            ]
            chunk.truncated = embeddings.truncated
        yield chunk


def _parsed(documents: Iterable[Document | Mapping[str, Any]]) -> Iterator[Document]:
    for number, document in enumerate(documents, 1):
        if isinstance(document, Mapping):
            yield parse_document(document, f"document {number}")
            continue
        if not isinstance(document, Document):
            raise TypeError(f"document {number}: expected a Document or a mapping, found {document!r}")
        for name, value in (("id", document.id), ("text", document.text), ("title", document.title)):
            if not isinstance(value, str):
                raise TypeError(f"document {document.id!r}: expected its {name} to be a string, found {value!r}")
        check_document(document)
        if not document.content.strip():
            raise DataError(f"document {document.id!r} is empty: neither text nor title")
        yield document


def payload_of(document: Document) -> dict[str, Any]:
    """Return the payload to store with a document: its own fields, `text`, and `title` if it has one."""
    return {**document.payload, "text": document.text, **({"title": document.title} if document.title else {})}


def digest_of(document: Document) -> str:
    """Return a hexadecimal digest of a document's title, text and payload. It must have passed `check_document`."""
    content = json.dumps([document.title, document.text, dict(document.payload)], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
