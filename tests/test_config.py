"""Recipes: how they are read, what the message says when a key is wrong, and the keys of the last release."""

import doctest
import importlib
import warnings
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from d2llm.deprecated import RenamedWarning
from d2llm.errors import ArgumentError, DataError
from d2llm.settings import Range
from d2llm.student import StudentConfig
from d2llm.train import Recipe, read_recipe
from d2llm.train.config import (
    OLD_KEYS,
    DataConfig,
    DistilConfig,
    LearningRates,
    LossConfig,
    RecallConfig,
    TeacherConfig,
)
from d2llm.train.kale import Alignment

RECIPE = """
recall.steps = 7
[student]
backbone = "some/backbone"
tuning = "full"
[data]
folder = "data"
[teacher]
members = ["cosine", "bm25"]
"""


def recipe(tmp_path: Path, content: str = RECIPE) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(content, encoding="utf-8")
    return path


def test_a_recipe_is_read_over_its_defaults(tmp_path: Path) -> None:
    found = read_recipe(recipe(tmp_path))
    assert (found.student.backbone, found.student.tuning, found.data.folder) == ("some/backbone", "full", "data")
    assert found.teacher.members == ("cosine", "bm25")
    assert found.recall.steps == 7
    assert (found.loss, found.seed) == (LossConfig(), 0)


def test_overrides_win_and_keep_their_types(tmp_path: Path) -> None:
    overrides = {
        "student.backbone": "my/model",
        "student.iem_inputs": "sum",
        "student.embedding_dim": "64",
        "student.document_prompt": '"passage: "',
        "teacher.members": '["bm25"]',
        "loss.recall": "2",
        "recall.steps": "10",
        "lr.iem": "1e-3",
    }
    found = read_recipe(recipe(tmp_path), overrides)
    student = found.student
    assert (student.backbone, student.iem_inputs, student.embedding_dim) == ("my/model", "sum", 64)
    assert student.document_prompt == "passage: "
    assert found.teacher.members == ("bm25",)
    assert (found.loss.recall, found.recall.steps, found.lr.iem) == (2, 10, 1e-3)
    assert student.tuning == "full", "what is not overridden stays"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("recall.steps = ", "not valid TOML"),
        (RECIPE.replace('backbone = "some/backbone"\n', ""), r"missing key student\.backbone"),
        (RECIPE.replace("[data]\n", "").replace('folder = "data"\n', ""), r"set data\.folder \(retrieval\)"),
        (RECIPE.replace('folder = "data"', 'pairs = ["a.jsonl"]'), r"data\.pairs without .*data\.dev_pairs"),
        ("stepz = 1\n" + RECIPE, "unknown key stepz: known are .*recall"),
        (RECIPE.replace("tuning", "tunning"), "unknown key student.tunning: known are .*tuning"),
        (RECIPE.replace('"full"', '"lorra"'), r"student\.tuning: expected one of 'frozen', .*found 'lorra'"),
        (RECIPE.replace("= 7", '= "7"'), r"recall\.steps: expected a whole number .*, found '7'"),
        (RECIPE.replace("= 7", "= 7.5"), r"recall\.steps: expected a whole number .*, found 7\.5"),
        (RECIPE.replace("= 7", "= true"), r"recall\.steps: expected a whole number .*, found True"),
        (RECIPE.replace('"cosine"', "3"), r"teacher\.members: expected a list, each item a text, found \[3, 'bm25'\]"),
        (RECIPE.replace('"cosine", "bm25"', ""), r"teacher\.members is empty: choose from cosine"),
        (RECIPE.replace('"cosine"', '"oracle"'), r"teacher\.members: \['oracle'\] unknown: choose from cosine"),
        ("student = 3\n[data]\nfolder = 'x'", "student: expected a table, found 3"),
        ("preset = []\n" + RECIPE, r"preset: \[\] unknown, choose from d2llm"),
        ("preset = 'papper'\n" + RECIPE, r"preset: 'papper' unknown, choose from d2llm, paper, official"),
        ("loss = 3\n" + RECIPE, "loss: expected a table, found 3"),
        ("distil.held_apart = 1.5\n" + RECIPE, r"distil\.held_apart: expected a number between 0 and 1, found 1.5"),
        (RECIPE.replace('"full"', '"frozen"'), r"recall\.steps = 7 trains .*student.tuning = 'frozen' forbids"),
    ],
)  # fmt: skip
def test_a_bad_recipe_names_the_key(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"recipe\.toml: .*{message}"):
        read_recipe(recipe(tmp_path, content))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("student.bakbone", "x", "unknown key student.bakbone"),
        ("nothing.there", "1", "unknown key nothing"),
        ("recall.steps", "many", r"recall\.steps: expected a whole number between 0 and 2147483647, found 'many'"),
        ("recall.steps.warmup", "1", "recall.steps.warmup: steps is a value, not a table"),
        ("student.backbone.name.first", "1", "student.backbone.name.first: backbone is a value, not a table"),
    ],
)
def test_a_bad_override_names_the_key(key: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"recipe\.toml: {message}"):
        read_recipe(recipe(tmp_path), {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, value) for key in ("recall.batch", "distil.batch", "distil.eval_every", "save_every",
                                   "distil.candidates", "distil.negatives", "data.dev_queries", "teacher.batch_tokens",
                                   "student.document_max_length", "student.lora_rank", "student.feature_bytes")
          for value in ("0", "-1", str(10**20))],
        *[(key, value) for key in ("recall.steps", "data.negatives", "teacher.calibration_queries", "seed")
          for value in ("-1", str(10**20))],
        *[(key, value) for key in ("lr.backbone", "lr.iem", "lr.scale", "loss.temperature")
          for value in ("0", "-0.1", "nan", "inf", "1" + "0" * 400)],
        *[(key, value) for key in ("loss.recall", "loss.pairs", "distil.held_apart", "student.lora_dropout")
          for value in ("-0.1", "nan", "inf")],
        ("distil.held_apart", "1.01"),
        ("data.pairs_batch", "1"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_named_with_the_range(key: str, value: str, tmp_path: Path) -> None:
    bounds = r"(between \d+ and \d+|of at least 0|above 0)"
    with pytest.raises(DataError, match=rf"recipe\.toml: {key}: expected a (whole )?number {bounds}, found {value}$"):
        read_recipe(recipe(tmp_path), {key: value})


def test_every_number_that_can_be_set_has_a_range() -> None:
    def unbounded(hint: Any) -> bool:
        if get_origin(hint) is Annotated:
            return not any(isinstance(part, Range) for part in get_args(hint))
        return hint in (int, float) or any(map(unbounded, get_args(hint)))

    kinds = (Recipe, *(hint for hint in get_type_hints(Recipe).values() if is_dataclass(hint)), Alignment)
    hints = {(kind, key): hint for kind in kinds for key, hint in get_type_hints(kind, include_extras=True).items()}
    assert len(hints) > 80
    assert [place for place, hint in hints.items() if unbounded(hint)] == []


def test_settings_made_in_python_are_checked_as_those_of_a_file() -> None:
    with pytest.raises(ArgumentError, match=r"eval_every: expected a whole number between 1 and .*, found 0"):
        DistilConfig(eval_every=0)
    with pytest.raises(ArgumentError, match=r"embedding_dim: expected a whole number .* or nothing, found -3"):
        StudentConfig(backbone="b", embedding_dim=-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"distil.candidates": "6"}, "distil.negatives = 7 are drawn from distil.candidates = 6"),
        ({"distil.mining": "given", "data.negatives": "6"}, "distil.negatives = 7 are drawn from data.negatives = 6"),
    ],
)
def test_more_negatives_than_are_mined_are_refused(overrides: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"recipe\.toml: {message}: lower it, or raise"):
        read_recipe(recipe(tmp_path), overrides)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.toml: no such file"):
        read_recipe(tmp_path / "none.toml")


def test_every_recipe_that_is_shipped_can_be_read() -> None:
    root = Path(__file__).parents[1]
    recipes = [*(root / "train" / "recipes").glob("*.toml"), *(root / "examples").glob("*.toml")]
    assert recipes
    for path in recipes:  # where the weights and the data lie is the user's to say
        assert read_recipe(path, {"student.backbone": "my/model", "data.folder": "my/data"})


# the keys of the last release

OLD_RECIPE = """
encoder_steps = 7
held_apart = 0.25
eval_every = 9
iem_lr = 3e-4
pairs_batch = 5
[student]
backbone = "some/backbone"
[data]
folder = "data"
"""


def test_keys_of_the_last_release_work_and_the_warning_names_the_new_key(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_recipe(recipe(tmp_path, OLD_RECIPE), {"distil_mining": "given"})
    assert (found.recall.steps, found.distil.held_apart, found.distil.eval_every) == (7, 0.25, 9)
    assert (found.lr.iem, found.data.pairs_batch, found.distil.mining) == (3e-4, 5, "given")
    assert {warning.category for warning in caught} == {RenamedWarning}
    assert {warning.filename for warning in caught} == {__file__}
    for old in ("encoder_steps", "held_apart", "eval_every", "iem_lr", "pairs_batch", "distil_mining"):
        assert sum(f"{old} is called {OLD_KEYS[old]} now" in str(warning.message) for warning in caught) == 1


def test_every_old_key_has_its_value_under_the_new_one(tmp_path: Path) -> None:
    plain = read_recipe(recipe(tmp_path))
    for old, new in OLD_KEYS.items():
        value = "'live'" if old == "distil_backbone" else "'given'" if old == "distil_mining" else "1"
        value = "12" if old in ("distil_candidates", "pairs_batch") else value
        with pytest.warns(RenamedWarning, match=f"{old} is called {new} now"):
            changed = read_recipe(recipe(tmp_path), {old: value})
        assert changed == read_recipe(recipe(tmp_path), {new: value}) != plain
        with pytest.warns(RenamedWarning, match=f"Recipe.{old} is called Recipe.{new} now"):
            assert str(getattr(changed, old)) == value.strip("'") or getattr(changed, old) == float(value)


@pytest.mark.parametrize(("old", "new"), [("false", "sum"), ("true", "comparison")])
def test_the_old_key_of_the_product_says_what_the_iem_reads(old: str, new: str, tmp_path: Path) -> None:
    for content, typed in (
        (RECIPE.replace("[student]", f"[student]\nproduct = {old}"), {}),
        (RECIPE, {"student.product": old}),
        ('preset = "paper"' + BARE, {"student.product": old}),
    ):
        with pytest.warns(RenamedWarning, match=r"student\.product is called student\.iem_inputs now"):
            assert read_recipe(recipe(tmp_path, content), typed).student.iem_inputs == new
    with pytest.raises(DataError, match=r"student\.product is the old name of student\.iem_inputs: give"):
        read_recipe(recipe(tmp_path), {"student.product": old, "student.iem_inputs": "sum"})
    with pytest.raises(DataError, match=r"unknown key student\.product: known are .*iem_inputs"):
        read_recipe(recipe(tmp_path), {"student.product": "3"})


def test_an_override_wins_whichever_of_its_names_it_has(tmp_path: Path) -> None:
    with pytest.warns(RenamedWarning):
        assert read_recipe(recipe(tmp_path), {"encoder_steps": "10"}).recall.steps == 10
        assert read_recipe(recipe(tmp_path, OLD_RECIPE), {"recall.steps": "10"}).recall.steps == 10


@pytest.mark.parametrize(
    ("content", "overrides"),
    [("encoder_steps = 1\n" + RECIPE, {}), (RECIPE, {"encoder_steps": "1", "recall.steps": "1"})],
    ids=["file", "overrides"],
)
def test_an_old_key_beside_its_new_one_is_an_error(content: str, overrides: dict[str, str], tmp_path: Path) -> None:
    expected = r"recipe\.toml: encoder_steps is the old name of recall\.steps: give recall\.steps alone"
    with pytest.raises(DataError, match=expected):
        read_recipe(recipe(tmp_path, content), overrides)


def test_the_tables_are_those_of_the_shipped_recipes_and_none_has_an_old_key() -> None:
    root = Path(__file__).parents[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in [*(root / "train" / "recipes").glob("*.toml"), *(root / "examples").glob("*.toml")]:
            read_recipe(path, {"student.backbone": "my/model", "data.folder": "my/data"})


# presets

PAPER = StudentConfig(
    backbone="some/backbone", tuning="lora", lora_rank=8, lora_alpha=8, lora_dropout=0.05, start="paper", pma_heads=32,
    embedding_dim=None, feature_dim=512, iem_inputs="sum", lexical_slots=0, vectors=0, pooling="pma", interaction="iem",
)  # fmt: skip
OFF = {"recall": 0.0, "margin_mse": 0.0, "listwise_imitation": 0.0, "contrastive": 0.0}
PAPER_LOSS = LossConfig(
    **OFF, in_batch=0.0, contrastive_imitation=1.0, rank_imitation_ph=1.0, rank_imitation_hi=0.01,
    feature_imitation=0.001, ci_positive_in_denominator=False, ph_on_probabilities=False, hi_weight="ndcg",
    fi_squared=False,
)  # fmt: skip
OFFICIAL_LOSS = LossConfig(
    **OFF, in_batch=1.0, contrastive_imitation=1.0, rank_imitation_ph=1.0, rank_imitation_hi=0.01,
    feature_imitation=0.001, ci_positive_in_denominator=True, ph_on_probabilities=True, hi_weight="probability",
    fi_squared=True,
)  # fmt: skip
BARE = """
[student]
backbone = "some/backbone"
[data]
folder = "data"
[teacher]
model = "some/llm"
"""


@pytest.mark.parametrize(("preset", "loss"), [("paper", PAPER_LOSS), ("official", OFFICIAL_LOSS)])
def test_a_preset_sets_all_that_the_paper_sets(preset: str, loss: LossConfig, tmp_path: Path) -> None:
    found = read_recipe(recipe(tmp_path, f'preset = "{preset}"' + BARE))
    assert (found.student, found.loss) == (PAPER, loss)
    assert found.teacher == TeacherConfig(members=("llm",), model="some/llm", max_length=500, calibration_queries=0)
    assert found.recall == RecallConfig(steps=0), "the paper trains no recall"
    assert found.distil == DistilConfig(held_apart=1, batch=32, mining="given", negatives=8, backbone="live")
    assert found.lr == LearningRates(backbone=1e-4, pooling=1e-4, iem=1e-4)
    assert read_recipe(recipe(tmp_path, BARE), {"preset": preset}) == found


def test_without_a_preset_all_is_at_its_default(tmp_path: Path) -> None:
    found = read_recipe(recipe(tmp_path, BARE))
    assert found == read_recipe(recipe(tmp_path, 'preset = "d2llm"' + BARE))
    assert found == Recipe(
        student=StudentConfig(backbone="some/backbone"),
        data=DataConfig(folder="data"),
        teacher=TeacherConfig(model="some/llm"),
    )


def test_keys_that_a_recipe_writes_win_over_the_preset(tmp_path: Path) -> None:
    content = 'preset = "paper"' + BARE + "[loss]\nrecall = 0.5\n[distil]\n"
    found = read_recipe(recipe(tmp_path, content), {"student.lexical_slots": "96", "student.pma_heads": "4"})
    assert found.loss == replace(PAPER_LOSS, recall=0.5)
    assert found.student == replace(PAPER, lexical_slots=96, pma_heads=4)


@pytest.mark.parametrize("name", ["minilm", "smollm2", "qwen3-0.6b", "paper-7b"])
def test_no_shipped_recipe_stands_in_the_way_of_a_preset(name: str) -> None:
    path = Path(__file__).parents[1] / "train" / "recipes" / f"{name}.toml"
    found = read_recipe(path, {"preset": "official", "data.folder": "data"})
    form = ("start", "pma_heads", "feature_dim", "iem_inputs", "lexical_slots", "vectors", "pooling", "interaction")
    assert [getattr(found.student, key) for key in form] == [getattr(PAPER, key) for key in form]
    assert found.loss == OFFICIAL_LOSS


def test_the_preset_of_the_last_release_sets_the_losses_alone(tmp_path: Path) -> None:
    content = BARE + '[loss]\npreset = "official"\nrecall = 0.5\n'
    with pytest.warns(RenamedWarning, match=r"loss\.preset is called preset \(at the top"):
        found = read_recipe(recipe(tmp_path, content))
    assert found.loss == replace(OFFICIAL_LOSS, recall=0.5)
    assert replace(found, loss=LossConfig()) == read_recipe(recipe(tmp_path, BARE))
    with pytest.warns(RenamedWarning, match=r"loss\.preset"):
        found = read_recipe(recipe(tmp_path, 'preset = "paper"' + BARE), {"loss.preset": "official"})
    assert (found.student, found.loss) == (PAPER, OFFICIAL_LOSS)


def test_an_unknown_preset_of_the_last_release_is_named(tmp_path: Path) -> None:
    with (
        pytest.warns(RenamedWarning),
        pytest.raises(DataError, match=r"recipe\.toml: loss\.preset: \[\] unknown, choose from d2llm"),
    ):
        read_recipe(recipe(tmp_path, RECIPE + "[loss]\npreset = []"))


@pytest.mark.parametrize("overrides", [{}, {"preset": "paper", "loss.preset": "paper"}], ids=["file", "overrides"])
def test_both_names_of_the_preset_are_an_error(overrides: dict[str, str], tmp_path: Path) -> None:
    content = BARE if overrides else 'preset = "paper"' + BARE + '[loss]\npreset = "paper"'
    with pytest.raises(DataError, match=r"recipe\.toml: loss\.preset is the old name of preset: give preset alone"):
        read_recipe(recipe(tmp_path, content), overrides)


@pytest.mark.parametrize("module", ["config", "prompts"])
def test_the_examples_run(module: str) -> None:
    done = doctest.testmod(importlib.import_module(f"d2llm.train.{module}"))
    assert done.attempted and not done.failed
