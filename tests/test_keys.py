"""What `--keys` prints: every key, with type, default and meaning, as the dataclasses have them."""

import json
import re
import tomllib
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from d2llm.cli import main
from d2llm.settings import build
from d2llm.train import Alignment, read_recipe
from d2llm.train.cli_keys import Key, recipe_tables, tables_of


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def uncommented(toml: str) -> str:
    """`toml` with every key set to the default that its comment shows."""
    return re.sub(r"^# (\w+ = )(?!\.\.\.)", r"\1", toml, flags=re.MULTILINE)


def test_the_keys_of_a_recipe_are_a_recipe_at_its_defaults(tmp_path: Path) -> None:
    path, bare = tmp_path / "keys.toml", tmp_path / "bare.toml"
    bare.write_text("", encoding="utf-8")
    required = {"student.backbone": "some/backbone", "data.folder": "data"}
    for text in (shown("train", "--keys"), uncommented(shown("train", "--keys"))):
        path.write_text(text, encoding="utf-8")
        assert read_recipe(path, required) == read_recipe(bare, required)
    assert len(tomllib.loads(path.read_text())["distil"]) > 5, "the second text sets them"


def test_a_recipe_of_all_keys_leaves_them_to_its_preset(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(shown("train", "--keys"), encoding="utf-8")
    chosen = {"student.backbone": "some/backbone", "data.folder": "data", "preset": "paper", "teacher.model": "llm"}
    recipe = read_recipe(path, chosen)
    assert recipe.student.start == "paper" and recipe.loss.listwise_imitation == 0 and recipe.student.lexical_slots == 0


def test_the_keys_of_kale_are_an_alignment_at_its_defaults() -> None:
    values = tomllib.loads(uncommented(shown("kale", "--keys")))
    assert len(values) > 10 and build(Alignment, values) == Alignment()


def flat(recipe: dict[str, Any]) -> set[str]:
    """Keys as `--set` takes them."""
    tables = {key: value for key, value in recipe.items() if isinstance(value, dict)}
    return (recipe.keys() - tables.keys()) | {f"{name}.{key}" for name, table in tables.items() for key in table}


@pytest.mark.parametrize("arguments", [("train", "--keys", "--json"), ("train", "--json", "--keys")])
def test_programs_get_every_key_with_what_is_known_of_it(arguments: tuple[str, ...]) -> None:
    rows = {row["name"]: row for row in json.loads(shown(*arguments))}
    assert rows.keys() == {"preset"} | flat(asdict(read_recipe("minilm")))
    assert rows["distil.mining"] == {
        "name": "distil.mining",
        "type": "one of 'student', 'given'",
        "choices": ["student", "given"],
        "required": False,
        "default": "student",
        "meaning": rows["distil.mining"]["meaning"],
    }
    assert rows["recall.steps"]["type"] == "a whole number of at least 0" and rows["recall.steps"]["default"] == 100
    assert rows["student.backbone"]["required"] and rows["student.backbone"]["default"] is None
    assert not rows["data.folder"]["required"] and rows["data.folder"]["default"] is None
    assert rows["preset"]["choices"] == ["d2llm", "paper", "official"]


@pytest.mark.parametrize("tables", [recipe_tables(), tables_of(Alignment)], ids=["recipe", "kale"])
def test_every_key_and_table_has_a_meaning_of_its_own(tables: list[Any]) -> None:
    keys: list[Key] = [key for table in tables for key in table.keys]
    assert len(keys) > 20
    assert [key.name for key in keys if not (key.meaning.endswith(".") and len(key.meaning.split()) > 1)] == []
    assert [table.name for table in tables if not table.meaning] == []


def test_defaults_are_those_of_the_dataclass() -> None:
    (table,) = tables_of(Alignment)
    assert [(key.name, key.default) for key in table.keys] == [(f.name, f.default) for f in fields(Alignment)]
    student = next(table for table in recipe_tables() if table.name == "student")
    config = type(read_recipe("minilm").student)
    assert [key.required for key in student.keys] == [field.default is MISSING for field in fields(config)]
