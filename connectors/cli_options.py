"""Options that the commands for collections share: the place, the collection, BM25, filters, payload indexes."""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np

from d2llm.bm25 import tokenize_words
from d2llm.cli_options import finite
from d2llm.errors import DataError
from d2llm.filters import check_filter, value_at

from .bm25 import Bm25Encoder
from .filters import indexed_paths, is_indexed, path_of
from .location import check_name
from .place import Qdrant
from .schema import PAYLOAD_TYPES, Bm25Options, PayloadType
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


def search_words(model: Path, qdrant: Qdrant, collection: str, *more: str) -> list[str]:
    """The words of the command that searches a collection."""
    return ["d2llm", "search", str(model), "your question", *place_flags(qdrant), "--collection", collection, *more]


def collection_name(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """The name, if it can be the name of a collection or an alias."""
    if name is not None:
        check_name(name)
    return name


def name_given_once(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> str | None:
    """The name of an option that may be typed once; None if it was not typed."""
    if len(names) > 1:
        raise click.BadParameter(f"given {len(names)} times ({', '.join(names)}): give one name")
    return collection_name(context, parameter, names[0] if names else None)


collection_option = click.option(
    "--collection",
    required=True,
    multiple=True,
    metavar="NAME",
    callback=name_given_once,
    help="Name of the collection, or an alias of it.",
)


def hybrid_options(command: Command) -> Command:
    """Give a command `--hybrid` and `--language`, as one argument `hybrid`: what the `options` of a collection say
    about BM25. It is `{}` if neither was typed; `{"bm25": None}` means no BM25."""

    @functools.wraps(command)
    def wrapped(hybrid: bool | None, language: str | None, **arguments: Any) -> None:
        if language is not None and not hybrid:
            raise click.UsageError("--language is for --hybrid: give both, or neither")
        typed = {} if language is None else {"language": language}
        if language is not None:
            Bm25Encoder(Bm25Options(language=language))  # raises for a language that the engine does not know
        command(hybrid={} if hybrid is None else {"bm25": typed if hybrid else None}, **arguments)

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


def payload_type(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, PayloadType]:
    """`FIELD=TYPE` options as `{field: type}`.

    Raises:
        ArgumentError: a field that Qdrant cannot address.
    """
    fields: dict[str, Any] = {}
    for value in values:
        name, _, kind = value.rpartition("=")
        if not name or kind not in PAYLOAD_TYPES:
            raise click.BadParameter(f"expected FIELD=TYPE, TYPE one of {', '.join(PAYLOAD_TYPES)}; found {value!r}")
        if name in fields:
            raise click.BadParameter(f"the field {name!r} is given twice: {name}={fields[name]} and {value}")
        fields[name] = kind
    indexed_paths(fields)
    return fields


def parse_filter(context: click.Context, option: click.Parameter, conditions: tuple[str, ...]) -> dict[str, Any] | None:
    """`KEY=VALUE` pairs and JSON objects as one filter; None if there are none. A value that is JSON is read as JSON,
    any other as text.

    Raises:
        ArgumentError: a filter of another form.
    """
    merged: dict[str, Any] = {}
    for text in conditions:
        if text.lstrip().startswith("{"):
            try:
                merged.update(json.loads(text))
            except (ValueError, RecursionError) as error:
                raise click.BadParameter(f"{reprlib.repr(text)}: not valid JSON ({error})") from error
            continue
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{reprlib.repr(text)}: expected KEY=VALUE or a JSON object")
        try:
            merged[key] = json.loads(value)
        except (ValueError, RecursionError):
            merged[key] = value
    check_filter(merged)
    for key in merged:
        path_of(key)
    return merged if conditions else None


class PayloadCheck:
    """Finds payload indexes whose field has values, but none of the type of the index."""

    def __init__(self, fields: Mapping[str, PayloadType]) -> None:
        self.empty = dict(fields)
        self._others = dict[str, tuple[str, Any]]()

    def see(self, id_: str, payload: Mapping[str, Any]) -> None:
        """Note which indexes would hold a value of this document, and for the others a value of another type."""
        for name, kind in [*self.empty.items()]:
            value = value_at(payload, name)
            if is_indexed(value, kind):
                del self.empty[name]
            elif value is not None:
                self._others.setdefault(name, (id_, value))

    def require(self, option: str = "") -> None:
        """Raise a `DataError` if a field has values, but none of the type of its index. `option` precedes its name."""
        for name, (id_, value) in self._others.items():
            if name in self.empty:
                raise DataError(
                    f"{option}{name}={self.empty[name]} would index nothing: document {id_!r} has "
                    f"{reprlib.repr(value)} there, and none has such a value. Cells of CSV and TSV are text (keyword); "
                    "JSON lines and Parquet have numbers"
                )


def average_words(texts: Sequence[str], most: int | None = None) -> float:
    """The mean number of words in a text, without stop words; at least 1. A text counts as `most` words at most."""
    counts = [len(tokenize_words(text)) for text in texts]
    return max(1.0, float(np.mean(counts if most is None else np.minimum(counts, most))) if texts else 0.0)
