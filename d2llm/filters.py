"""The filter language of searches: check a filter, and match payloads against it."""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from d2llm.errors import ArgumentError
from d2llm.index import Index
from d2llm.types import Filter, is_utf8


def matches(payload: Mapping[str, Any], filter: Filter) -> bool:
    """Return whether `payload` matches `filter`. Every index must give its filters this meaning."""
    return all(_field_matches(value_at(payload, key), condition) for key, condition in filter.items())


def value_at(payload: Mapping[str, Any], key: str) -> Any:
    """Return the value that the `key` of a filter names, or None if the payload has none there."""
    value: Any = payload
    for name in names_in(key):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def names_in(key: str) -> list[str]:
    """Return the names of the fields that lead to the value: one name, or those of a path such as `.metadata.source`.

    A key that begins with a dot is a path. In any other key a dot is part of the name.
    """
    return key[1:].split(".") if key.startswith(".") else [key]


EXISTS = "exists"
SAMPLE = 100
"""Documents that `why_nothing_passes` reads, which have most fields."""
MOST_KEYS = 4
"""Keys that `why_nothing_passes` counts."""


def why_nothing_passes(filter: Filter, index: Index) -> list[str]:
    """Say in a sentence each which keys of a filter no document of an index has, and which have values of another kind.

    Ask if nothing passes the filter. For each key that is in no document of a sample, the index looks through all of
    them, which takes as long as the search did. It does so for `MOST_KEYS` keys at most.
    """
    sample = list(index.get(islice(index.ids(), SAMPLE)).values())
    stored = {key: [value for payload in sample for value in _values(value_at(payload, key))] for key in filter}
    rare = [key for key, values in stored.items() if not values][:MOST_KEYS]
    unknown = [_unknown(key) for key in rare if not index.count({key: {EXISTS: True}})]
    others = (_other_kind(key, condition, stored[key]) for key, condition in filter.items())
    return unknown + [reason for reason in others if reason]


def _unknown(key: str) -> str:
    is_name = "." in key and not key.startswith(".")
    advice = f"for a field within a field, write .{key}" if is_name else "check its name"
    return f"no document has the field {reprlib.repr(key)} of the filter: {advice}"


def _other_kind(key: str, condition: Any, stored: Sequence[Any]) -> str | None:
    """Say that the `stored` values are of no kind that the condition asks for, if so."""
    if exists_in(condition) or not stored:
        return None
    asked = list(condition.values()) if isinstance(condition, Mapping) else _values(condition)
    if {_kind(value) for value in asked} & {_kind(value) for value in stored}:
        return None
    there, wanted = stored[0], asked[0]
    if isinstance(condition, Mapping):
        advice = "bounds are for numbers"
    else:
        advice = f"write it as {_json({key: str(wanted) if isinstance(there, str) else there})}"
    return (
        f"the field {reprlib.repr(key)} holds {_kind(there)}, such as {_json(there)}, and the filter asks for "
        f"{_kind(wanted)}, {_json(wanted)}: {advice}"
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _kind(value: Any) -> str:
    """The kind of a value, as filters compare them."""
    if isinstance(value, bool):
        return "true or false"
    return {str: "text", int: "numbers", float: "numbers"}.get(type(value), "objects")


def _values(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if item is not None]


def _field_matches(value: Any, condition: Any) -> bool:
    if exists_in(condition):
        return (value not in (None, [])) is condition[EXISTS]
    values = value if isinstance(value, list) else [value]
    if isinstance(condition, Mapping):
        tests = {"gt": np.greater, "gte": np.greater_equal, "lt": np.less, "lte": np.less_equal}
        return any(
            isinstance(item, int | float)
            and all(tests[name](float(item), float(bound)) for name, bound in condition.items())
            for item in values
        )
    accepted = condition if isinstance(condition, list) else [condition]
    return any(item is not None and item == match for item in values for match in accepted)


def exists_in(condition: Any) -> bool:
    """Whether a condition is about whether a field is there: `{"exists": true}`."""
    return isinstance(condition, Mapping) and condition.keys() == {EXISTS}


BOUNDS = {"gt", "gte", "lt", "lte"}


def check_filter(filter: Filter) -> None:
    """Check that `filter` is well formed. The engine checks filter objects of its own, which are not mappings.

    Raises:
        ArgumentError: a key is not a string, or a condition is malformed; shows the accepted forms.
    """
    if not isinstance(filter, Mapping):
        return
    for key, condition in filter.items():
        if not isinstance(key, str) or not is_utf8(key):
            raise ArgumentError(f"filter on {reprlib.repr(key)}: expected the name of a field, as a string")
        if exists_in(condition):
            ok = isinstance(condition[EXISTS], bool)
        elif isinstance(condition, Mapping):
            ok = bool(condition) and set(condition) <= BOUNDS and all(map(_is_bound, condition.values()))
        else:
            values = condition if isinstance(condition, list) else [condition]
            ok = bool(values) and all(map(_is_value, values))
        if not ok:
            raise ArgumentError(
                f"filter on {key!r}: {reprlib.repr(condition)} is neither a string, an integer of 64 bits, a boolean, "
                'a list of these, finite bounds such as {"gte": 2020, "lt": 2025}, nor {"exists": true}'
            )


def _is_bound(bound: Any) -> bool:
    return isinstance(bound, int | float) and abs(bound) <= sys.float_info.max


def _is_value(value: Any) -> bool:
    return is_utf8(value) if isinstance(value, str) else isinstance(value, int) and -(2**63) <= value < 2**63
