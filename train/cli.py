"""The command `d2llm train`."""

from __future__ import annotations

from pathlib import Path

import click

from d2llm.cli import echo_json, echo_measures
from d2llm.errors import DataError, ModelError

from .config import read_recipe
from .trainer import train


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("student", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Override a recipe key, e.g. --set student.backbone=my/model. Repeatable.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The dev figures as one line of JSON on stdout.")
def train_command(recipe: Path, student: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train by RECIPE (TOML) into the new folder STUDENT.

    The encoder learns recall first. Then the teacher is measured on dev beside it: one that ranks no better has
    nothing to teach, and the student learns from labels alone. The best state on dev is kept.
    """
    pairs = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise DataError(f"--set {text}: expected KEY=VALUE")
        pairs[key] = value
    settings = read_recipe(recipe, pairs)
    if student.exists():  # said before the work, not after it
        raise ModelError(f"{student} exists already. Choose another folder or remove it first.")
    result = train(settings, student, progress=not as_json)
    if as_json:
        echo_json({"student": str(student), "taught": result.taught, "dev_ndcg@10": result.dev})
        return
    click.echo("nDCG@10 on dev:")
    echo_measures({name: {"nDCG@10": value} for name, value in result.dev.items()})
    if not result.taught:
        click.echo("The teacher ranked no better than the cosine: the student learned from labels alone.")
    click.echo(f"Next: d2llm-export onnx {student} MODEL")
