"""What an index is, whatever holds it; and the simplest one, a flat array. Knows no Qdrant.

`Index.add` is the same for every backend: it encodes in chunks and hands points to `upsert`. Backends implement the
five verbs below it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import reprlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self

import numpy as np
from tqdm.auto import tqdm

from d2llm.data import parse_document
from d2llm.errors import ArgumentError, DataError, MismatchError, StoreError
from d2llm.folder import ModelConfig
from d2llm.model import Model, Tokens
from d2llm.payload import check_document, storable
from d2llm.pipeline import prefetched
from d2llm.types import Candidates, Document, Embeddings, Filter, Floats, Fusion, is_utf8, strings

logger = logging.getLogger(__name__)

CHUNK = 512
"""Documents encoded and stored at a time. What was stored stays when the job is interrupted."""


@dataclass(frozen=True, slots=True)
class Point:
    """A document as an index stores it: `vector` [E] and `features` [H] float32, `digest` of its content."""

    id: str
    vector: Floats
    features: Floats
    payload: dict[str, Any]
    digest: str


@dataclass(slots=True)
class AddReport:
    """What `Index.add` did: documents stored, left alone because they were there unchanged, cut to the limit, and
    removed because they are not in the corpus any more."""

    added: int = 0
    unchanged: int = 0
    truncated: int = 0
    pruned: int = 0


@dataclass(slots=True)
class _Chunk:
    """Documents on their way: `new` ones with the digests of their content; beside them `unchanged` ones were read."""

    new: list[Document]
    digests: list[str]
    unchanged: int
    tokens: list[Tokens] = field(default_factory=list)
    embeddings: Embeddings | None = None


class Index(ABC):
    """Passage vectors, features and payloads under document ids, all made by one passage encoder."""

    def add(
        self,
        model: Model,
        documents: Iterable[Document | Mapping[str, Any]],
        *,
        prune: bool = False,
        progress: bool = False,
        total: int | None = None,
    ) -> AddReport:
        """Encode and store `documents`. Those already here with the same content are left alone, so an interrupted
        job is completed by running it again; those with new content replace the old. With `prune`, those that are here
        and not among `documents` are removed, once all others are stored.

        Reading, tokenising, encoding and storing overlap. Memory does not grow with the number of documents (`prune`
        remembers 60 bytes of each). `total` is for the progress bar.

        Raises:
            DataError: an empty document, a missing field, a reserved payload key, an id twice within one chunk; `prune`
                without any documents.
            MismatchError: the index was made by another passage encoder.
            StoreError: the index cannot be reached or is in use.
            TypeError: `documents` is a single one, or one of them is neither a `Document` nor a mapping.
        """
        if isinstance(documents, str | Mapping | Document):
            raise TypeError("expected a list of documents, found a single one: pass [document]")
        self.open_for(model.config)
        report = AddReport()
        seen: set[int] = set()
        read = prefetched(self._compared(_parsed(documents), seen if prune else None))
        encoded = prefetched(_encoded(model, prefetched(_tokenized(model, read))))
        with tqdm(total=total, unit="doc", disable=not progress) as bar, closing(encoded):
            for chunk in encoded:
                if chunk.embeddings is not None:
                    self.upsert(_points(chunk, chunk.embeddings))
                    report.truncated += chunk.embeddings.truncated
                report.added += len(chunk.new)
                report.unchanged += chunk.unchanged
                bar.update(len(chunk.new) + chunk.unchanged)
        if prune:
            report.pruned = self._prune(seen)
        return report

    def prune(self, ids: Iterable[str]) -> int:
        """Remove the documents whose ids are not among `ids`; how many they were.

        Raises:
            DataError: there are no `ids`: that would empty the index.
            TypeError: `ids` is a single string, or one of them is no string.
        """
        return self._prune({hash(id_) for id_ in strings(ids, "id")})

    def _compared(self, documents: Iterator[Document], seen: set[int] | None) -> Iterator[_Chunk]:
        """Chunks with what is not stored yet; the hashes of all ids go into `seen`."""
        for chunk in _chunks(documents, CHUNK):
            digests = {document.id: digest_of(document) for document in chunk}
            if len(digests) < len(chunk):
                raise DataError(f"duplicate id {_first_duplicate(chunk)!r}: ids must be unique")
            if seen is not None:
                seen.update(map(hash, digests))
            stored = self.digests(list(digests))
            new = [document for document in chunk if stored.get(document.id) != digests[document.id]]
            yield _Chunk(new, [digests[document.id] for document in new], len(chunk) - len(new))

    def _prune(self, seen: set[int]) -> int:
        if not seen:
            raise DataError("no documents were given: pruning would empty the index")
        vanished = [id_ for id_ in self.ids() if hash(id_) not in seen]
        for start in range(0, len(vanished), CHUNK):
            self.delete(vanished[start : start + CHUNK])
        return len(vanished)

    @contextmanager
    def bulk_load(self) -> Iterator[None]:
        """A block that stores much: what makes a large index fast is left for its end, and then built."""
        yield
        self.optimize()

    @abstractmethod
    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        """Make sure the index holds this model's vectors; make it if it is missing and `create`.

        Raises:
            MismatchError: another passage encoder made it.
            StoreError: it is missing (without `create`), cannot be reached, or is in use.
        """

    @abstractmethod
    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, replacing those with the same id. All acknowledged when this returns."""

    @abstractmethod
    def digests(self, ids: Iterable[str]) -> dict[str, str]:
        """Content digests of those `ids` that are stored.

        Raises:
            TypeError: `ids` is a single string, or one of them is no string.
        """

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Every stored id, in no order. Documents that come or go meanwhile may or may not be among them."""

    @abstractmethod
    def recall(
        self, vector: Floats, limit: int, *, filter: Filter | None = None, words: str = "", fusion: Fusion = "rrf"
    ) -> Candidates:
        """The `limit` nearest passages to `vector` [E] by cosine, best first, among those that `filter` lets pass.

        With `words` (the query's text) recall is hybrid: as many are found by BM25 too, and the `limit` best of both by
        `fusion` come back in that order, their cosines beside them all the same.

        Raises:
            MismatchError: a vector of another width, or `words` in an index that keeps none.
            ArgumentError: NaN or infinity in the vector, `limit` below 1, or a filter of another form.
            StoreError: the index is missing, cannot be reached, or is in use.
        """

    async def arecall(
        self, vector: Floats, limit: int, *, filter: Filter | None = None, words: str = "", fusion: Fusion = "rrf"
    ) -> Candidates:
        """`recall` for an event loop: in a thread, unless the index can wait without one."""
        return await asyncio.to_thread(self.recall, vector, limit, filter=filter, words=words, fusion=fusion)

    @abstractmethod
    def get(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Payloads of those `ids` that are stored.

        Raises:
            TypeError: `ids` is a single string, or one of them is no string.
        """

    @abstractmethod
    def delete(self, ids: Iterable[str]) -> None:
        """Remove documents; ids that are not stored are no error.

        Raises:
            TypeError: `ids` is a single string, or one of them is no string. Nothing is removed then.
        """

    @abstractmethod
    def count(self, filter: Filter | None = None) -> int:
        """How many documents are stored, or pass `filter`."""

    def optimize(self) -> None:  # noqa: B027  (a backend without it is complete)
        """Build what makes a large index fast, where there is such a thing. Call it after loading."""

    def close(self) -> None:  # noqa: B027  (nothing to close is the common case)
        """Release what the index holds open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FlatIndex(Index):
    """Everything in arrays, searched exhaustively: the smallest example, and the truth that other backends are
    measured against. Not kept on disk."""

    def __init__(self) -> None:
        self._config: ModelConfig | None = None
        self._points: dict[str, Point] = {}
        self._matrix: Floats | None = None

    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        if self._config is None and create:
            self._config = config
        made = self._made_for()
        config.require_fingerprint(made.fingerprint, "this index")
        config.require_dimensions(made.embedding_dim, made.feature_dim, "this index")

    def _made_for(self) -> ModelConfig:
        if self._config is None:
            raise StoreError("this index is empty: add documents first, with Index.add")
        return self._config

    def upsert(self, points: Sequence[Point]) -> None:
        config = self._made_for()
        check_points(points, config.embedding_dim, config.feature_dim)
        self._points |= {
            point.id: Point(point.id, _unit(point.vector), point.features.copy(), stored_payload(point), point.digest)
            for point in points
        }
        self._matrix = None

    def digests(self, ids: Iterable[str]) -> dict[str, str]:
        return {point.id: point.digest for point in self._found(ids)}

    def ids(self) -> Iterator[str]:
        self._made_for()
        return iter(list(self._points))

    def recall(
        self, vector: Floats, limit: int, *, filter: Filter | None = None, words: str = "", fusion: Fusion = "rrf"
    ) -> Candidates:
        config = self._made_for()
        check_vector(vector, config.embedding_dim)
        check_limit(limit)
        rows = np.array(self._passing(filter), np.int64)
        if words:
            raise MismatchError("a flat index keeps no words: search it without hybrid recall")
        points = list(self._points.values())
        if self._matrix is None:
            vectors = [point.vector for point in points]
            self._matrix = np.array(vectors, np.float32).reshape(len(points), config.embedding_dim)
        scores = self._matrix @ _unit(vector)
        best = rows[np.argsort(-scores[rows], kind="stable")[:limit]]
        features = [points[row].features for row in best]
        return Candidates(
            [points[row].id for row in best],
            scores[best],
            np.array(features, np.float32).reshape(len(best), config.feature_dim),
            [deepcopy(points[row].payload) for row in best],
        )

    def get(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        return {point.id: deepcopy(point.payload) for point in self._found(ids)}

    def delete(self, ids: Iterable[str]) -> None:
        for point in self._found(ids):
            del self._points[point.id]
        self._matrix = None

    def count(self, filter: Filter | None = None) -> int:
        return len(self._passing(filter))

    def _found(self, ids: Iterable[str]) -> list[Point]:
        self._made_for()
        wanted = dict.fromkeys(strings(ids, "id"))
        return [self._points[id_] for id_ in wanted if id_ in self._points]

    def _passing(self, filter: Filter | None) -> list[int]:
        """Where among the points those are that pass."""
        self._made_for()
        if filter is None:
            return list(range(len(self._points)))
        if not isinstance(filter, Mapping):
            raise ArgumentError(f"filter {filter!r}: expected a mapping")
        check_filter(filter)
        return [row for row, point in enumerate(self._points.values()) if matches(point.payload, filter)]


def _unit(vector: Floats) -> Floats:
    """The vector at length 1, so that products are cosines."""
    length = np.linalg.norm(vector)
    unit: Floats = vector / length if length else vector.copy()
    return unit


def matches(payload: Mapping[str, Any], filter: Filter) -> bool:
    """Whether `payload` passes `filter`: the meaning that every backend's compiled filter must have."""
    return all(_matches_one(payload.get(key), condition) for key, condition in filter.items())


def _matches_one(value: Any, condition: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    if isinstance(condition, Mapping):
        tests = {"gt": np.greater, "gte": np.greater_equal, "lt": np.less, "lte": np.less_equal}
        return any(
            isinstance(one, int | float)
            and all(tests[name](float(one), float(bound)) for name, bound in condition.items())
            for one in values
        )
    wanted = condition if isinstance(condition, list) else [condition]
    return any(one is not None and one == other for one in values for other in wanted)


BOUNDS = {"gt", "gte", "lt", "lte"}


def check_filter(filter: Filter) -> None:
    """Raise an `ArgumentError` that shows the accepted form, if `filter` is a mapping and not of it."""
    if not isinstance(filter, Mapping):
        return  # an engine's own filter object: the engine knows what it takes
    for key, condition in filter.items():
        if not isinstance(key, str) or not is_utf8(key):
            raise ArgumentError(f"filter on {reprlib.repr(key)}: expected the name of a field, a text")
        if isinstance(condition, Mapping):
            ok = bool(condition) and set(condition) <= BOUNDS and all(map(_is_bound, condition.values()))
        else:
            values = condition if isinstance(condition, list) else [condition]
            ok = bool(values) and all(map(_is_value, values))
        if not ok:
            raise ArgumentError(
                f"filter on {key!r}: {reprlib.repr(condition)} is neither a string, an integer of 64 bits, a boolean, "
                'a list of these, nor finite bounds such as {"gte": 2020, "lt": 2025}'
            )


def _is_bound(bound: Any) -> bool:
    return isinstance(bound, int | float) and abs(bound) <= sys.float_info.max


def _is_value(value: Any) -> bool:
    return is_utf8(value) if isinstance(value, str) else isinstance(value, int) and -(2**63) <= value < 2**63


def check_limit(limit: int) -> None:
    """Raise an `ArgumentError` unless `limit` passages can be asked for: from 1 on, also more than there are."""
    if limit < 1:
        raise ArgumentError(f"expected to recall at least 1 passage, found {limit}")


def check_vector(vector: Floats, width: int) -> None:
    """Raise unless `vector` has shape [width] and is finite: a NaN query finds nothing and says nothing."""
    if vector.shape != (width,):
        raise MismatchError(f"the index holds vectors of {width} dimensions, the query has shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ArgumentError("the query vector holds NaN or infinity")


def check_points(points: Sequence[Point], embedding_dim: int, feature_dim: int) -> None:
    """Raise if a point's vector or features have another width, or are not finite, so that it is never stored."""
    for point in points:
        for what, found, width in (("vectors", point.vector, embedding_dim), ("features", point.features, feature_dim)):
            if found.shape != (width,):
                raise MismatchError(f"the index holds {what} of {width} dimensions, {point.id!r} has {found.shape}")
        if not (np.isfinite(point.vector).all() and np.isfinite(point.features).all()):
            raise ArgumentError(f"the vector or features of {point.id!r} hold NaN or infinity")


def stored_payload(point: Point) -> dict[str, Any]:
    """A copy of a point's payload, as every index gives it back.

    Raises:
        DataError: a payload or id that cannot be stored; names the document and the reason.
    """
    try:
        storable({"id": point.id})
        return storable(point.payload)
    except ValueError as error:
        raise DataError(f"document {point.id!r}: {error}") from error


def payload_of(document: Document) -> dict[str, Any]:
    """The payload stored with a document: its own fields, `text`, and `title` if it has one."""
    return {**document.payload, "text": document.text, **({"title": document.title} if document.title else {})}


def digest_of(document: Document) -> str:
    """Hex digest of everything that a document says, which must pass `check_document`."""
    content = json.dumps([document.title, document.text, dict(document.payload)], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


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


def _tokenized(model: Model, chunks: Iterable[_Chunk]) -> Iterator[_Chunk]:
    for chunk in chunks:
        chunk.tokens = model.document.tokenize([document.content for document in chunk.new])
        yield chunk


def _encoded(model: Model, chunks: Iterable[_Chunk]) -> Iterator[_Chunk]:
    for chunk in chunks:
        if chunk.new:
            chunk.embeddings = model.document.encode_tokens(chunk.tokens)
        yield chunk


def _points(chunk: _Chunk, embeddings: Embeddings) -> list[Point]:
    rows = zip(chunk.new, chunk.digests, embeddings.vectors, embeddings.features, strict=True)
    return [
        Point(document.id, vector, features, payload_of(document), digest)
        for document, digest, vector, features in rows
    ]


def _chunks(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while chunk := list(islice(documents, size)):
        yield chunk


def _first_duplicate(documents: list[Document]) -> str:
    seen: set[str] = set()
    return next(d.id for d in documents if d.id in seen or seen.add(d.id))  # type: ignore[func-returns-value]  # None is meant
