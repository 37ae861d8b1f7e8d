"""What the commands share: options, and how they print."""

from __future__ import annotations

import json
import math
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import click

from d2llm.deprecated import message
from d2llm.model import ENCODER_SIZES
from d2llm.sessions import MAX_THREADS
from d2llm.types import TASKS, is_utf8


class RenamedOptions(click.Command):
    """A command some of whose options had other names in the last release, `{"--old": "--new"}`; they work with a
    warning on stderr."""

    def __init__(self, *arguments: Any, renamed: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.renamed = renamed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, old names changed to new ones."""
        current = list(args)
        for place, argument in enumerate(args):
            if argument == "--":
                break
            name, equals, value = argument.partition("=")
            if name in self.renamed:
                click.echo(f"WARNING: {message(name, self.renamed[name])}", err=True)
                current[place] = self.renamed[name] + equals + value
        return super().parse_args(ctx, current)


class TextType(click.types.StringParamType):
    """Text that is read as UTF-8 in every locale. (In others, Python makes halves of surrogate pairs of its bytes.)"""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, or a usage error."""
        text = str(super().convert(value, param, ctx))
        try:
            return text if is_utf8(text) else os.fsencode(text).decode()
        except UnicodeError:
            self.fail(f"{text!r} is not UTF-8", param, ctx)


TEXT = TextType()


query_encoder_option = click.option(
    "--query-encoder",
    type=click.Choice(ENCODER_SIZES),
    help="The encoder of queries: the student's own (full) or one aligned to it (small). [default: small, if any]",
)
candidates_option = click.option(
    "--candidates",
    default=100,
    show_default=True,
    metavar="N",
    type=click.IntRange(1),
    help="Passages that recall fetches and the IEM rescores.",
)
task_option = click.option(
    "--task",
    type=click.Choice(TASKS),
    default="asymmetric",
    show_default=True,
    help="Branch of the IEM: asymmetric, does the passage answer the query? symmetric, are the two texts alike?",
)
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the graphs run."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, MAX_THREADS), metavar="N", help="CPU threads. [default: one a core]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="One line of JSON on stdout, for programs.")


def finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """The number of an option, unless it is NaN or infinite: click's ranges let NaN pass."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a finite number, found {value}")
    return value


def echo_json(value: Any) -> None:
    """Print one line of JSON on stdout; characters beyond ASCII are escaped where stdout has another encoding than
    UTF-8, so that it is JSON there too."""
    encoding = getattr(sys.stdout, "encoding", None) or ""
    click.echo(json.dumps(value, ensure_ascii=encoding.lower() not in ("utf-8", "utf8")))


def echo_table(rows: Sequence[Sequence[str]], *, header: Sequence[str]) -> None:
    """Print columns: the first left-aligned, the others right-aligned."""
    widths = [max(display_width(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        pads = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + pads[0], *(pad + cell for cell, pad in zip(row[1:], pads[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())


def display_width(text: str) -> int:
    """Columns that `text` takes on a terminal: Chinese, Japanese and Korean characters and emoji take two, marks that
    stand on the character before them none."""
    return sum(
        0 if unicodedata.category(one) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(one) in "WF")
        for one in text
    )


def shorten(text: str, width: int) -> str:
    """`text` in one line of at most `width` columns. It is cut after a word, or where none ends near, since Chinese,
    Japanese and Thai have no spaces, after a character with all its marks."""
    text = " ".join(text.split())
    columns = end = 0
    for place, character in enumerate(text):
        if columns <= width - len(" ...") and not _joins(text, place):
            end = place
        columns += display_width(character)
        if columns > width:
            space = text.rfind(" ", 3 * end // 4, end + 1)
            return (text[:end] if space < 0 else text[:space]) + " ..."
    return text


def _joins(text: str, place: int) -> bool:
    """Whether the code point at `place` belongs to the character before it: a mark, a skin tone, a part of an emoji."""
    one, before = text[place], text[place - 1 : place]
    return unicodedata.category(one)[0] == "M" or "\U0001f3fb" <= one <= "\U0001f3ff" or "\u200d" in (one, before)


def echo_measures(table: Mapping[str, Mapping[str, float]]) -> None:
    """Print `{row: {measure: value}}` with the measures as columns; a row without a measure has a dash."""
    measures = list(dict.fromkeys(measure for values in table.values() for measure in values))
    echo_table(
        [[name, *(f"{v[m]:.4f}" if m in v else "-" for m in measures)] for name, v in table.items()],
        header=["", *measures],
    )
