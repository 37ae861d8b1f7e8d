"""How points and their features are written in Qdrant. It is the same in both engines.

Features are base64 in the payload. With 100 candidates this takes a fifth of the time of a named vector, which comes
back as lists of Python floats. K candidates, P bytes of features, rounded up to a multiple of 3.
"""

from __future__ import annotations

import json
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from d2llm.errors import DataError, MismatchError
from d2llm.passages import joined
from d2llm.payload import storable, stored_payload
from d2llm.types import RESERVED, Bytes, Candidates, Passage, Point, strings

from .bm25 import Bm25Encoder, with_sparse
from .engine import Search, SearchResult, StoredPoint
from .schema import KeptVector

NAMESPACE = uuid.UUID("6b1f6a52-5c0e-5d3c-9a55-0d2d1f3f7c11")


ID, DIGEST, FEATURES, INTEGERS, EXACT = "id", "digest", "features", "integers", "exact"
PASSAGE, TIME = "passage", "time"
POINT = "point"
"""The point's own id, in what a search returns without payloads. It is not stored."""
HEAD_KEYS = [f"{RESERVED}.{key}" for key in (ID, DIGEST, PASSAGE)]
"""The keys of the payload that tell which version of a document a point is of."""
NUMBER_PATH = f"{RESERVED}.{PASSAGE}.number"
"""The number of a passage. It is indexed, so that the points of first passages, of which each document has one, are
counted fast."""


def point_id(id_: str, digest: str = "", number: int = 0) -> str:
    """The UUID under which Qdrant keeps a passage of the document `id_`.

    The first passage (number 0, the head) has the same in all versions of the document, the others have others in each
    version (`digest`). So the passages of a new version can be stored beside those of the old one. The head, stored
    last, makes all of them the document at once: a passage counts only if it has the digest of its head.
    """
    head = uuid.uuid5(NAMESPACE, id_)
    return str(uuid.uuid5(head, f"{digest} {number}") if number else head)


def tail_ids(payload: Mapping[str, Any]) -> list[str]:
    """`point_id` of all passages but the first, from the payload of the first with `HEAD_KEYS`."""
    reserved = payload[RESERVED]
    of = reserved.get(PASSAGE, {}).get("of", 1)
    return [point_id(reserved[ID], reserved[DIGEST], number) for number in range(1, of)]


def point_ids(ids: Iterable[str]) -> list[str]:
    """`point_id` of each.

    Raises:
        TypeError: `ids` is a single string, or one of them is no string.
    """
    return [point_id(id_) for id_ in strings(ids, "id")]


def stored_points(
    points: Sequence[Point], feature_bytes: int, bm25_encoder: Bm25Encoder | None = None
) -> list[StoredPoint]:
    """Points that `check_points` accepts, as the engines take them; with sparse vectors, if there is an encoder.

    Raises:
        DataError: a payload or id that cannot be stored; names the document and the reason.
    """
    encoded = _encode_features(points, feature_bytes)
    stored = [_stored(point, features) for point, features in zip(points, encoded, strict=True)]
    return stored if bm25_encoder is None else with_sparse(stored, bm25_encoder)


def check_kept(points: Iterable[Point], kept: Mapping[str, KeptVector], where: str) -> None:
    """Raise `MismatchError` unless the collection `where` keeps the vectors of these points."""
    for point in points:
        for name, vector in point.vectors.items():
            if name not in kept:
                raise MismatchError(
                    f"{where} keeps no vectors {name!r}, and document {point.id!r} has one: name them in its options "
                    "(kept) when it is made"
                )
            if len(vector) != kept[name].size:
                raise MismatchError(
                    f"{where} keeps vectors {name!r} of size {kept[name].size}, that of document {point.id!r} has size "
                    f"{len(vector)}"
                )


def check_stored(points: Sequence[StoredPoint]) -> None:
    """Raise `DataError` unless every engine accepts these points. An earlier version may have stored others."""
    for point in points:
        try:
            storable({key: value for key, value in point.payload.items() if key != RESERVED})
        except ValueError as error:
            raise DataError(f"document {point.payload[RESERVED][ID]!r}: {error}") from error


def headless(results: Iterable[SearchResult]) -> list[str]:
    """The ids of the documents of which a result has a passage, and not the first one."""
    found = set[str]()
    for result in results:
        if tails := {values[ID] for values in _split(result) if _number(values)}:
            found |= tails - {values[ID] for values in _split(result) if not _number(values)}
    return sorted(found)


def current(results: Sequence[SearchResult], heads: Mapping[str, str]) -> tuple[list[SearchResult], bool]:
    """The passages in each result that are of the current version of their document, and whether each document of each
    result has one. If not, one was replaced during the search, or a job that was killed left others. `heads` are the
    digests of the documents that are `headless`."""
    found, complete = list(results), True
    for row, result in enumerate(results):
        if _split(result):
            found[row] = result.rows(living(result.payloads, heads))
            complete = complete and len(set(_ids(found[row]))) == len(set(_ids(result)))
    return found, complete


def wider_searches(
    searches: Sequence[Search], results: Sequence[SearchResult], found: Sequence[SearchResult]
) -> dict[int, Search]:
    """The searches, by row, that `found` too few passages, since some of their `results` do not count: with twice the
    limit."""
    return {
        row: search._replace(limit=2 * search.limit)
        for row, search in enumerate(searches)
        if len(found[row].scores) < search.limit <= len(results[row].scores)
    }


def _split(result: SearchResult) -> list[dict[str, Any]]:
    """The reserved values of passages of documents that were split."""
    return [payload[RESERVED] for payload in result.payloads if PASSAGE in payload[RESERVED]]


def _ids(result: SearchResult) -> list[str]:
    return [payload[RESERVED][ID] for payload in result.payloads]


def living(payloads: Sequence[Mapping[str, Any]], heads: Mapping[str, str]) -> list[int]:
    """The rows of the passages that are of the current version of their document.

    The first passage is. The others must have the digest of the first one, which is among `payloads`, or in `heads`
    (`{id: digest}`).
    """
    reserved = [payload[RESERVED] for payload in payloads]
    digests = {**heads, **{values[ID]: values[DIGEST] for values in reserved if not _number(values)}}
    return [row for row, values in enumerate(reserved) if digests.get(values[ID]) == values[DIGEST]]


def _number(reserved: Mapping[str, Any]) -> int:
    return int(reserved[PASSAGE]["number"]) if PASSAGE in reserved else 0


def candidates_of(result: SearchResult, feature_bytes: int) -> Candidates:
    """The candidates in a search result. Removes the reserved key from its payloads, if they are whole."""
    bm25_scores = None if result.bm25_scores is None else np.array(result.bm25_scores, np.float32)
    scores = np.array(result.scores, np.float32)
    if result.features is not None:
        return Candidates(_ids(result), scores, result.features, result.payloads, bm25_scores)
    reserved = [_pop_reserved(payload) for payload in result.payloads]
    return Candidates(
        [values[ID] for values in reserved],
        scores,
        decoded_features(reserved, feature_bytes),
        result.payloads,
        bm25_scores,
        [
            _passage(values, payload) if PASSAGE in values else None
            for values, payload in zip(reserved, result.payloads, strict=True)
        ],
    )


def decoded_features(reserved: Sequence[Mapping[str, Any]], feature_bytes: int) -> Bytes:
    """The features [K, P] in the reserved values of K points."""
    packed = b64decode("".join([values[FEATURES] for values in reserved]))  # no padding within: see _encode_features
    features_KP = np.frombuffer(packed, np.uint8).reshape(len(reserved), _padded(feature_bytes))
    return features_KP[:, :feature_bytes]


def completed(candidates: Candidates, payloads: Iterable[dict[str, Any]]) -> Candidates | None:
    """Candidates that a search found without payloads, with their payloads and places; None if the document of one has
    another version now, or is gone. Removes the reserved key from `payloads`."""
    stored = {(values[ID], _number(values)): (values, payload) for payload in payloads
              if (values := _pop_reserved(payload))}  # fmt: skip
    found = list[dict[str, Any]]()
    passages = list[Passage | None]()
    for stub in candidates.payloads:
        wanted = stub[RESERVED]
        values, payload = stored.get((wanted[ID], _number(wanted)), ({DIGEST: None}, {}))
        if values[DIGEST] != wanted[DIGEST]:
            return None
        found.append(payload)
        passages.append(_passage(values, payload) if PASSAGE in values else None)
    return replace(candidates, payloads=found, passages=passages)


def _passage(reserved: Mapping[str, Any], payload: Mapping[str, Any]) -> Passage:
    return Passage(**reserved[PASSAGE], end=reserved[PASSAGE]["start"] + len(payload["text"]))


def _stored(point: Point, features: str) -> StoredPoint:
    payload = stored_payload(point)
    reserved: dict[str, Any] = {ID: point.id, DIGEST: point.digest, FEATURES: features}
    number = 0
    if (passage := point.passage) is not None:
        number = passage.number
        reserved[PASSAGE] = {name: value for name, value in asdict(passage).items() if name != "end"}
        reserved[TIME] = int(time.time())
    if integers := _integers(payload):
        reserved[INTEGERS] = integers
    if exact := {key: value for key, value in payload.items() if _has_long_float(value)}:
        reserved[EXACT] = json.dumps(exact)
    id_ = point_id(point.id, point.digest, number)
    kept = {name: [float(number) for number in vector] for name, vector in point.vectors.items()}
    return StoredPoint(id_, point.vector.tolist(), {**payload, RESERVED: reserved}, kept=kept)


def _has_long_float(value: Any) -> bool:
    """Whether `value` holds a float that the engine may change in its last bit.

    The engine keeps payloads as JSON. It reads numbers of more than 15 digits, or with an exponent, by a fast method
    that is not exact.
    """
    if isinstance(value, float):
        text = repr(value)
        return len(text) > 16 or "e" in text
    if isinstance(value, dict):
        return any(map(_has_long_float, value.values()))
    return isinstance(value, list) and any(map(_has_long_float, value))


def _pop_reserved(payload: dict[str, Any]) -> dict[str, Any]:
    """Remove the reserved key from a payload and return its value. Restore floats that the engine may have changed."""
    reserved: dict[str, Any] = payload.pop(RESERVED)
    if EXACT in reserved:
        payload.update(json.loads(reserved[EXACT]))
    return reserved


def _integers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The booleans and whole floats of each field, as integers, and those of the objects within. Filters match these
    copies; the payload is not changed.

    In Python, and so in `matches`, True == 1 == 1.0. In Qdrant they are three values, and the embedded engine cannot
    match booleans (qdrant-edge-py 0.9: MatchValue(True) asks for the integer 1).
    """
    copies: dict[str, Any] = {}
    for key, value in payload.items():
        if isinstance(value, dict):
            if within := _integers(value):
                copies[key] = within
            continue
        values = value if isinstance(value, list) else [value]
        integers = [int(v) for v in values if isinstance(v, bool) or (isinstance(v, float) and v.is_integer())]
        if integers := [integer for integer in integers if -(2**63) <= integer < 2**63]:
            copies[key] = integers
    return copies


def _encode_features(points: Sequence[Point], feature_bytes: int) -> list[str]:
    """Encode rows of a multiple of 3 bytes: base64 then needs no padding, and joined rows decode at once."""
    padding = bytes(_padded(feature_bytes) - feature_bytes)
    return [b64encode(point.features.tobytes() + padding).decode() for point in points]


def _padded(feature_bytes: int) -> int:
    return -(-feature_bytes // 3) * 3


def read_ids(payloads: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ids of the documents whose first passages these are; other passages are left out."""
    return [payload[RESERVED][ID] for payload in payloads if not _number(payload[RESERVED])]


def versions(payloads: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The digests by `point_id`."""
    reserved = [payload[RESERVED] for payload in payloads]
    return {point_id(values[ID], values[DIGEST], _number(values)): values[DIGEST] for values in reserved}


def is_head(point: StoredPoint) -> bool:
    """Whether a point is the first passage of its document."""
    return not _number(point.payload[RESERVED])


def read_digests(payloads: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Digests by document id."""
    return {payload[RESERVED][ID]: payload[RESERVED][DIGEST] for payload in payloads}


def own_payloads(payloads: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The payloads of documents by id, from those of all their passages. Removes the reserved key from `payloads`."""
    documents: dict[str, list[tuple[Passage | None, dict[str, Any]]]] = {}
    for payload in payloads:
        reserved = _pop_reserved(payload)
        passage = _passage(reserved, payload) if PASSAGE in reserved else None
        documents.setdefault(reserved[ID], []).append((passage, payload))
    return {id_: joined(parts) for id_, parts in documents.items()}
