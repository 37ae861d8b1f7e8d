"""What an index is, whatever holds it; and the simplest one, a flat array. Knows no Qdrant.

`Index.add` is the same for every backend: it encodes in chunks and hands points to `upsert`. Backends implement the
five verbs below it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from d2llm.data import parse_document
from d2llm.errors import DataError, MismatchError
from d2llm.folder import ModelConfig
from d2llm.model import Model
from d2llm.types import Candidates, Document, Filter, Floats

logger = logging.getLogger(__name__)

CHUNK = 512
"""Documents encoded and stored at a time. What was stored stays when the job is interrupted."""
RESERVED = "_d2llm"
"""The payload key that is ours."""


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
    """What `Index.add` did: documents stored, left alone because they were there unchanged, and cut to the limit."""

    added: int = 0
    unchanged: int = 0
    truncated: int = 0


class Index(ABC):
    """Passage vectors, features and payloads under document ids, all made by one passage encoder."""

    def add(
        self,
        model: Model,
        documents: Iterable[Document | Mapping[str, Any]],
        *,
        progress: bool = False,
        total: int | None = None,
    ) -> AddReport:
        """Encode and store `documents`. Those already here with the same content are left alone, so an interrupted
        job is completed by running it again; those with new content replace the old.

        Memory does not grow with the number of documents. `total` is for the progress bar.

        Raises:
            DataError: an empty document, a missing field, a reserved payload key, an id twice within one chunk.
            MismatchError: the index was made by another passage encoder.
            StoreError: the index cannot be reached or is in use.
        """
        self.open_for(model.config)
        report = AddReport()
        with tqdm(total=total, unit="doc", disable=not progress) as bar:
            for chunk in _chunks(_parsed(documents), CHUNK):
                digests = {document.id: digest_of(document) for document in chunk}
                if len(digests) < len(chunk):
                    raise DataError(f"duplicate id {_first_duplicate(chunk)!r}: ids must be unique")
                stored = self.digests(list(digests))
                new = [document for document in chunk if stored.get(document.id) != digests[document.id]]
                if new:
                    embeddings = model.encode_document([document.content for document in new])
                    self.upsert(
                        [
                            Point(document.id, vector, features, payload_of(document), digests[document.id])
                            for document, vector, features in zip(
                                new, embeddings.vectors, embeddings.features, strict=True
                            )
                        ]
                    )
                    report.truncated += embeddings.truncated
                report.added += len(new)
                report.unchanged += len(chunk) - len(new)
                bar.update(len(chunk))
        return report

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
    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """Content digests of those `ids` that are stored."""

    @abstractmethod
    def recall(self, vector: Floats, limit: int, *, filter: Filter | None = None) -> Candidates:
        """The `limit` nearest passages to `vector` [E] by cosine, best first, among those that `filter` lets pass."""

    @abstractmethod
    def get(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Payloads of those `ids` that are stored."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> None:
        """Remove documents; ids that are not stored are no error."""

    @abstractmethod
    def count(self, filter: Filter | None = None) -> int:
        """How many documents are stored, or pass `filter`."""

    def optimize(self) -> None:  # noqa: B027  (a backend without it is complete)
        """Build what makes a large index fast, where there is such a thing. Call it after loading."""

    def close(self) -> None:  # noqa: B027  (nothing to close is the common case)
        """Release what the index holds open."""

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FlatIndex(Index):
    """Everything in arrays, searched exhaustively: the smallest example, and the truth that other backends are
    measured against. Not kept on disk."""

    def __init__(self) -> None:
        self._fingerprint: str | None = None
        self._points: dict[str, Point] = {}
        self._matrix: Floats | None = None

    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        if self._fingerprint is None:
            self._fingerprint = config.fingerprint
        config.require_fingerprint(self._fingerprint, "this index")

    def upsert(self, points: Sequence[Point]) -> None:
        check_points(points, len(next(iter(self._points.values())).vector) if self._points else None)
        self._points.update({point.id: point for point in points})
        self._matrix = None

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        return {id_: self._points[id_].digest for id_ in ids if id_ in self._points}

    def recall(self, vector: Floats, limit: int, *, filter: Filter | None = None) -> Candidates:
        points = list(self._points.values())
        if not points:
            return Candidates([], np.zeros(0, np.float32), np.zeros((0, 0), np.float32), [])
        check_vector(vector, len(points[0].vector))
        if self._matrix is None:
            self._matrix = np.stack([point.vector for point in points])
        scores = self._matrix @ vector
        if filter:
            passing = np.array([matches(point.payload, filter) for point in points])
            scores = np.where(passing, scores, -np.inf)
            limit = min(limit, int(passing.sum()))
        best = np.argsort(-scores, kind="stable")[:limit]
        return Candidates(
            [points[i].id for i in best],
            scores[best],
            np.stack([points[i].features for i in best]) if len(best) else np.zeros((0, 0), np.float32),
            [points[i].payload for i in best],
        )

    def get(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {id_: self._points[id_].payload for id_ in ids if id_ in self._points}

    def delete(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            self._points.pop(id_, None)
        self._matrix = None

    def count(self, filter: Filter | None = None) -> int:
        return sum(matches(point.payload, filter or {}) for point in self._points.values())


def matches(payload: Mapping[str, Any], filter: Filter) -> bool:
    """Whether `payload` passes `filter`: the meaning that every backend's compiled filter must have."""
    return all(_matches_one(payload.get(key), condition) for key, condition in filter.items())


def _matches_one(value: Any, condition: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    if isinstance(condition, Mapping):
        tests = {"gt": np.greater, "gte": np.greater_equal, "lt": np.less, "lte": np.less_equal}
        return any(
            isinstance(one, int | float) and all(tests[name](one, bound) for name, bound in condition.items())
            for one in values
        )
    wanted = condition if isinstance(condition, list) else [condition]
    return any(one is not None and one == other for one in values for other in wanted)


BOUNDS = {"gt", "gte", "lt", "lte"}


def check_filter(filter: Filter) -> None:
    """Raise a `ValueError` that shows the accepted form, if `filter` is a mapping and not of it."""
    if not isinstance(filter, Mapping):
        return  # an engine's own filter object: the engine knows what it takes
    for key, condition in filter.items():
        if isinstance(condition, Mapping):
            ok = bool(condition) and set(condition) <= BOUNDS
            ok = ok and all(isinstance(bound, int | float) for bound in condition.values())
        else:
            values = condition if isinstance(condition, list) else [condition]
            ok = bool(values) and all(isinstance(value, str | int | bool) for value in values)
        if not ok:
            raise ValueError(
                f"filter on {key!r}: {condition!r} is neither a string, an integer, a boolean, a list of these, nor "
                'bounds such as {"gte": 2020, "lt": 2025}'
            )


def check_vector(vector: Floats, width: int) -> None:
    """Raise unless `vector` has shape [width] and is finite: a NaN query finds nothing and says nothing."""
    if vector.shape != (width,):
        raise MismatchError(f"the index holds vectors of {width} dimensions, the query has shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError("the query vector holds NaN or infinity")


def check_points(points: Sequence[Point], width: int | None) -> None:
    """Raise if a point's vector has another width than `width` or is not finite, so that it is never stored."""
    for point in points:
        if width is not None and len(point.vector) != width:
            raise MismatchError(f"the index holds vectors of {width} dimensions, {point.id!r} has {len(point.vector)}")
        if not (np.isfinite(point.vector).all() and np.isfinite(point.features).all()):
            raise ValueError(f"the vector or features of {point.id!r} hold NaN or infinity")


def payload_of(document: Document) -> dict[str, Any]:
    """The payload stored with a document: its own fields, `text`, and `title` if it has one."""
    if RESERVED in document.payload:
        raise DataError(f"document {document.id!r} has a field {RESERVED!r}: that name is reserved")
    return {**document.payload, "text": document.text, **({"title": document.title} if document.title else {})}


def digest_of(document: Document) -> str:
    """Hex digest of everything a document says; a `DataError` if its payload is not JSON."""
    try:
        content = json.dumps([document.title, document.text, dict(document.payload)], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"document {document.id!r}: its payload cannot be written as JSON ({error})") from error
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _parsed(documents: Iterable[Document | Mapping[str, Any]]) -> Iterator[Document]:
    for number, document in enumerate(documents, 1):
        parsed = document if isinstance(document, Document) else parse_document(document, f"document {number}")
        if not parsed.content.strip():
            raise DataError(f"document {parsed.id!r} is empty: neither text nor title")
        yield parsed


def _chunks(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while chunk := list(islice(documents, size)):
        yield chunk


def _first_duplicate(documents: list[Document]) -> str:
    seen: set[str] = set()
    return next(d.id for d in documents if d.id in seen or seen.add(d.id))  # type: ignore[func-returns-value]  # None is meant
