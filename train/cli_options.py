"""What the commands of training share: recipes and their keys on the command line, times and the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from d2llm.cli_options import echo_json
from d2llm.errors import ArgumentError

from .cli_keys import Table, as_rows, as_toml
from .config import Recipe, read_recipe, shipped_recipes


class PrintingOption(click.Option):
    """A flag that prints something and ends the command. Nothing else needs to be given.

    `show(as_json)` prints. `as_json` tells whether `--json` was given, before or after the flag.
    """

    def __init__(self, *arguments: Any, show: Callable[[bool], None], **attributes: Any) -> None:
        attributes |= {"is_flag": True, "is_eager": True, "expose_value": False}
        super().__init__(*arguments, **attributes)
        self.show = show

    def handle_parse_result(self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]) -> Any:
        """Print and exit, before click checks for missing arguments."""
        if opts.get(self.name or "") and not ctx.resilient_parsing:
            self.show(bool(opts.get("as_json")))
            ctx.exit()
        return super().handle_parse_result(ctx, opts, args)


def show_recipes(as_json: bool) -> None:
    """Print the shipped recipes, one a line."""
    recipes = shipped_recipes()
    if as_json:
        echo_json(recipes)
        return
    width = max(map(len, recipes))
    for name, purpose in recipes.items():
        click.echo(f"{name:{width}}  {purpose}")


def keys_option(tables: Callable[[], Sequence[Table]], heading: str) -> Callable[[Any], Any]:
    """The option `--keys`, which prints what `tables()` gives."""

    def show(as_json: bool) -> None:
        if as_json:
            echo_json(as_rows(tables()))
        else:
            click.echo(as_toml(tables(), heading))

    return click.option(
        "--keys",
        cls=PrintingOption,
        show=show,
        help="Print every key with its type, default and meaning, as TOML (with --json, as JSON), and exit.",
    )


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key of the recipe, for example --set data.folder=my-beir-folder. It wins over the file. Repeatable. "
    "`d2llm train --keys` prints all keys.",
)


def parse_overrides(texts: Sequence[str]) -> dict[str, str]:
    """`{key: value}` of the values of `--set`.

    Raises:
        ArgumentError: one has no `=`.
    """
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ArgumentError(f"--set {text}: expected KEY=VALUE")
        overrides[key] = value
    return overrides


def load_recipe(recipe: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. Each warning about a key of the last release becomes one line on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = read_recipe(recipe, parse_overrides(overrides))
    for warning in caught:
        click.echo(f"WARNING: {warning.message}", err=True)
    return settings


def best_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def duration(seconds: float) -> str:
    """A time in the unit that suits it: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
