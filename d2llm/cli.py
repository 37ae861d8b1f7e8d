"""The command line. A command is imported when it is chosen, so that help and search need no torch."""

from __future__ import annotations

import errno
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
    """A group of commands that are imported when they are chosen.

    `table` is `{name: ("module:function", one line of help)}`.
    """

    def __init__(self, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of the table, which is the order of use."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command `cmd_name` and return it, or None if there is none."""
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
        """Run as click does. If `args` is None, the command also sets up the streams and Ctrl-C of the process."""
        if args is None:
            _set_up_process()
        return super().main(args, *more, **options)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the arguments, and show help if they ask for it."""
        with _user_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _user_errors():
            return super().invoke(ctx)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn exceptions into messages and exit statuses. No other place does this.

    Errors of d2llm and of the system become one line on stderr. The exit status is 2 for a wrong argument, otherwise 1.
    A closed pipe and Ctrl-C are not errors: they end the command with the status that a shell gives to the signal.
    """
    try:
        yield
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error
    except D2LLMError as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # Python writes their buffers at exit, which would fail again
            os.dup2(nowhere, stream)
        raise click.exceptions.Exit(128 + 13) from None  # SIGPIPE
    except KeyboardInterrupt:
        click.echo("\nInterrupted.", err=True)
        raise click.exceptions.Exit(128 + signal.SIGINT) from None
    except OSError as error:
        full = ". Make room, and give this command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        message = f"{error.filename or 'the system'}: {error.strerror or error}{full}"
        raise click.ClickException(message) from error


def _set_up_process() -> None:
    """Set up the streams and Ctrl-C of a process that runs one command.

    A character that the encoding of stdout or stderr lacks is escaped. The first Ctrl-C lets threads finish their
    current work; the second ends the process at once.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup ignores Ctrl-C: leave that
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    raise KeyboardInterrupt


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        satellite = module.rpartition(".")[0].removeprefix("d2llm.")
        extra = satellite if satellite in ("train", "export", "serve") else None
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
            ["-v", "--verbose"], is_flag=True, expose_value=False, callback=_logs, help="Log each step to stderr."
        )
    )
    return click.version_option(__version__, package_name="d2llm")(group)


main = _group(
    {
        "train": ("d2llm.train.cli:train_command", "Train a student from a recipe."),
        "init": (
            "d2llm.train.cli_init:init_command",
            "Make a student of an embedder as it is published, without training.",
        ),
        "generate": ("d2llm.train.cli_adapt:generate_command", "Write queries for the passages of a corpus."),
        "adapt": ("d2llm.train.cli_adapt:adapt_command", "Adapt an embedder to a corpus, without labels."),
        "mine": ("d2llm.train.cli:mine_command", "Mine hard negatives for training."),
        "teach": (
            "d2llm.train.cli_teach:teach_command",
            "Measure an LLM or reranker as teacher and cache its judgements.",
        ),
        "kale": (
            "d2llm.train.cli_kale:kale_command",
            "Align a small, fast query encoder to a student; indexed passages stay valid.",
        ),
        "index": ("d2llm.connectors.cli:index_command", "Encode a corpus into a Qdrant collection."),
        "search": (
            "d2llm.connectors.cli:search_command",
            "Search a collection: recall candidates, then rescore them.",
        ),
        "serve": ("d2llm.serve.cli:serve_command", "Serve searches of a collection over HTTP, with a page."),
        "mcp": ("d2llm.serve.cli:mcp_command", "Offer searches of a collection to an agent, as tools of MCP."),
        "collection": (
            "d2llm.connectors.cli_collection:collection_group",
            "List, inspect, copy, save and drop collections.",
        ),
        "tune": (
            "d2llm.connectors.cli_tune:tune_command",
            "Measure recall against latency and suggest hnsw_ef.",
        ),
        "eval": ("d2llm.cli_eval:eval_command", "Measure a model on judged queries or judged pairs."),
        "compare": ("d2llm.export.cli:compare_command", "Compare small query encoders with a student's own."),
        "doctor": ("d2llm.cli_doctor:doctor_command", "Check the installation and show how to repair it."),
    },
    """Vector search that ranks like a cross-encoder and costs what a bi-encoder costs.

    A student is a small model, distilled from a large one. It recalls candidates by vector and rescores them with its
    IEM, a small network that reads precomputed features of the passages.

    \b
    1. Distil a student, or take an embedder as it is (needs torch):
       d2llm train RECIPE.toml STUDENT
       d2llm init EMBEDDER STUDENT
    2. Export it to a model folder (the later steps need no torch):
       d2llm-export onnx STUDENT MODEL
    3. Index a corpus and search it:
       d2llm index MODEL CORPUS.jsonl --qdrant ./qdrant --collection docs
       d2llm search MODEL "a question" --qdrant ./qdrant --collection docs
       d2llm serve MODEL --qdrant ./qdrant --collection docs
    4. Measure the model on judged queries:
       d2llm eval MODEL BEIR_FOLDER

    d2llm COMMAND --help explains a command, its options and examples.
    """,
)


export_main = _group(
    {"onnx": ("d2llm.export.cli:onnx_command", "Export a student or embedder to a verified ONNX model folder.")},
    """Export a student to a model folder that runs without torch.

    \b
    d2llm-export onnx STUDENT MODEL
    """,
)
