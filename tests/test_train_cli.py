"""The commands of training: recipes by name, their keys, and what is checked before the work."""

import contextlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from d2llm.cli import main
from d2llm.student import Student
from d2llm.train import cli_teach, read_recipe


def d2llm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_an_old_key_is_one_line_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("encoder_steps = 3\n[student]\nbackbone = '/nowhere'\n[data]\nfolder = '/nowhere/too'\n")
    done = d2llm("train", path, tmp_path / "student", "--set", "iem_lr=1e-3")
    assert done.exit_code == 1 and "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert told == [
        f"WARNING: {old} is called {new} now. The old name will stop working in the next release."
        for old, new in (("encoder_steps", "recall.steps"), ("iem_lr", "lr.iem"))
    ]


# recipes by name

RECIPES = ["minilm", "pairs", "paper-7b", "qwen3-0.6b", "smollm2"]


def test_shipped_recipes_are_listed_with_a_line_each() -> None:
    listed = d2llm("train", "--list")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [
        "minilm",
        "pairs",
        "paper-7b",
        "qwen3-0.6b",
        "smollm2",
    ]
    assert "on a laptop CPU" in listed.stdout.splitlines()[0]
    for arguments in (("--list", "--json"), ("--json", "--list")):
        assert list(json.loads(d2llm("train", *arguments).stdout)) == [
            "minilm",
            "pairs",
            "paper-7b",
            "qwen3-0.6b",
            "smollm2",
        ]


@pytest.mark.parametrize("command", [("train", "minilm", "student"), ("teach", "minilm")], ids=["train", "teach"])
def test_a_shipped_recipe_is_found_by_its_name(command: tuple[str, ...], tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        done = d2llm(*command, "--set", "data.folder=absent", "--set", "recall.steps=-1")
        assert done.exit_code == 1 and "minilm: recall.steps: expected" in done.stderr
        Path("minilm").mkdir()  # a folder is no recipe
        assert "minilm: recall.steps: expected" in d2llm(*command, "--set", "recall.steps=-1").stderr


def test_a_file_wins_over_the_shipped_recipe_of_its_name(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        Path("minilm").write_text("[student]\nbackbone = 'mine'\n[data]\nfolder = 'data'\n")
        assert read_recipe("minilm").student.backbone == read_recipe(Path("minilm")).student.backbone == "mine"
        Path("minilm").unlink()
        assert read_recipe("minilm").student.backbone == "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize("command", [("train", "minlm", "student"), ("teach", "../recipes/minilm")])
def test_an_unknown_name_lists_those_there_are(command: tuple[str, ...], tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        done = d2llm(*command)
    assert done.exit_code == 1
    known = "no such file, and no shipped recipe has this name (minilm, pairs, paper-7b, qwen3-0.6b, smollm2)"
    assert f"{command[1]}: {known}" in done.stderr


# what is checked before the work


def beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl.gz", "qrels/train.tsv", "qrels/dev.tsv"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.folder=absent"], "data.folder = 'absent': no such folder, expected a BEIR folder (corpus.jsonl, "),
        ([], "data.folder = 'set data.folder to a BEIR folder with qrels/train.tsv and qrels/dev.tsv': no such folder"),
        (["data.folder=bare"], "data.folder: bare/qrels/dev.tsv: no such file"),
        (["data.folder=beir", "data.examples=absent.jsonl"], "data.examples: absent.jsonl: no such file"),
        (["data.folder=beir", 'data.pairs=["absent.jsonl"]'], "data.pairs: absent.jsonl: no such file"),
        (["data.folder=beir", "data.dev_pairs=absent.jsonl"], "data.dev_pairs: absent.jsonl: no such file"),
        (["data.folder=beir", 'teacher.members=["llm"]', "teacher.model=m", "teacher.template=absent.toml"],
         "teacher.template: 'absent.toml' is neither paper-en, paper-zh"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [("train", "minilm", "student"), ("teach", "minilm")], ids=["train", "teach"])
def test_a_path_that_does_not_exist_is_told_before_a_model_is_loaded(
    command: tuple[str, ...], overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Student, "create", load)
    monkeypatch.setattr(cli_teach, "Teaching", load)
    beir(tmp_path / "beir")
    (beir(tmp_path / "bare") / "qrels" / "dev.tsv").unlink()
    with contextlib.chdir(tmp_path):
        done = d2llm(*command, *(word for text in overrides for word in ("--set", text)))
    assert done.exit_code == 1 and message in done.stderr, done.output
