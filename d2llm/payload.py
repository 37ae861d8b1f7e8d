"""What a document may hold: what every index and server takes, and gives back equal. Knows no index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from d2llm.errors import DataError
from d2llm.types import RESERVED, Document, Point

MAX_DEPTH = 30
"""Objects and lists within each other, the payload being the first. A gRPC message has at most 100 levels, and an
object takes 3 of them; an embedded collection with an object of 124 levels never opens again."""
MAX_BYTES = 8 * 2**20
"""Of a document as JSON. A server takes requests of 32 MB, and a document's vectors, words and copies of its numbers
are part of them."""


def check_document(document: Document) -> None:
    """See that every index can store `document`.

    Raises:
        DataError: it cannot; names the document, the field and the reason.
    """
    try:
        storable({"id": document.id})
        storable({**document.payload, "text": document.text, "title": document.title})
    except ValueError as error:
        raise DataError(f"document {document.id!r}: {error}") from error


def storable(payload: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `payload` in JSON's types (a tuple becomes a list), which every index gives back equal.

    Raises:
        ValueError: there is none: it has the reserved key or another that is no string, an integer beyond 64 bits, NaN
            or infinity, half of a surrogate pair, a value of another type, more than `MAX_DEPTH` levels or `MAX_BYTES`.
    """
    sizes: list[int] = []
    copy = {}
    for key, value in payload.items():
        if key == RESERVED:
            raise ValueError(f"field {key!r}: that name is reserved")
        try:
            copy[_key(key, sizes)] = _copied(value, 2, sizes)
        except ValueError as error:
            raise ValueError(f"field {key!r}: {error}") from error
    if (size := sum(sizes)) > MAX_BYTES:
        raise ValueError(
            f"it takes {size / 2**20:,.1f} MB, and an index takes {MAX_BYTES // 2**20} a document: split it"
        )
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
            return {_key(key, sizes): _copied(one, level + 1, sizes) for key, one in value.items()}
        return [_copied(one, level + 1, sizes) for one in value]
    sizes.append(20)  # the longest numbers
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
            raise ValueError(f"{value} is no JSON number (one beyond 1.8e308 is read as infinity): leave it out")
        return float(value)
    raise ValueError(f"JSON has no {type(value).__name__}: leave it out, or write it as text")


def _key(key: Any, sizes: list[int]) -> str:
    if not isinstance(key, str):
        raise ValueError(f"a key that is no string: {key!r}")
    copied: str = _copied(key, 1, sizes)
    return copied


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
