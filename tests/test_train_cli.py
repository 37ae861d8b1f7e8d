"""The commands of training: recipes by name, their keys, and what is checked before the work."""

from pathlib import Path

from click.testing import CliRunner, Result

from d2llm.cli import main


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
