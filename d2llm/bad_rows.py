"""Rows that cannot be used, and what a reader does with them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

from d2llm.errors import DataError


class BadRow(DataError):
    """A row that cannot be used.

    `where` is its place ("FILE:LINE"), `reason` says what is wrong, and `row` is the row itself: a mapping, or its text
    if the text cannot be parsed. `document_id` is the id of its document, if that is known: by default the one that a
    mapping states.
    """

    def __init__(self, where: str, reason: str, row: Mapping[str, Any] | str, document_id: str | None = None) -> None:
        if document_id is None and not isinstance(row, str):
            document_id = stated_id(row)
        super().__init__(where, reason, row, document_id)
        self.where, self.reason, self.row, self.document_id = where, reason, row, document_id

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def stated_id(row: Mapping[str, Any]) -> str | None:
    """The id that a row states, `_id` or else `id`. An integer counts as text. None if it states none."""
    id_ = row.get("_id")
    id_ = row.get("id") if id_ is None else id_
    if isinstance(id_, Integral) and not isinstance(id_, bool):
        return str(id_)
    return id_ if isinstance(id_, str) and id_ else None


OnError: TypeAlias = Callable[[BadRow], None]
"""A function that a reader calls with each bad row. If it returns, the reader goes on with the next row."""


def raise_it(error: BadRow) -> None:
    """Raise `error`: the `OnError` that stops at the first bad row."""
    raise error


class RejectFile:
    """An `OnError` that appends each bad row to the file `path` and lets the reader go on.

    Each line is a JSON object with `where`, `reason` and `row` (shortened text if JSON cannot hold the row). The first
    bad row creates the file. Every row is written at once, so a crash loses none. `count` is the number of rows.

    The constructor removes the reject file of an earlier run.

    Raises:
        DataError: `path` is not a reject file. It is left as it is.

    Example:
        >>> from d2llm.corpus import read_documents
        >>> from d2llm.bad_rows import RejectFile
        >>> corpus = tmp_path / "corpus.jsonl"
        >>> lines = corpus.write_text('{"_id": "a", "text": "Refunds take five days."}\\n{"_id": "b"}\\n')
        >>> rejects = RejectFile(tmp_path / "rejects.jsonl")
        >>> [document.id for document in read_documents(corpus, rejects)], rejects.count
        (['a'], 1)
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        if path.is_dir() or (path.is_file() and not _holds_rejects(path)):
            raise DataError(f"{path} exists already and is not a file of rejected rows: choose another name")
        if path.is_file():
            path.unlink()

    def __call__(self, error: BadRow) -> None:
        """Append the row of `error`."""
        line = {"where": error.where, "reason": error.reason, "row": error.row}
        try:
            content = json.dumps(line, ensure_ascii=False, default=repr, allow_nan=False)
        except (ValueError, RecursionError):  # infinity, or too deeply nested: write the row as Python shows it
            content = json.dumps({**line, "row": reprlib.repr(error.row)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(content + "\n")
        self.count += 1


def _holds_rejects(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(10)
    return start in (b"", b'{"where": ')
