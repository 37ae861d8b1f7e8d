"""Where `d2llm index` takes its documents from: a file, a stream, or a collection that something else made."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import click

from d2llm.bad_rows import BadRow, OnError, RejectFile
from d2llm.cli_options import TEXT
from d2llm.corpus import read_documents
from d2llm.errors import DataError
from d2llm.readers import STDIN, corpus_file, is_stream
from d2llm.types import Document

from .cli_options import GRPC_PORT, SAMPLE, Command, PayloadCheck, average_words, place_flags
from .place import Qdrant
from .schema import PayloadType
from .take_over import ForeignCollection

JOB_PATIENCE = 120.0
"""Seconds for which a job repeats a call after a failure that may pass: the server may be restarting."""


class Corpus:
    """A file, a BEIR folder or a stream of documents."""

    def __init__(self, path: Path) -> None:
        self.path, self.once = path, is_stream(path)

    @property
    def name(self) -> str:
        """What messages call it."""
        return "stdin" if self.path == STDIN else str(corpus_file(self.path))

    def documents(self, on_error: OnError | None) -> Iterator[Document]:
        """Read the documents: as often as wanted, or `once`."""
        return read_documents(self.path, on_error)

    def check(self, engine: str, prune: bool, skip: bool, reject_file: Path | None) -> None:
        """Refuse options that it does not go with."""
        if reject_file is not None and not self.once:  # the reject file of an earlier run is removed
            if not self.path.exists():
                raise DataError(f"{self.path}: no such file")
            if reject_file.resolve().is_relative_to(self.path.resolve()):
                raise click.UsageError(f"{reject_file} belongs to the corpus: choose another file for --rejects")
        if self.once and engine == "ray":
            raise click.UsageError("a stream can be read by one process alone: give --engine ray a file")
        if self.once and prune and skip:
            raise click.UsageError("--prune needs every row of a stream: leave --on-error skip and --rejects out")

    def require_other(self, qdrant: Qdrant, collection: str) -> None:
        """Refuse to be indexed into itself."""

    def options(self) -> dict[str, Any]:
        """What it says about how its collection is stored, by the names of `CollectionOptions`."""
        return {}

    def payload_indexes(self) -> Mapping[str, PayloadType]:
        """The payload indexes that it has already."""
        return {}

    def next_steps(self, qdrant: Qdrant, collection: str) -> list[str]:
        """What can be done once `collection` holds its documents, in lines for the user."""
        return []


class TakenOver(Corpus):
    """A collection that something else made."""

    def __init__(self, source: ForeignCollection) -> None:
        super().__init__(Path(source.name))
        self._source, self.once = source, False

    @property
    def name(self) -> str:
        return self._source.where

    def documents(self, on_error: OnError | None) -> Iterator[Document]:
        return self._source.documents(on_error)

    def check(self, engine: str, prune: bool, skip: bool, reject_file: Path | None) -> None:
        """Refuse --engine ray, and say what was found."""
        if engine == "ray":
            raise click.UsageError("a collection is read by one process alone: leave --engine ray out")
        form, count = self._source.form, self._source.count()
        writer = f", written by {form.writer}" * bool(form.writer)
        click.echo(f"{self.name}: {count:,} points{writer}, with their text in {form.field!r}", err=True)
        if (old := self._source.old_vectors) is None:
            return
        for name, new in old.names.items():
            vector = old.kept[new]
            click.echo(f"kept: the vectors {name!r} ({vector.size}, {vector.distance}), as {new!r}", err=True)
        for name, kind in old.left_out.items():
            click.echo(f"not kept: {name!r}, which has {kind}", err=True)

    def options(self) -> dict[str, Any]:
        """Which vectors are kept. None, unless that was asked for."""
        old = self._source.old_vectors
        return {"kept": old.kept if old else {}}

    def require_other(self, qdrant: Qdrant, collection: str) -> None:
        with qdrant.index(collection) as index:
            self._source.require_other(index)

    def payload_indexes(self) -> Mapping[str, PayloadType]:
        own, others = self._source.payload_indexes()
        for path, kind in others.items():
            click.echo(f"not taken over: the payload index {path}={kind}, of a type that d2llm has not", err=True)
        return own

    def next_steps(self, qdrant: Qdrant, collection: str) -> list[str]:
        """How the old program searches `collection`, if its vectors are kept, and how to move the aliases. They stay:
        what searches under them does not find its vectors or its text under their names in `collection`."""
        place, old = shlex.join(place_flags(qdrant)), self._source.old_vectors
        names = " or ".join(map(repr, old.kept)) if old else ""
        both = f"The old search runs on {collection} too, with the vector {names} and the text in the field 'text'."
        return [both] * bool(old) + [
            f"The alias {alias} still names the old collection. When nothing searches that under it any more: "
            f"d2llm collection alias {collection} {alias} {place}"
            for alias in self._source.aliases()
        ]


keep_vectors_option = click.option(
    "--keep-vectors",
    is_flag=True,
    help="Keep the dense vectors of that collection beside those of MODEL, so that the old search runs on the new "
    "collection too.",
)
text_field_option = click.option(
    "--text-field",
    metavar="FIELD",
    type=TEXT,
    help="Field of another program's points with the text, or a path to it, such as metadata.body. "
    "[default: found by the form of the points]",
)


def corpus_options(command: Command) -> Command:
    """Give a command CORPUS and `--from-collection` with its options, as one argument `corpus`. `place_option` must
    stand before it."""

    @functools.wraps(command)
    def wrapped(
        corpus: Path | None, from_collection: str | None, from_qdrant: str | None, from_api_key: str | None,
        from_grpc_port: int, text_field: str | None, keep_vectors: bool, qdrant: Qdrant, **arguments: Any,
    ) -> None:  # fmt: skip
        if (corpus is None) == (from_collection is None):
            raise click.UsageError("name either a CORPUS, or a collection that something else made (--from-collection)")
        for option, value in (("--from-qdrant", from_qdrant), ("--text-field", text_field),
                              ("--keep-vectors", keep_vectors or None)):  # fmt: skip
            if value is not None and from_collection is None:
                raise click.UsageError(f"{option} is for --from-collection: give both, or neither")
        if from_collection is None:
            assert corpus is not None
            command(corpus=Corpus(corpus), qdrant=qdrant, **arguments)
            return
        place = replace(qdrant, patience=JOB_PATIENCE)
        if from_qdrant is not None:
            place = replace(place, location=from_qdrant, api_key=from_api_key, grpc_port=from_grpc_port or None)
        with ForeignCollection(from_collection, place, text_field, keep_vectors) as source:
            command(corpus=TakenOver(source), qdrant=qdrant, **arguments)

    for option in reversed((
        click.argument("corpus", type=click.Path(path_type=Path), required=False),
        click.option("--from-collection", metavar="NAME", type=TEXT,
                     help="In place of CORPUS: a collection that LangChain, LlamaIndex, Haystack, fastembed, "
                          "mcp-server-qdrant or your own program made. It is not changed."),
        click.option("--from-qdrant", metavar="PATH_OR_URL",
                     help="Where that collection is: the address of a server, or a folder of "
                          "QdrantClient(path=...), which must be one that you trust. [default: --qdrant]"),
        click.option("--from-api-key", envvar="D2LLM_FROM_API_KEY", metavar="KEY",
                     help="API key of the server at --from-qdrant. [env: D2LLM_FROM_API_KEY]"),
        click.option("--from-grpc-port", type=click.IntRange(0, 65535), default=GRPC_PORT, show_default=True,
                     metavar="N",
                     help="gRPC port of the server at --from-qdrant. 0 sends everything through its address."),
        text_field_option,
        keep_vectors_option,
    )):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


class Rejects:
    """Bad rows of a corpus: counts them, keeps the first ten to show, and writes all of them to a file if asked to.

    A corpus may be read again. A row that was bad in the first reading is not recorded again.
    """

    def __init__(self, file: Path | None) -> None:
        self._known, self._new, self._to_show = set[str](), 0, list[str]()
        self.ids = set[str]()
        """The ids of the documents of bad rows."""
        self.without_id = 0
        """The number of bad rows whose document is not known."""
        self._file = None if file is None else RejectFile(file)

    @property
    def count(self) -> int:
        """The number of bad rows."""
        return len(self._known)

    def __call__(self, error: BadRow) -> None:
        """Record one bad row."""
        if (key := _place_and_reason(error)) in self._known:
            return
        self._known.add(key)
        if error.document_id is None:
            self.without_id += 1
        else:
            self.ids.add(error.document_id)
        self._new += 1
        if len(self._to_show) < 10:
            self._to_show.append(str(error))
        if self._file is not None:
            self._file(error)

    def or_raise(self, consequence: str) -> OnError:
        """An `OnError` for another reading: it raises for a row that was not bad for this reason before, where it
        would have the `consequence`. It can be pickled."""
        return functools.partial(_raise_unless, frozenset(self._known), consequence)

    def show(self) -> None:
        """Print the first ten since the last call to stderr, and how many more there are."""
        for message in self._to_show:
            click.echo(f"skipped {message}", err=True)
        if self._new > len(self._to_show):
            click.echo(f"... and {self._new - len(self._to_show)} more", err=True)
        self._new, self._to_show = 0, []


def _place_and_reason(error: BadRow) -> str:
    return f"{Path(error.where).absolute()}: {error.reason}"  # Ray's workers read the absolute path


def _raise_unless(known: frozenset[str], consequence: str, error: BadRow) -> None:
    if _place_and_reason(error) not in known:
        raise DataError(
            f"the corpus changed while this command read it, and {consequence}: run the same command again ({error})"
        ) from error


def survey(
    corpus: Corpus,
    rejects: Rejects | None,
    payload_indexes: Mapping[str, PayloadType] | None = None,
    most_words: int | None = None,
) -> tuple[int, float]:
    """Read the whole corpus. Returns the number of documents, and the mean number of words in the first of them, of
    which a longer one counts as `most_words`.

    Raises:
        DataError: the corpus has no documents, or a bad row (without `rejects`), or a payload index would be empty.
    """
    documents, check = some(corpus.documents(rejects), corpus.name, rejects), PayloadCheck(payload_indexes or {})
    first, count = list[str](), 0
    for document in documents:
        check.see(document.id, document.payload)
        count += 1
        if len(first) < SAMPLE:
            first.append(document.content)
    check.require("--payload-index ")
    return count, average_words(first, most_words)


def some(documents: Iterator[Document], name: str, rejects: Rejects | None) -> Iterator[Document]:
    """The same documents, of the corpus called `name`. The first is read now.

    Raises:
        DataError: there are none.
    """
    for first in documents:
        return chain([first], documents)
    raise DataError(f"{name}: no documents" + (f" ({rejects.count} skipped)" if rejects and rejects.count else ""))
