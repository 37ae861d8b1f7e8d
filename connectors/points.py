"""How points, their features and filters are written in Qdrant. It is the same in both engines.

Features are base64 of float16 in the payload. With 100 candidates this takes a fifth of the time of a named vector,
which comes back as lists of Python floats. K candidates, H features, P = H rounded up to a multiple of 3.
"""

from __future__ import annotations

import json
import re
import uuid
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any

import numpy as np

from d2llm.errors import ArgumentError, DataError, import_extra
from d2llm.filters import check_filter
from d2llm.payload import storable, stored_payload
from d2llm.types import RESERVED, Candidates, Filter, Point, is_utf8, strings

from .engine import SearchResult, Sparse, StoredPoint
from .schema import PAYLOAD_TYPES, Bm25Options, PayloadType

NAMESPACE = uuid.UUID("6b1f6a52-5c0e-5d3c-9a55-0d2d1f3f7c11")
ID, DIGEST, FEATURES, INTEGERS, EXACT = "id", "digest", "features", "integers", "exact"


def point_id(id_: str) -> str:
    """The UUID under which Qdrant keeps the document `id_`."""
    return str(uuid.uuid5(NAMESPACE, id_))


def point_ids(ids: Iterable[str]) -> list[str]:
    """`point_id` of each.

    Raises:
        TypeError: `ids` is a single string, or one of them is no string.
    """
    return [point_id(id_) for id_ in strings(ids, "id")]


class Bm25Encoder:
    """Makes sparse vectors of texts, by the engine's own BM25.

    Raises:
        ArgumentError: an unknown language, or numbers out of range.
    """

    def __init__(self, options: Bm25Options) -> None:
        edge = import_extra("qdrant_edge", "qdrant")
        try:
            config = edge.Bm25Config(language=options.language, k=options.k, b=options.b, avg_len=options.average_words)
            self._bm25 = edge.Bm25(config)
        except ValueError as error:
            raise ArgumentError(f"words for hybrid recall: {error}") from error

    def document(self, payload: Mapping[str, Any]) -> Sparse:
        """The saturated counts of the words in title and text."""
        vector = self._bm25.embed_document(f"{payload.get('title', '')} {payload.get('text', '')}")
        return Sparse(vector.indices, vector.values)

    def query(self, text: str) -> Sparse:
        """The words of a query, each once. A query of stop words alone has none."""
        vector = self._bm25.embed_query(text)
        return Sparse(vector.indices, vector.values)


def stored_points(
    points: Sequence[Point], feature_dim: int, bm25_encoder: Bm25Encoder | None = None
) -> list[StoredPoint]:
    """Points that `check_points` accepts, as the engines take them; with sparse vectors, if there is an encoder.

    Raises:
        DataError: a payload or id that cannot be stored; names the document and the reason.
        ArgumentError: features beyond the range of float16.
    """
    encoded = _encode_features(points, feature_dim)
    stored = [_stored(point, features) for point, features in zip(points, encoded, strict=True)]
    return stored if bm25_encoder is None else with_sparse(stored, bm25_encoder)


def check_stored(points: Sequence[StoredPoint]) -> None:
    """Raise `DataError` unless every engine accepts these points. An earlier version may have stored others."""
    for point in points:
        try:
            storable({key: value for key, value in point.payload.items() if key != RESERVED})
        except ValueError as error:
            raise DataError(f"document {point.payload[RESERVED][ID]!r}: {error}") from error


def with_sparse(points: Sequence[StoredPoint], encoder: Bm25Encoder) -> list[StoredPoint]:
    """The same points with the sparse vectors of their texts."""
    return [point._replace(sparse=encoder.document(point.payload)) for point in points]


def candidates_of(result: SearchResult, feature_dim: int) -> Candidates:
    """The candidates in a search result. Removes the reserved key from its payloads."""
    reserved = [_pop_reserved(payload) for payload in result.payloads]
    packed = b64decode("".join([values[FEATURES] for values in reserved]))  # no padding within: see _encode_features
    features_KP = np.frombuffer(packed, np.float16).reshape(len(reserved), _padded(feature_dim))
    return Candidates(
        [values[ID] for values in reserved],
        np.array(result.scores, np.float32),
        features_KP[:, :feature_dim].astype(np.float32),
        result.payloads,
        None if result.bm25_scores is None else np.array(result.bm25_scores, np.float32),
    )


def indexed_paths(fields: Mapping[str, PayloadType]) -> dict[str, PayloadType]:
    """The paths that an engine must index, so that filters on `fields` are fast, and allowed in strict mode.

    Raises:
        ArgumentError: an unknown type, or a field name that Qdrant cannot address.
    """
    paths: dict[str, PayloadType] = {}
    for key, kind in fields.items():
        if kind not in PAYLOAD_TYPES:
            raise ArgumentError(
                f"payload index on {key!r}: unknown type {kind!r}: choose one of {', '.join(PAYLOAD_TYPES)}"
            )
        path = path_of(key)
        paths[path] = "integer" if kind == "bool" else kind  # filters ask for booleans as integers: see _integers
        if kind != "keyword":
            paths[f"{RESERVED}.{INTEGERS}.{path}"] = "integer"
    return paths


INDEXED: dict[PayloadType, type | UnionType] = {"keyword": str, "integer": int, "float": int | float, "bool": bool}
"""The values that a payload index of each type holds. Filters do not find other values in its field."""


def is_indexed(value: Any, kind: PayloadType) -> bool:
    """Whether a payload index of the type `kind` holds the `value` of a field, or a value in its list."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(each, INDEXED[kind]) and isinstance(each, bool) == (kind == "bool") for each in values)


def compile_filter(filter: Filter, models: Any) -> Any:
    """`filter` in the classes of `models`, with the meaning of `d2llm.filters.matches`; None if it is empty.

    Raises:
        ArgumentError: a filter of another form, or a field name that Qdrant cannot address.
    """
    check_filter(filter)
    return models.Filter(must=[_condition(*item, models) for item in filter.items()]) if filter else None


def _condition(key: str, condition: Any, models: Any) -> Any:
    path = path_of(key)
    copy = f"{RESERVED}.{INTEGERS}.{path}"
    if isinstance(condition, Mapping):
        make_range = models.RangeFloat if hasattr(models, "RangeFloat") else models.Range
        bounds = make_range(**{name: float(bound) for name, bound in condition.items()})
        return models.Filter(should=[models.FieldCondition(key=field, range=bounds) for field in (path, copy)])
    values = condition if isinstance(condition, list) else [condition]
    texts = [value for value in values if isinstance(value, str)]
    integers = [int(value) for value in values if not isinstance(value, str)]
    wanted = [(path, texts)] * bool(texts) + [(path, integers), (copy, integers)] * bool(integers)
    return models.Filter(
        should=[models.FieldCondition(key=field, match=models.MatchAny(any=any_of)) for field, any_of in wanted]
    )


def path_of(key: str) -> str:
    """The path of the field `key` in Qdrant. It is quoted, so that a dot does not mean a field within a field. Qdrant
    knows no escapes within quotes.

    Raises:
        ArgumentError: a name that it cannot address.
    """
    if re.fullmatch(r"[A-Za-z0-9_-]+", key):
        return key
    if '"' in key or "\\" in key or not is_utf8(key):
        raise ArgumentError(
            f'field {key!r}: Qdrant cannot filter on a field with a " or a \\ in its name, nor index it: store its '
            "values under another name"
        )
    return f'"{key}"'


def _stored(point: Point, features: str) -> StoredPoint:
    payload = stored_payload(point)
    reserved: dict[str, Any] = {ID: point.id, DIGEST: point.digest, FEATURES: features}
    if integers := _integers(payload):
        reserved[INTEGERS] = integers
    if exact := {key: value for key, value in payload.items() if _has_long_float(value)}:
        reserved[EXACT] = json.dumps(exact)
    return StoredPoint(point_id(point.id), point.vector.tolist(), {**payload, RESERVED: reserved})


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


def _integers(payload: Mapping[str, Any]) -> dict[str, list[int]]:
    """Copies of booleans and whole floats as integers, for filters. The caller's own values come back unchanged.

    In Python, and so in `matches`, True == 1 == 1.0. In Qdrant they are three values, and the embedded engine cannot
    match booleans (qdrant-edge-py 0.9: MatchValue(True) asks for the integer 1).
    """
    copies = {}
    for key, value in payload.items():
        values = value if isinstance(value, list) else [value]
        integers = [int(v) for v in values if isinstance(v, bool) or (isinstance(v, float) and v.is_integer())]
        if integers := [integer for integer in integers if -(2**63) <= integer < 2**63]:
            copies[key] = integers
    return copies


def _encode_features(points: Sequence[Point], feature_dim: int) -> list[str]:
    """Encode rows of P numbers, a multiple of 6 bytes: base64 then needs no padding, and joined rows decode at once."""
    padded = np.zeros((len(points), _padded(feature_dim)), np.float16)
    for row, point in enumerate(points):
        with np.errstate(over="ignore"):
            padded[row, :feature_dim] = point.features
    if not np.isfinite(padded).all():
        raise ArgumentError(f"features beyond {np.finfo(np.float16).max}: they are stored as float16")
    return [b64encode(row.tobytes()).decode() for row in padded]


def _padded(feature_dim: int) -> int:
    return -(-feature_dim // 3) * 3


def read_ids(payloads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Document ids."""
    return [payload[RESERVED][ID] for payload in payloads]


def read_digests(payloads: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Digests by document id."""
    return {payload[RESERVED][ID]: payload[RESERVED][DIGEST] for payload in payloads}


def own_payloads(payloads: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The payloads by document id. Removes the reserved key from `payloads`."""
    return {_pop_reserved(payload)[ID]: payload for payload in payloads}
