"""Check the fields of settings dataclasses: their types, choices and ranges.

Dataclasses do not check these. A misspelt choice, a number in quotes or a zero would otherwise cause an error hours
later, or none at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from d2llm.errors import ArgumentError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Range:
    """The range of a number, as an annotation of a field's type. No range contains NaN or an infinity."""

    least: float
    most: float = math.inf
    exclusive: bool = False
    """Whether the range excludes its bounds."""

    def __contains__(self, value: float) -> bool:
        if self.exclusive:
            return self.least < value < self.most
        return self.least <= value <= self.most and value != math.inf

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"above {self.least}" if self.exclusive else f"of at least {self.least}"
        return (
            f"above {self.least} and below {self.most}" if self.exclusive else f"between {self.least} and {self.most}"
        )


LARGEST = 2**31 - 1
Count: TypeAlias = Annotated[int, Range(1, LARGEST)]
Whole: TypeAlias = Annotated[int, Range(0, LARGEST)]
Positive: TypeAlias = Annotated[float, Range(0, exclusive=True)]
Weight: TypeAlias = Annotated[float, Range(0)]
Share: TypeAlias = Annotated[float, Range(0, 1)]
Seed: TypeAlias = Annotated[int, Range(0, 2**32 - 1)]

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "nothing"}


def build(kind: type[T], values: Any, prefix: str = "") -> T:
    """Make the dataclass `kind` from `values`, a mapping from JSON or TOML. Lists become tuples for fields with a tuple
    type.

    Raises:
        ArgumentError: as `check`.
    """
    check(values, kind, prefix)
    hints = get_type_hints(kind)
    return kind(**{key: tuple(v) if get_origin(hints[key]) is tuple else v for key, v in values.items()})


def check(values: Any, kind: type, prefix: str = "") -> None:
    """Check that `values` is a mapping that fits the dataclass `kind`: its keys, their types and ranges.

    Raises:
        ArgumentError: an unknown or missing key, a value of the wrong type or out of range; names the key with `prefix`
            before it, and the value.
    """
    if not isinstance(values, Mapping):
        raise ArgumentError(f"{prefix.rstrip('.') or 'settings'}: expected a table, found {values!r}")
    hints = get_type_hints(kind, include_extras=True)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ArgumentError(f"unknown key {prefix}{unknown[0]}: known are {', '.join(sorted(hints))}")
    required = (entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING)
    missing = next((name for name in required if name not in values), None)
    if missing is not None:
        raise ArgumentError(f"missing key {prefix}{missing}")
    for key, value in values.items():
        if not _fits(value, hints[key]):
            raise ArgumentError(f"{prefix}{key}: expected {describe(hints[key])}, found {value!r}")


def check_fields(settings: Any) -> None:
    """Check types, choices and ranges of the fields of a dataclass instance. Call it in `__post_init__`.

    Raises:
        ArgumentError: a value does not fit; names the field.
    """
    check({entry.name: getattr(settings, entry.name) for entry in fields(settings)}, type(settings))


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _fits(value, inner[0]) and value in inner[1]
    if kind is Literal:
        return value in inner
    if kind in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if inner:  # a union
        return any(_fits(value, choice) for choice in inner)
    if isinstance(value, bool):  # a bool is an int in Python
        return hint in (bool, Any)
    if hint is float and isinstance(value, int):
        return -(2**63) <= value < 2**63
    return hint is Any or isinstance(value, hint)


def describe(hint: Any) -> str:
    """What a value of a type may be, in words: "a whole number between 0 and 9"."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return f"{describe(inner[0])} {inner[1]}"
    if kind is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if kind in (list, tuple):
        return f"a list, each item {describe(inner[0])}"
    if kind is dict:
        return "a table" if inner[1] is Any else f"a table, each value {describe(inner[1])}"
    if inner:
        return " or ".join(map(describe, inner))
    return _NAMES.get(hint, "a table")
