"""The options that commands share, and the functions that print their results."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from d2llm.deprecated import message
from d2llm.model import ENCODER_SIZES
from d2llm.sessions import MAX_THREADS
from d2llm.types import TASKS, is_utf8


class RenamedOptions(click.Command):
    """A command that accepts old names of options, `renamed={"--old": "--new"}`, with a warning on stderr."""

    def __init__(self, *arguments: Any, renamed: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.renamed = renamed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Replace old names by new ones, then parse the arguments."""
        current = list(args)
        for position, argument in enumerate(args):
            if argument == "--":
                break
            name, equals, value = argument.partition("=")
            if name in self.renamed:
                new = self.renamed[name]
                if any(other.partition("=")[0] == new for other in args):
                    raise click.UsageError(f"{name} is the old name of {new}: give {new} alone", ctx)
                click.echo(f"WARNING: {message(name, self.renamed[name])}", err=True)
                current[position] = self.renamed[name] + equals + value
        return super().parse_args(ctx, current)


class TextType(click.types.StringParamType):
    """A text argument, read as UTF-8 in every locale.

    In a locale with another encoding, Python turns the bytes of the argument into halves of surrogate pairs.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text, or fail with a usage error."""
        text = str(super().convert(value, param, ctx))
        try:
            return text if is_utf8(text) else os.fsencode(text).decode()
        except UnicodeError:
            self.fail(f"{text!r} is not UTF-8: encode it in UTF-8", param, ctx)


TEXT = TextType()


query_encoder_option = click.option(
    "--query-encoder",
    type=click.Choice(ENCODER_SIZES),
    help="Encoder of queries: the student's own (full), or the small one aligned to it (small). "
    "[default: small if the model has one]",
)
candidates_option = click.option(
    "--candidates",
    default=100,
    show_default=True,
    metavar="N",
    type=click.IntRange(1),
    help="Number of passages that recall fetches and the IEM rescores.",
)
task_option = click.option(
    "--task",
    type=click.Choice(TASKS),
    default="asymmetric",
    show_default=True,
    help="Branch of the IEM. asymmetric: does the passage answer the query? symmetric: do the two texts mean the same?",
)
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device that runs the model."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, MAX_THREADS), metavar="N", help="Number of CPU threads. [default: one per core]"
)
words_option = click.option(
    "--corpus",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Passages (JSONL, a BEIR folder, or a folder of text files) that the words and vectors of a published "
    "embedder's score are fitted to, without labels. [default: the score is the cosine alone]",
)
max_length_option = click.option(
    "--max-length",
    type=click.IntRange(1),
    metavar="N",
    help="Let a published embedder read N tokens of a text at most. d2llm index splits longer documents into passages. "
    "Short passages can rank better: try 128. [default: the embedder's own limit]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON on stdout, for programs.")


def finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Check that the number of an option is finite and return it. (click's ranges accept NaN.)"""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a finite number, found {value}")
    return value


def typed_options(names: Iterable[str]) -> list[str]:
    """Those options of the running command, such as `--steps`, that were typed. `names` are their parameters."""
    context = click.get_current_context()
    return [
        option.opts[0]
        for option in context.command.params
        if option.name in set(names) and context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE
    ]


def echo_json(value: Any) -> None:
    """Print one line of JSON on stdout. If stdout is not UTF-8, characters beyond ASCII are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or ""
    click.echo(json.dumps(value, ensure_ascii=encoding.lower() not in ("utf-8", "utf8")))


def echo_next(*words: object) -> None:
    """Print the command that a user is likely to type next, quoted for a shell."""
    click.echo("Next: " + shlex.join(map(str, words)))


def echo_table(rows: Sequence[Sequence[str]], *, header: Sequence[str]) -> None:
    """Print a table. The first column is left-aligned, the others are right-aligned."""
    widths = [max(display_width(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        pads = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + pads[0], *(pad + cell for cell, pad in zip(row[1:], pads[1:], strict=True))]
        click.echo("  ".join(cells).rstrip())


def display_width(text: str) -> int:
    """Return the number of terminal columns of `text`.

    Chinese, Japanese and Korean characters and emoji take two columns. Combining marks take none.
    """
    return sum(
        0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def shorten(text: str, width: int) -> str:
    """Return `text` in one line of at most `width` columns.

    The text is cut after a word. If no word ends nearby (Chinese, Japanese and Thai have no spaces), it is cut after a
    character and all its marks.
    """
    text = " ".join(text.split())
    columns = end = 0
    for position, character in enumerate(text):
        if columns <= width - len(" ...") and not _joins(text, position):
            end = position
        columns += display_width(character)
        if columns > width:
            space = text.rfind(" ", 3 * end // 4, end + 1)
            return (text[:end] if space < 0 else text[:space]) + " ..."
    return text


def _joins(text: str, position: int) -> bool:
    """Return whether the code point at `position` belongs to the character before it.

    It does if it is a mark, a skin tone or a part of an emoji.
    """
    char, previous = text[position], text[position - 1 : position]
    return unicodedata.category(char)[0] == "M" or "\U0001f3fb" <= char <= "\U0001f3ff" or "\u200d" in (char, previous)


def echo_measures(table: Mapping[str, Mapping[str, float]]) -> None:
    """Print `{row: {measure: value}}` as a table with a column for each measure. A missing measure is a dash."""
    measures = list(dict.fromkeys(measure for values in table.values() for measure in values))
    echo_table(
        [
            [name, *(f"{values[measure]:.4f}" if measure in values else "-" for measure in measures)]
            for name, values in table.items()
        ],
        header=["", *measures],
    )
