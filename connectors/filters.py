"""Filters and payload indexes in Qdrant's terms. They are the same in both engines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any

from d2llm.errors import ArgumentError
from d2llm.filters import EXISTS, check_filter, exists_in, names_in
from d2llm.types import RESERVED, Filter, is_utf8

from .points import INTEGERS, NUMBER_PATH
from .schema import PAYLOAD_TYPES, PayloadType


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


def of_documents(filter: Any, models: Any) -> Any:
    """The condition `filter` of the engine (None: all points), for the first passage of each document alone."""
    others = models.FieldCondition(key=NUMBER_PATH, range=_range(models)(gte=1.0))
    return models.Filter(must=None if filter is None else [filter], must_not=[others])


def of_points(ids: Iterable[str], models: Any) -> Any:
    """The condition that a point has one of these ids."""
    embedded = hasattr(models, "RangeFloat")
    condition = models.HasIdCondition(set(ids)) if embedded else models.HasIdCondition(has_id=list(ids))
    return models.Filter(must=[condition])


def _range(models: Any) -> Any:
    return models.RangeFloat if hasattr(models, "RangeFloat") else models.Range


def _condition(key: str, condition: Any, models: Any) -> Any:
    path = path_of(key)
    copy = f"{RESERVED}.{INTEGERS}.{path}"
    if exists_in(condition):
        empty = [_is_empty(path, models)]
        return models.Filter(must_not=empty) if condition[EXISTS] else models.Filter(must=empty)
    if isinstance(condition, Mapping):
        bounds = _range(models)(**{name: float(bound) for name, bound in condition.items()})
        return models.Filter(should=[models.FieldCondition(key=field, range=bounds) for field in (path, copy)])
    values = condition if isinstance(condition, list) else [condition]
    texts = [value for value in values if isinstance(value, str)]
    integers = [int(value) for value in values if not isinstance(value, str)]
    wanted = [(path, texts)] * bool(texts) + [(path, integers), (copy, integers)] * bool(integers)
    return models.Filter(
        should=[models.FieldCondition(key=field, match=models.MatchAny(any=any_of)) for field, any_of in wanted]
    )


def _is_empty(path: str, models: Any) -> Any:
    if hasattr(models, "RangeFloat"):
        return models.IsEmptyCondition(path)
    return models.IsEmptyCondition(is_empty=models.PayloadField(key=path))


def path_of(key: str) -> str:
    """The path of the field `key` in Qdrant. Names are quoted, so that a dot in a name does not mean a field within a
    field. Qdrant knows no escapes within quotes.

    Raises:
        ArgumentError: a name that it cannot address.
    """
    return ".".join(_quoted(name, key) for name in names_in(key))


def _quoted(name: str, key: str) -> str:
    if re.fullmatch(PLAIN, name):
        return name
    if '"' in name or "\\" in name or not is_utf8(name):
        raise ArgumentError(
            f'field {key!r}: Qdrant cannot filter on a field with a " or a \\ in its name, nor index it: store its '
            "values under another name"
        )
    return f'"{name}"'


def key_of(path: str) -> str | None:
    """The key that `path_of` makes this path of; None for a path that no key has, such as one through a list."""
    names = [name.strip('"') for name in re.findall(rf'{PLAIN}|"[^"]*"', path)]
    key = names[0] if len(names) == 1 else "." + ".".join(names)
    return key if "\\" not in key and path_of(key) == path else None


PLAIN = "[A-Za-z0-9_-]+"
"""Names that Qdrant takes without quotes."""
