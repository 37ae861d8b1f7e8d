"""Options that the commands for collections share: where Qdrant is, which collection, whether it has BM25."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np

from d2llm.bm25 import tokenize_words
from d2llm.cli_options import finite

from .location import check_name
from .place import Qdrant
from .points import Bm25Encoder
from .schema import Words
from .server_calls import MAX_TIMEOUT

Command = Callable[..., None]
GRPC_PORT = 6334
SAMPLE = 10_000
"""Documents whose words are counted for the mean length of a document."""


def reached_by(qdrant: Qdrant) -> dict[str, Any]:
    """What must be given to reach the place, except for the location, the API key and the timeout."""
    if not qdrant.shared:
        return {}
    port, file = qdrant.grpc_port, qdrant.ca_file
    return ({} if port == GRPC_PORT else {"grpc_port": port}) | ({} if file is None else {"ca_file": str(file)})


def place_flags(qdrant: Qdrant) -> list[str]:
    """What must be typed to reach the place."""
    more = [[f"--{name.replace('_', '-')}", str(value or 0)] for name, value in reached_by(qdrant).items()]
    return ["--qdrant", str(qdrant), *chain.from_iterable(more)]


def place_option(command: Command) -> Command:
    """Give a command `--qdrant` and the options of servers, as one argument `qdrant`."""

    @functools.wraps(command)
    def wrapped(location: str, **arguments: Any) -> None:
        server = {name: arguments.pop(name) for name in ("api_key", "timeout", "grpc_port", "ca_file")}
        server["grpc_port"] = server["grpc_port"] or None
        command(qdrant=Qdrant(location, **server), **arguments)

    for option in reversed((
        click.option("--qdrant", "location", required=True, metavar="PATH_OR_URL", envvar="QDRANT_URL",
                     help="Where the collections are: a folder (embedded Qdrant), such as ./qdrant, or the address of "
                          "a server, such as http://localhost:6333. [env: QDRANT_URL]"),
        click.option("--api-key", envvar="QDRANT_API_KEY", metavar="KEY",
                     help="API key of the server. [env: QDRANT_API_KEY]"),
        click.option("--ca-file", type=click.Path(path_type=Path), metavar="PEM",
                     help="Certificates to trust for https://, in place of the system's."),
        click.option("--grpc-port", type=click.IntRange(0, 65535), default=GRPC_PORT, show_default=True, metavar="N",
                     help="gRPC port of the server. 0 sends everything through its address, which is slower."),
        click.option("--timeout", type=click.FloatRange(0, MAX_TIMEOUT, min_open=True), default=30.0,
                     show_default=True, metavar="SECONDS", callback=finite, help="Limit for one call to the server."),
    )):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


def search_line(model: Path, qdrant: Qdrant, collection: str, *more: str) -> str:
    """The command that searches a collection."""
    place = [*place_flags(qdrant), "--collection", collection]
    return shlex.join(["d2llm", "search", str(model), "your question", *place, *more])


def collection_name(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """The name, if it can be the name of a collection or an alias."""
    if name is not None:
        check_name(name)
    return name


collection_option = click.option("--collection", required=True, callback=collection_name,
                                 help="Name of the collection, or an alias of it.")  # fmt: skip


def hybrid_options(command: Command) -> Command:
    """Give a command `--hybrid` and `--language`, as one argument `hybrid`: what the `options` of a collection say
    about BM25. It is `{}` if neither was typed; `{"words": None}` means no BM25."""

    @functools.wraps(command)
    def wrapped(hybrid: bool | None, language: str | None, **arguments: Any) -> None:
        if language is not None and not hybrid:
            raise click.UsageError("--language is of --hybrid's words: give both, or neither")
        typed = {} if language is None else {"language": language}
        if language is not None:
            Bm25Encoder(Words(language=language))  # raises for a language that the engine does not know
        command(hybrid={} if hybrid is None else {"words": typed if hybrid else None}, **arguments)

    for option in (
        click.option(
            "--language", metavar="NAME", help="Language of --hybrid's stop words and stems. [default: english]"
        ),
        click.option(
            "--hybrid/--no-hybrid",
            default=None,
            help="Store BM25 vectors too, for `d2llm search --hybrid`. --no-hybrid leaves out those of the collection "
            "that is replaced or copied.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def average_words(texts: Sequence[str]) -> float:
    """The mean number of words in a text, without stop words; at least 1."""
    return max(1.0, float(np.mean([len(tokenize_words(text)) for text in texts])) if texts else 0.0)
