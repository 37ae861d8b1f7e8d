"""Rows of a file: JSON lines, Parquet, CSV or TSV, packed or not, or standard input.

Errors name the file, the line and what was expected.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import os
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast
from uuid import UUID

from d2llm.errors import DataError, import_extra

STDIN = Path("-")
"""The path that means standard input; a file of that name is `Path("-").absolute()`."""


MAX_CELL = 2**24
"""Characters in one cell of a CSV file: a quote that is never closed is noticed after no more than this."""


PARQUET_BATCH = 1024
"""Rows of a Parquet file that are in memory at a time."""


class BadRow(DataError):
    """A row that cannot be used: `where` it stands ("FILE:LINE"), the `reason`, and the `row` itself: a mapping, or
    its text if that is what cannot be parsed."""

    def __init__(self, where: str, reason: str, row: Mapping[str, Any] | str) -> None:
        super().__init__(where, reason, row)
        self.where, self.reason, self.row = where, reason, row

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Rows: TypeAlias = Iterator[tuple[str, dict[str, Any]]]


OnError: TypeAlias = Callable[[BadRow], None]
"""Called with each bad row instead of raising; reading goes on after it."""


def raise_it(error: BadRow) -> None:
    """The `OnError` that stops at the first bad row."""
    raise error


class RejectFile:
    """An `OnError` that appends each bad row to `path`, one JSON object a line: `where`, `reason` and `row` (shortened
    text, if JSON cannot hold it).

    The file of an earlier run goes; a new one is there from the first bad row on, and complete after each: a crash
    loses none. `count` says how many there were.

    Raises:
        DataError: at once, if `path` is something else than such a file, which is then left alone.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        if path.is_dir() or (path.is_file() and not _holds_rejects(path)):
            raise DataError(f"{path} is there and holds no rejected rows: name another file for those of this run")
        if path.is_file():
            path.unlink()

    def __call__(self, error: BadRow) -> None:
        """Append the row of `error`."""
        line = {"where": error.where, "reason": error.reason, "row": error.row}
        try:
            content = json.dumps(line, ensure_ascii=False, default=repr, allow_nan=False)
        except (ValueError, RecursionError):  # infinity, or nested so deep: the row as Python shows it, then
            content = json.dumps({**line, "row": reprlib.repr(error.row)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(content + "\n")
        self.count += 1


def _holds_rejects(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(10)
    return start in (b"", b'{"where": ')


def is_stream(source: Path) -> bool:
    """Whether `source` can be read only once: standard input or a pipe, such as the shell's `<(zcat docs.jsonl.gz)`."""
    return source == STDIN or (os.path.exists(source) and not os.path.isfile(source) and not os.path.isdir(source))


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    """The bytes of a file (unpacked, if its name ends in `.gz`) or of standard input."""
    if path == STDIN:
        if sys.stdin is None:
            raise DataError("stdin is closed")
        yield sys.stdin.buffer
        return
    try:
        opened = gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: a folder, where a file is expected") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    try:
        with opened as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: no gzip file, or a damaged one ({error})") from error


def text_of(raw: bytes) -> str:
    """A line as text for messages: bytes that are not UTF-8 are escaped."""
    return raw.decode(errors="backslashreplace").rstrip("\r\n")


def read_jsonl(path: Path, on_error: OnError | None = None) -> Rows:
    """Yield ("FILE:LINE", object) for each non-blank line of a file, a `*.gz` file or standard input (`-`).

    Raises:
        DataError: the file is missing, damaged or not UTF-8, or a line is no JSON object (a `BadRow`).
    """
    return read_lines(path, on_error or raise_it, parse_object)


def read_lines(path: Path, on_error: OnError, parse: Callable[[bytes], dict[str, Any]]) -> Rows:
    """Yield ("FILE:LINE", row) for each non-blank line; a `ValueError` of `parse` makes it a `BadRow`."""
    name = "stdin" if path == STDIN else path
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = parse(line)
            except ValueError as error:
                on_error(BadRow(where, str(error), text_of(line)))
                continue
            yield where, row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; a `ValueError` says why there is none."""
    try:
        row = json.loads(line, parse_constant=_no_constant)
        if rb"\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half of an escaped surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    return row


class _Record(NamedTuple):
    """A non-blank row of a table; `reason` says why it cannot be used. One that cannot be parsed has no cells."""

    where: str
    text: str
    cells: list[str]
    reason: str = ""
    lines: int = 1


def _read_table(path: Path, on_error: OnError) -> Rows:
    with open_bytes(path) as file:
        records = (_tsv_records if suffix_of(path) == ".tsv" else _csv_records)(path, file)
        columns = _header(path, next(records, None))
        for record in records:
            if record.reason or len(record.cells) != len(columns):
                reason = record.reason or f"expected {len(columns)} cells, found {len(record.cells)}"
                bad = BadRow(record.where, reason, record.text)
                if record.lines > 1 and len(record.cells) != len(columns):  # good rows may be among the lines
                    raise DataError(
                        f"{bad}, in a row of {record.lines} lines. A wrong quote may have joined rows, so they are "
                        "never skipped: mend the quotes"
                    )
                on_error(bad)
                continue
            fields = zip(columns, record.cells, strict=True)
            # the column without a name: row numbers, as pandas writes them
            yield record.where, {name: cell for name, cell in fields if name and (cell or name == "text")}


def _header(path: Path, record: _Record | None) -> list[str]:
    """The names of the columns; a header that cannot be read is no row to skip."""
    if record is not None and record.reason:
        raise BadRow(record.where, record.reason, record.text)
    columns = record.cells if record is not None else []
    _check_columns(path, columns)
    return columns


def _tsv_records(path: Path, file: Iterable[bytes]) -> Iterator[_Record]:
    """Each line, split at tabs. Quotes are characters like any other: data sets in this format do not quote."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            yield _Record(where, text_of(line), [], f"not valid UTF-8 ({error})")
        else:
            yield _Record(where, text, text.split("\t"))


def _csv_records(path: Path, file: BinaryIO | gzip.GzipFile) -> Iterator[_Record]:
    """Rows as RFC 4180 has them: a quoted cell may hold line ends."""
    csv.field_size_limit(max(MAX_CELL, csv.field_size_limit()))  # one setting for the process: never lowered
    buffer = io.BufferedReader(cast(io.RawIOBase, file))  # `readinto` is all that it needs
    newline = "\n" if b"\n" in buffer.peek() else ""  # without one, lines may end in "\r", as on old Macs
    taken: list[str] = []  # the lines of the row at hand
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        for line in text:
            taken.append(line)
            yield line
        ended = True

    with io.TextIOWrapper(buffer, "utf-8-sig", "surrogateescape", newline=newline) as text:
        reader = csv.reader(lines(), strict=True)
        number = 1
        while True:
            start, cells, reason = number, list[str](), ""
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = f"not valid CSV ({error})"
                if ended:
                    *_, last = next(csv.reader(taken))  # what follows the quote, without `strict`
                    start += "".join(taken).count("\n") - last.count("\n")
                    reason = "a quote that opens here is never closed"
            raw = "".join(taken).encode(errors="surrogateescape")
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                reason = reason or f"not valid UTF-8 ({error})"
            if raw.strip():
                yield _Record(f"{path}:{start}", text_of(raw), cells, reason, len(taken))
            number += len(taken)
            taken.clear()


def _read_parquet(path: Path, on_error: OnError) -> Rows:
    number = 0
    for batch in _parquet_batches(path):
        for scalars in zip(*batch.columns, strict=True):
            number += 1
            where, row, problems = f"{path}:{number}", {}, []
            for name, scalar in zip(batch.schema.names, scalars, strict=True):
                try:
                    value = _plain(scalar.as_py())
                except (ValueError, OverflowError) as error:
                    problems.append(f"column {name!r}: {error}")
                    continue
                if value is not None:
                    row[name] = value
            if problems:
                on_error(BadRow(where, "; ".join(problems), row))
            else:
                yield where, row


def _parquet_batches(path: Path) -> Iterator[Any]:
    """Yield record batches, with time stamps in microseconds: what Python and Qdrant know."""
    parquet = import_extra("pyarrow.parquet", "parquet")
    arrow = import_extra("pyarrow", "parquet")
    with open_bytes(path):  # says what is wrong in our words
        pass
    try:
        # by default a row group is read whole, and a file may be one row group
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            _check_columns(path, file.schema_arrow.names)
            schema = file.schema_arrow
            for place, field in enumerate(schema):
                if arrow.types.is_timestamp(field.type) and field.type.unit == "ns":
                    schema = schema.set(place, field.with_type(arrow.timestamp("us", field.type.tz)))
            for batch in file.iter_batches(PARQUET_BATCH):
                yield batch.cast(schema, safe=False)
    except (arrow.ArrowException, OSError, UnicodeError) as error:  # the last: names of columns
        found = " ".join(str(error).split())  # Arrow writes several lines
        raise DataError(f"{path}: no Parquet file, or a damaged one ({found})") from error


def _plain(value: Any) -> Any:
    """A value of a Parquet column as JSON has it; NaN is None."""
    match value:
        case None | bool() | int() | str():
            return value
        case float() if not math.isinf(value):
            return None if math.isnan(value) else value
        case Decimal():
            return float(value) if value.as_tuple().exponent else int(value)
        case date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case UUID():
            return str(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {name: _plain(item) for name, item in value.items()}
    raise ValueError(f"JSON has no {reprlib.repr(value)}: leave the column out or write it as text")


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    names = [name for name in columns if name]
    if "text" not in names or not {"_id", "id"} & set(names) or len(set(names)) < len(names):
        raise DataError(
            f'{path}: expected columns of different names, "text" and "_id" (or "id") among them, found {columns!r}'
        )


READERS: Mapping[str, Callable[[Path, OnError], Rows]] = {
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
"""How a file is read, by the end of its name (a `.gz` after it left aside); any other is JSON lines."""


def suffix_of(path: Path) -> str:
    """`.csv` for `docs.CSV.gz`: what tells the format."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(source: Path, on_error: OnError | None = None) -> Rows:
    """Yield ("FILE:LINE", fields) for each row of a corpus, a few at a time in memory. `source` is one of

    - `*.parquet` (LINE is the row, from 1; needs the extra `parquet`): nulls and NaN are absent fields; times are
      ISO 8601 to the microsecond, durations seconds, decimals numbers (whole ones integers, others floats), maps lists
      of pairs; nested lists and structs stay;
    - `*.csv` or `*.tsv`: UTF-8 with a header line; CSV quotes as RFC 4180 has it, TSV not at all: a tab ends a cell, a
      line end ends the row; every value is a string, an empty cell an absent field (of `text`, an empty text), a column
      without a name is left out;
    - a BEIR folder, whose `corpus.jsonl` is read;
    - `-`: standard input, as JSON lines;
    - any other file or pipe: JSON lines. Standard input and pipes (`is_stream`) are empty when they are read again.

    All but Parquet may be packed: `*.jsonl.gz`, `*.csv.gz`.

    Raises:
        DataError: a file that is missing, damaged or without the columns `text` and `_id` (or `id`); a row that cannot
            be parsed, has a cell too many or too few, or holds what JSON cannot, such as bytes (a `BadRow`). A bad CSV
            row of several lines is raised in spite of `on_error`: a wrong quote may have made it of many good rows.
        MissingExtraError: a Parquet file, and pyarrow is not installed.
    """
    path = corpus_file(source)
    return READERS.get(suffix_of(path), read_jsonl)(path, on_error or raise_it)


def corpus_file(source: Path) -> Path:
    """The file of `source`: itself, or the `corpus.jsonl` of a BEIR folder."""
    return beir_file(source, "corpus.jsonl")


def beir_file(source: Path, name: str) -> Path:
    """The file of that name in the folder `source`, or its `*.gz` if that is there alone; `source`, if it is a file."""
    if not os.path.isdir(source):  # unlike a path's own method it raises nothing
        return source
    plain, packed = source / name, source / f"{name}.gz"
    return packed if packed.is_file() and not plain.exists() else plain
