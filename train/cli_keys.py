"""The keys of a recipe, or of other settings, with type, default and meaning: what `--keys` prints.

The source of the dataclasses is the one place where a key is explained. A wheel holds it too, so it is read from there.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from d2llm.settings import LARGEST, describe

from .config import Recipe
from .presets import PRESETS

RECIPE_HEADING = """All keys of a recipe, with their defaults. Remove the # before a key that you change, or set it on
the command line: --set recall.steps=1000. A key that the recipe sets wins over its preset."""
KALE_HEADING = """All keys of d2llm kale, with their defaults. Set them on the command line: --set steps=3000"""
ADAPT_HEADING = """All keys of d2llm adapt, with their defaults. Set them on the command line: --set steps=300"""
PRESET = """What the keys that you do not write start from. `d2llm`: the defaults below. `paper`: the paper's student,
losses and way of training. `official`: the same with the losses that the authors' code computes."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table."""

    name: str
    type: str
    choices: tuple[Any, ...]
    """All values that it may have; empty where there are too many to list."""
    required: bool
    default: Any
    """None where the key is required, or stays unset."""
    meaning: str


@dataclass(frozen=True, slots=True)
class Table:
    """The keys of one dataclass, in its order. The name is empty for keys at the top level."""

    name: str
    meaning: str
    keys: list[Key]


def recipe_tables() -> list[Table]:
    """The tables of a recipe, the top level first."""
    top, *tables = tables_of(Recipe)
    preset = Key("preset", describe(str), tuple(PRESETS), False, "d2llm", " ".join(PRESET.split()))
    return [Table(top.name, top.meaning, [preset, *top.keys]), *tables]


def tables_of(kind: type, name: str = "") -> list[Table]:
    """The table of a dataclass, then those of its fields that are dataclasses."""
    hints, meanings = get_type_hints(kind, include_extras=True), _field_docstrings(kind)
    keys, tables = list[Key](), list[Table]()
    for entry in fields(kind):
        hint = hints[entry.name]
        if isinstance(hint, type) and is_dataclass(hint):
            tables += tables_of(hint, entry.name)
            continue
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        required = entry.default is MISSING
        default = None if required else entry.default
        keys.append(Key(entry.name, _type(hint), choices, required, default, meanings.get(entry.name, "")))
    meaning = re.split(r"\n\n(?:Raises|Example):", inspect.getdoc(kind) or "")[0]  # the rest is for Python
    return [Table(name, meaning, keys), *tables]


def _field_docstrings(kind: type) -> dict[str, str]:
    """The strings that stand below the fields of a class, `{field: text in one line}`."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    docstrings = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docstrings[name] = " ".join(text.split())
    return docstrings


def _type(hint: Any) -> str:
    """The type in words, without the bound that every whole number has and without None, which TOML cannot write."""
    return re.sub(rf"between (\d+) and {LARGEST}", r"of at least \1", describe(hint)).removesuffix(" or nothing")


def as_rows(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """One mapping a key, for JSON; the key is named as `--set` takes it."""
    return [
        {**asdict(key), "name": f"{table.name}.{key.name}" if table.name else key.name}
        for table in tables
        for key in table.keys
    ]


def as_toml(tables: Sequence[Table], heading: str) -> str:
    """TOML that names every key with its default and its meaning. All keys are commented out, because a key that a
    recipe sets wins over its preset."""
    return "\n".join([*_comment(heading), *(line for table in tables for line in _lines(table))])


def _lines(table: Table) -> Iterator[str]:
    if table.name:
        yield from ["", f"[{table.name}]", *_comment(table.meaning)]
    for key in table.keys:
        yield from ["", *_comment(key.meaning)]
        yield f"# Type: {' or '.join(map(_value, key.choices)) if key.choices else key.type}"
        unset = "required" if key.required else "not set"
        yield f"# {key.name} = " + (f"...  ({unset})" if key.default is None else _value(key.default))


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 98, break_on_hyphens=False)]


def _value(value: Any) -> str:
    """A value as TOML writes it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
