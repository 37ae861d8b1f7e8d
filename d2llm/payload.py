"""The limits of a document: the values that every index stores and returns unchanged. Depends on no index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from d2llm.errors import DataError
from d2llm.types import RESERVED, Document, Point

MAX_DEPTH = 30
"""How deep objects and lists may be nested; the payload itself is level 1.

A gRPC message has at most 100 levels, and an object takes 3 of them. An embedded collection that holds an object of 124
levels can never be opened again."""
MAX_BYTES = 8 * 2**20
"""The largest document, in bytes of JSON.

A server accepts requests of 32 MB. A request also holds the document's vectors, its words and copies of its numbers."""


def check_document(document: Document) -> None:
    """Check that every index can store `document`.

    Raises:
        DataError: an index cannot store it; names the document, the field and the reason.
    """
    try:
        storable({"id": document.id})
        if not document.id:
            raise ValueError("its id is empty")
        if not isinstance(document.payload.get("title", ""), str):
            raise ValueError("field 'title': expected a string, or give it another name")
        storable({**document.payload, "text": document.text, "title": document.title})
        for name, vector in document.vectors.items():
            if not np.isfinite(np.asarray(vector, np.float32)).all():
                raise ValueError(f"vector {name!r} holds NaN or infinity")
    except ValueError as error:
        raise DataError(f"document {document.id!r}: {error}") from error


def title_of(payload: Mapping[str, Any]) -> str:
    """The title of a stored document, if it has one. (Collections of earlier versions may have other things there.)"""
    title = payload.get("title")
    return title if isinstance(title, str) else ""


def storable(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Copy `payload` in JSON's types (a tuple becomes a list). Every index returns the copy unchanged.

    Raises:
        ValueError: the payload has the reserved key, a key that is not a string, an integer beyond 64 bits, NaN or
            infinity, half of a surrogate pair, a value that JSON lacks, more than `MAX_DEPTH` levels, or more than
            `MAX_BYTES` bytes.
    """
    sizes: list[int] = []
    copy = {}
    for key, value in payload.items():
        if key == RESERVED:
            raise ValueError(f"field {key!r}: d2llm reserves this name: rename the field")
        try:
            copy[_key(key, sizes)] = _copied(value, 2, sizes)
        except ValueError as error:
            raise ValueError(f"field {key!r}: {error}") from error
    if (size := sum(sizes)) > MAX_BYTES:
        raise ValueError(f"it takes {size / 2**20:,.1f} MB, and a document may take {MAX_BYTES // 2**20} MB: split it")
    return copy


def _copied(value: Any, level: int, sizes: list[int]) -> Any:
    if isinstance(value, str):
        try:
            sizes.append(len(value.encode()) + 3)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"it cannot be written as UTF-8: half of a surrogate pair at character {error.start + 1}"
            ) from error
        return value
    if isinstance(value, list | tuple | dict):
        if level > MAX_DEPTH:
            raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep: flatten it")
        if isinstance(value, dict):
            return {_key(key, sizes): _copied(item, level + 1, sizes) for key, item in value.items()}
        return [_copied(item, level + 1, sizes) for item in value]
    sizes.append(20)  # characters of the longest number
    return _plain(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError("an integer beyond 64 bits: write it as text")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a JSON number (1.8e308 and more is read as infinity): leave it out")
        return float(value)
    raise ValueError(f"JSON has no type {type(value).__name__}: leave the value out or write it as text")


def _key(key: Any, sizes: list[int]) -> str:
    if not isinstance(key, str):
        raise ValueError(f"the key {key!r} is not a string: write it as text")
    copied: str = _copied(key, 1, sizes)
    return copied


def stored_payload(point: Point) -> dict[str, Any]:
    """Copy a point's payload in the form that every index returns.

    Raises:
        DataError: the payload or the id cannot be stored; names the document and the reason.
    """
    try:
        storable({"id": point.id})
        return storable(point.payload)
    except ValueError as error:
        raise DataError(f"document {point.id!r}: {error}") from error
