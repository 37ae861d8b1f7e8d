"""The command line. Commands are loaded when they are chosen, so that help and search need no torch."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from d2llm import __version__
from d2llm.errors import ArgumentError, D2LLMError


class Commands(click.Group):
    """A group whose commands are named by string, `{name: ("module:function", one line of help)}`."""

    def __init__(self, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table: that in which one uses them."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name not in self.table:
            return None
        module, _, name = self.table[cmd_name][0].partition(":")
        command: click.Command = getattr(_import(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in self.table.items()])

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Run as click does; with `args` None, as the one command of this process."""
        if args is None:
            _own_process()
        return super().main(args, *more, **options)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the arguments, and show help if that is what they ask for."""
        with _ending():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _ending():
            return super().invoke(ctx)


@contextmanager
def _ending() -> Iterator[None]:
    """The one place that says how a command may end. What goes wrong on purpose becomes one line on stderr, with exit
    status 2 if a wrong argument is the cause, otherwise 1. Nobody reading on, and Ctrl-C, are no errors: they end the
    command with the status that a shell gives to the signal."""
    try:
        yield
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error
    except D2LLMError as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # what is left in them would be written at exit, and fail again
            os.dup2(nowhere, stream)
        raise click.exceptions.Exit(128 + 13) from None  # SIGPIPE
    except KeyboardInterrupt:
        click.echo("\nInterrupted.", err=True)
        raise click.exceptions.Exit(128 + signal.SIGINT) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'the system'}: {error.strerror or error}") from error


def _own_process() -> None:
    """What a command may do in a process of its own. A character that the stream's encoding lacks is escaped. The first
    Ctrl-C lets the threads finish what they have in work; the second one ends the process on the spot."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if Ctrl-C is ignored, as by nohup
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    raise KeyboardInterrupt


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = {"d2llm.train": "train", "d2llm.export": "export"}.get(module.rpartition(".")[0])
        if extra is None or (error.name or "").startswith("d2llm"):
            raise
        raise click.ClickException(
            f"{error.name} is not installed. Install it with: pip install 'd2llm[{extra}]'"
        ) from error


def _logs(ctx: click.Context, parameter: click.Parameter, verbose: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("d2llm").setLevel(logging.INFO if verbose else logging.WARNING)


def _group(table: Mapping[str, tuple[str, str]], help_: str) -> Commands:
    group = Commands(table, help=help_, context_settings={"help_option_names": ["-h", "--help"]})
    group.params.append(
        click.Option(
            ["-v", "--verbose"], is_flag=True, expose_value=False, callback=_logs, help="Say what is being done."
        )
    )
    return click.version_option(__version__, package_name="d2llm")(group)


main = _group(
    {
        "train": ("d2llm.train.cli:train_command", "Train a student from a recipe."),
        "mine": ("d2llm.train.cli:mine_command", "Mine hard negatives for training."),
        "teach": ("d2llm.train.cli:teach_command", "Measure an LLM or reranker as teacher, and keep its judgements."),
        "kale": (
            "d2llm.train.cli:kale_command",
            "Align a small query encoder to a student; passages stay as they are.",
        ),
        "index": ("d2llm.connectors.cli:index_command", "Encode a corpus into a Qdrant collection."),
        "search": ("d2llm.connectors.cli:search_command", "Search a collection: recall, then rescoring."),
        "collection": (
            "d2llm.connectors.cli_collection:collection_group",
            "Look at collections, copy, save, drop them.",
        ),
        "tune": (
            "d2llm.connectors.cli_tune:tune_command",
            "Measure how hard a collection must be searched, and say so.",
        ),
        "eval": ("d2llm.cli_eval:eval_command", "Measure a model on judged queries or scored pairs."),
        "compare": ("d2llm.export.cli:compare_command", "Measure small query encoders beside a student's own."),
        "doctor": ("d2llm.cli_eval:doctor_command", "Show what is installed, what works, and how to mend the rest."),
    },
    """Vector search that ranks like a cross-encoder and costs what a bi-encoder costs.

    \b
    d2llm train RECIPE.toml STUDENT              torch: distil a student
    d2llm-export onnx STUDENT MODEL              its ONNX model folder; from here on no torch
    d2llm index MODEL CORPUS.jsonl --qdrant ./qdrant --collection docs
    d2llm search MODEL "a question" --qdrant ./qdrant --collection docs
    """,
)


export_main = _group(
    {"onnx": ("d2llm.export.cli:onnx_command", "Export a student to a verified ONNX model folder.")},
    "Turn a trained student into a model folder that runs without torch.",
)
