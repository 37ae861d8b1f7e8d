"""Turn documents into points in four stages that overlap: read, compare with the index, tokenise, encode."""

from __future__ import annotations

import hashlib
import json
from collections import ChainMap, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from d2llm.corpus import parse_document
from d2llm.errors import DataError
from d2llm.model import Model, Tokens
from d2llm.passages import content_of, split
from d2llm.payload import check_document
from d2llm.pipeline import prefetched
from d2llm.types import Bytes, Document, Floats, Passage, Point

AHEAD = 16
"""Batches that are compared with the index before they are stored, at most: a few in each stage of the pipeline."""
BATCH = 512
"""How many documents are compared, and passages encoded and stored, at a time. An interrupted job keeps the batches
that it has stored."""


@dataclass(slots=True)
class AddReport:
    """The number of documents that `Index.add` handled in each way.

    `added` documents were stored, `split` of them as several passages, in all as `passages`. `truncated` of the added
    documents were cut to the length limit. `unchanged` documents were in the index already with the same content.
    `pruned` documents were removed because they are not in the corpus any more.
    """

    added: int = 0
    unchanged: int = 0
    truncated: int = 0
    pruned: int = 0
    split: int = 0
    passages: int = 0

    def count(self, batch: Batch) -> None:
        """Add what a batch holds."""
        self.added += len({part.document.id for part in batch.parts})
        self.split += sum(part.passage is not None and part.passage.number == 0 for part in batch.parts)
        self.passages += len(batch.parts)
        self.unchanged += batch.unchanged
        self.truncated += batch.truncated


class Cut(NamedTuple):
    """What the encoder reads of a document: a `passage` of it, or all of it. `content` is the text of `tokens`."""

    passage: Passage | None
    content: str
    tokens: Tokens


class Part(NamedTuple):
    """A passage on its way into an index: all of a document, or a `passage` of it. `digest` is that of the document."""

    document: Document
    digest: str
    passage: Passage | None
    tokens: Tokens


@dataclass(slots=True)
class Batch:
    """Whole documents on their way into an index.

    `new` holds the documents to store with their content digests, `parts` and `points` the results of the later stages.
    `unchanged` is the number of documents that the index has already, `truncated` the number of passages that were cut
    to the length limit.
    """

    new: list[tuple[Document, str]] = field(default_factory=list)
    unchanged: int = 0
    parts: list[Part] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    truncated: int = 0


def encoded_batches(
    model: Model,
    documents: Iterable[Document | Mapping[str, Any]],
    stored: Callable[[list[str]], Mapping[str, str]],
    seen: set[int] | None,
    *,
    chunk: bool = True,
) -> Generator[Batch, None, None]:
    """Yield the documents in batches and encode the new ones, with `chunk` in passages where they are too long.

    `stored` returns the digests of the ids that the index holds. The hash of every id is added to `seen`, unless it is
    None. Close the generator to stop its threads.

    Raises:
        DataError: a document cannot be stored, or an id occurs twice within a batch.
        TypeError: a document is neither a `Document` nor a mapping.
    """
    compared = prefetched(_compared(_parsed(documents), stored, seen, chunk))
    return prefetched(_encoded(model, prefetched(_tokenized(model, compared, chunk))))


def _compared(
    documents: Iterator[Document],
    stored: Callable[[list[str]], Mapping[str, str]],
    seen: set[int] | None,
    chunk: bool,
) -> Iterator[Batch]:
    on_its_way: deque[dict[str, str]] = deque(maxlen=AHEAD)
    """The digests of the last batches, which may not be stored yet."""
    while batch := list(islice(documents, BATCH)):
        digests: dict[str, str] = {}
        for document in batch:
            if document.id in digests:
                raise DataError(f"duplicate id {document.id!r}: ids must be unique")
            digests[document.id] = digest_of(document, chunk=chunk)
        if seen is not None:
            seen.update(map(hash, digests))
        stored_digests = {**stored(list(digests)), **ChainMap(*reversed(on_its_way))}
        on_its_way.append(digests)
        new = [
            (document, digests[document.id])
            for document in batch
            if stored_digests.get(document.id) != digests[document.id]
        ]
        yield Batch(new, len(batch) - len(new))


def _tokenized(model: Model, batches: Iterable[Batch], chunk: bool) -> Iterator[Batch]:
    """Split the documents that are too long, and tokenise. A batch of many passages becomes several batches."""
    for batch in batches:
        cuts = cut_documents(model, [document for document, _ in batch.new], chunk=chunk)
        for (document, digest), of_document in zip(batch.new, cuts, strict=True):
            parts = [Part(document, digest, cut.passage, cut.tokens) for cut in of_document]
            if batch.parts and len(batch.parts) + len(parts) > BATCH:
                yield batch
                batch = Batch()
            batch.parts += parts
        yield batch


def cut_documents(model: Model, documents: Iterable[Document], *, chunk: bool = True) -> Iterator[list[Cut]]:
    """Yield what the encoder reads of each document: with `chunk`, the passages of a document that is too long."""
    waiting = iter(documents)
    while batch := list(islice(waiting, BATCH)):
        tokens = model.document.tokenize([document.content for document in batch])
        for document, whole in zip(batch, tokens, strict=True):
            if chunk and whole.truncated and document.text.strip():
                yield _split(model, document)
            else:
                yield [Cut(None, document.content, whole)]


def _split(model: Model, document: Document) -> list[Cut]:
    limit = model.config.document_max_length
    passages = split(document, model.document.count_tokens, limit)
    contents = [content_of(document, passage, limit, model.document.count_tokens) for passage in passages]
    single = len(passages) == 1  # the title is too long, and is cut
    return [
        Cut(None if single else passage, content, tokens)
        for passage, content, tokens in zip(passages, contents, model.document.tokenize(contents), strict=True)
    ]


def _encoded(model: Model, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if batch.parts:
            embeddings = model.document.encode_tokens([part.tokens for part in batch.parts])
            batch.points = [
                _point(part, vector_E, features_P)
                for part, vector_E, features_P in zip(batch.parts, embeddings.vectors, embeddings.features, strict=True)
            ]
            batch.truncated = embeddings.truncated
        yield batch


def _point(part: Part, vector_E: Floats, features_P: Bytes) -> Point:
    document, passage = part.document, part.passage
    vectors = document.vectors if passage is None or passage.number == 0 else {}
    return Point(document.id, vector_E, features_P, _payload_of(part), part.digest, passage, vectors)


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


def _payload_of(part: Part) -> dict[str, Any]:
    payload, passage = payload_of(part.document), part.passage
    return payload if passage is None else {**payload, "text": part.document.text[passage.start : passage.end]}


def digest_of(document: Document, *, chunk: bool = True) -> str:
    """Return a hexadecimal digest of a document's title, text, payload and, if it has any, vectors (as float32). It
    must have passed `check_document`.

    A document that is never split (without `chunk`) has another digest, so that it is stored anew when that changes.
    """
    content = json.dumps([document.title, document.text, dict(document.payload)], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=16, person=b"" if chunk else b"whole")
    for name, vector in sorted(document.vectors.items()):
        digest.update(f"\n{name}\n".encode())
        digest.update(np.asarray(vector, np.float32).tobytes())
    return digest.hexdigest()
