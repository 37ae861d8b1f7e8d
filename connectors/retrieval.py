"""Functions that the retrievers for other frameworks share. It imports no framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import d2llm
from d2llm.errors import ArgumentError
from d2llm.filters import check_filter
from d2llm.types import Hit, StrPath

from .qdrant import QdrantIndex

_BOUNDS = {">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}


def open_searcher(
    model: StrPath,
    collection: str,
    location: StrPath,
    model_options: Mapping[str, Any] | None = None,
    index_options: Mapping[str, Any] | None = None,
) -> d2llm.Searcher:
    """A searcher of the model folder `model` over the Qdrant collection `collection` at `location`, with further
    arguments of `d2llm.load` and of `QdrantIndex`.

    Raises:
        ArgumentError: a name, a location or an option that is not possible.
        ModelError: not a model folder, incomplete or changed.
        DeviceError: the device that was asked for is not available.
        MismatchError: another passage encoder made the collection.
        StoreError: there is no such collection, or it cannot be reached or is in use.
    """
    index = QdrantIndex(collection, location, **(index_options or {}))
    return d2llm.Searcher(d2llm.load(model, **(model_options or {})), index)


def split_hit(hit: Hit) -> tuple[str, dict[str, Any]]:
    """The text of `hit`, and its other fields with `recall_score` and `recall_rank`, which replace fields of these
    names. The best passage of a document that was split also has its place, `passage`."""
    fields = {**hit.payload, "recall_score": hit.recall_score, "recall_rank": hit.recall_rank}
    if hit.passage is not None:
        fields["passage"] = asdict(hit.passage)
    return fields.pop("text", ""), fields


def filter_of(conditions: Iterable[tuple[str, str, Any]]) -> dict[str, Any]:
    """A d2llm filter for conditions (field, operator, value) that must all hold.

    Raises:
        ArgumentError: another operator than `==`, `in`, `>`, `>=`, `<` and `<=`, a value that does not go with it, or
            two conditions on one field other than bounds of different kinds.
    """
    filter: dict[str, Any] = {}
    for field, operator, value in conditions:
        if operator in _BOUNDS:
            condition = {_BOUNDS[operator]: value}
        elif operator not in ("==", "in"):
            raise unsupported(operator)
        elif isinstance(value, list) != (operator == "in"):
            raise ArgumentError(f"filter on {field!r}: {operator!r} with {value!r}: 'in' takes a list, '==' one value")
        else:
            condition = value
        if field in filter:
            condition = _both(field, filter[field], condition)
        filter[field] = condition
    check_filter(filter)
    return filter


def unsupported(operator: object) -> ArgumentError:
    """The error for an operator that a d2llm filter cannot express."""
    return ArgumentError(
        f"filter operator {operator!r}: d2llm knows ==, in, >, >=, <, <= and AND. Several values of one field are "
        "'in'; for anything else filter what was retrieved, or give a Qdrant server its own qdrant_client.models.Filter"
    )


def _both(field: str, one: Any, other: Any) -> dict[str, Any]:
    if isinstance(one, dict) and isinstance(other, dict) and not one.keys() & other.keys():
        return one | other
    raise ArgumentError(f"filter on {field!r}: {one!r} and {other!r}: give one condition, or bounds of different kinds")
