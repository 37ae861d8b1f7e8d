"""Read rows from JSON lines, Parquet, CSV and TSV files, compressed or not, from standard input, and from folders.

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

from d2llm.bad_rows import BadRow, OnError, raise_it
from d2llm.errors import DataError, import_extra
from d2llm.text_files import holds_documents, read_files

UTF16 = "is UTF-16: convert it (iconv -f UTF-16 -t UTF-8 OLD > NEW)"
NOT_UTF8 = {
    b"\x1f\x8b": "is gzipped: add .gz to its name",
    codecs.BOM_UTF16_LE: UTF16,
    codecs.BOM_UTF16_BE: UTF16,
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it (unzstd), or use gzip",
    b"BZh": "is compressed by bzip2: unpack it (bunzip2), or use gzip",
    b"PK\x03\x04": "is a ZIP file, as .docx, .xlsx and .epub are: convert it to JSON lines, CSV, TSV, Parquet, or to "
    "text, Markdown, HTML or PDF",
}
"""What a file is that begins with these bytes."""
STDIN = Path("-")
"""The path that means standard input. For a file named `-`, pass `Path("-").absolute()`."""


MAX_CELL = 2**24
"""The largest cell of a CSV file, in characters. A quote that is never closed is noticed after this many."""


PARQUET_BATCH = 1024
"""How many rows of a Parquet file are in memory at a time."""


Rows: TypeAlias = Iterator[tuple[str, dict[str, Any]]]
"""Pairs of a place ("FILE:LINE") and a row."""


def is_stream(source: Path) -> bool:
    """Return whether `source` can be read only once.

    This holds for standard input and for pipes, such as the shell's `<(zcat docs.jsonl.gz)`.
    """
    return source == STDIN or (os.path.exists(source) and not os.path.isfile(source) and not os.path.isdir(source))


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    """Open a file or standard input for reading bytes. A file whose name ends in `.gz` is decompressed.

    Raises:
        DataError: the file is missing, is a folder, cannot be read, or is not what its name says.
    """
    if path == STDIN:
        if sys.stdin is None:
            raise DataError("stdin is closed: pipe the rows into the command, or name a file")
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
            start = file.peek(4)
            for magic, reason in NOT_UTF8.items():
                if start.startswith(magic):
                    raise DataError(f"{path}: {reason}")
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a gzip file, or damaged ({error})") from error


def text_of(raw: bytes) -> str:
    """Decode a line for a message. Bytes that are not UTF-8 are escaped."""
    return raw.decode(errors="backslashreplace").rstrip("\r\n")


def read_jsonl(path: Path, on_error: OnError | None = None) -> Rows:
    """Yield ("FILE:LINE", object) for each non-blank line of a file, a `*.gz` file or standard input (`-`).

    Raises:
        DataError: the file is missing or damaged.
        BadRow: a line is not UTF-8 or not a JSON object.
    """
    return read_lines(path, on_error or raise_it, parse_object)


def read_lines(path: Path, on_error: OnError, parse: Callable[[bytes], dict[str, Any]]) -> Rows:
    """Yield ("FILE:LINE", `parse(line)`) for each non-blank line of a file.

    If `parse` raises a `ValueError`, `on_error` gets the line as a `BadRow`.
    """
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
    raise ValueError(f"{name} is not a JSON number")


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a line that holds one JSON object.

    Raises:
        ValueError: the line is not JSON, or the value is not an object.
    """
    try:
        row = json.loads(line, parse_constant=_no_constant)
        if rb"\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # fails if a string holds half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    return row


class _Record(NamedTuple):
    """A non-blank row of a CSV or TSV file.

    `lines` is the number of lines that the row covers. `reason` says why the row cannot be used. A row that cannot be
    parsed has no cells.
    """

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
                if record.lines > 1 and len(record.cells) != len(columns):  # some of the lines may be good rows
                    raise DataError(
                        f"{bad}, in a row of {record.lines} lines. A wrong quote may have joined several rows, so this "
                        "row is never skipped: correct the quotes"
                    )
                on_error(bad)
                continue
            fields = zip(columns, record.cells, strict=True)
            # A column without a name is left out: pandas writes row numbers into it.
            yield record.where, {name: cell for name, cell in fields if name and (cell or name == "text")}


def _header(path: Path, record: _Record | None) -> list[str]:
    """Return the column names.

    Raises:
        BadRow: the header cannot be read. It is never skipped.
        DataError: the columns are not the expected ones.
    """
    if record is not None and record.reason:
        raise BadRow(record.where, record.reason, record.text)
    columns = record.cells if record is not None else []
    _check_columns(path, columns)
    return columns


def _tsv_records(path: Path, file: Iterable[bytes]) -> Iterator[_Record]:
    """Yield each line, split at tabs. Quotes have no meaning, since data sets in this format do not quote."""
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
    """Yield rows as RFC 4180 defines them: a quoted cell may hold line ends."""
    csv.field_size_limit(max(MAX_CELL, csv.field_size_limit()))  # the limit is global to the process: never lower it
    buffer = io.BufferedReader(cast(io.RawIOBase, file))  # needs `readinto` alone, which `file` has
    newline = "\n" if b"\n" in buffer.peek() else ""  # a file without "\n" may end its lines in "\r", as on old Macs
    row_lines: list[str] = []  # the lines of the current row
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        for line in text:
            row_lines.append(line)
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
                    *_, last = next(csv.reader(row_lines))  # without `strict`, the last cell is all after the quote
                    start += "".join(row_lines).count("\n") - last.count("\n")
                    reason = "a quote that opens here is never closed"
            raw = "".join(row_lines).encode(errors="surrogateescape")
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                reason = reason or f"not valid UTF-8 ({error})"
            if raw.strip():
                yield _Record(f"{path}:{start}", text_of(raw), cells, reason, len(row_lines))
            number += len(row_lines)
            row_lines.clear()


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
    """Yield record batches. Time stamps are cast to microseconds, the finest unit of Python and Qdrant."""
    parquet = import_extra("pyarrow.parquet", "parquet")
    arrow = import_extra("pyarrow", "parquet")
    with open_bytes(path):  # raises our own message if the file is missing
        pass
    try:
        # By default a whole row group is read at once, and a file may be a single row group.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            _check_columns(path, file.schema_arrow.names)
            schema = file.schema_arrow
            for place, field in enumerate(schema):
                if arrow.types.is_timestamp(field.type) and field.type.unit == "ns":
                    schema = schema.set(place, field.with_type(arrow.timestamp("us", field.type.tz)))
            for batch in file.iter_batches(PARQUET_BATCH):
                yield batch.cast(schema, safe=False)
    except (arrow.ArrowException, OSError, UnicodeError) as error:  # UnicodeError: a column name is not UTF-8
        reason = " ".join(str(error).split())  # Arrow writes several lines
        raise DataError(f"{path}: not a Parquet file, or damaged ({reason})") from error


def _plain(value: Any) -> Any:
    """Convert a value of a Parquet column to JSON's types. NaN becomes None.

    Raises:
        ValueError: JSON has no such value.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float() if not math.isinf(value):
            return None if math.isnan(value) else value
        case Decimal() if not value.as_tuple().exponent or Decimal(repr(float(value))) == value:  # no digit is lost
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
            f'{path}: expected columns with distinct names, including "text" and "_id" (or "id"), found {columns!r}'
        )


READERS: Mapping[str, Callable[[Path, OnError], Rows]] = {
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
"""The reader for each file suffix (`.gz` does not count). Any other file is read as JSON lines."""


def suffix_of(path: Path) -> str:
    """Return the suffix that names the format: `.csv` for `docs.CSV.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(source: Path, on_error: OnError | None = None) -> Rows:
    """Yield ("FILE:LINE", fields) for each row of a corpus, keeping only a few rows in memory.

    `source` is one of

    - a file `*.parquet`. LINE is the row number, from 1. Nulls and NaN become absent fields, times ISO 8601 strings to
      the microsecond, durations seconds, whole decimals integers, other decimals floats, maps lists of pairs. Nested
      lists and structs stay. Needs the extra `parquet`.
    - a file `*.csv` or `*.tsv` in UTF-8 with a header line. CSV is quoted as in RFC 4180. TSV is not quoted: a tab
      always ends a cell and a line end always ends the row. Every value is a string. An empty cell is an absent field,
      except that an empty `text` is an empty string. A column without a name is left out.
    - a BEIR folder: its `corpus.jsonl` is read.
    - any other folder, or a text, Markdown, HTML or PDF file: each file is a document, see `read_files`. The place is
      the path alone.
    - `-`: standard input, as JSON lines.
    - any other file or pipe: JSON lines.

    All formats but Parquet may be compressed: `*.jsonl.gz`, `*.csv.gz`. Standard input and pipes (`is_stream`) are
    empty when they are read a second time.

    Raises:
        DataError: the file is missing, damaged, or lacks the column `text` or `_id` (or `id`). Also a bad CSV row of
            several lines, even with `on_error`: a wrong quote may have joined many good rows.
        BadRow: a row cannot be parsed, has too many or too few cells, or holds a value that JSON lacks, such as bytes.
        MissingExtraError: the file is Parquet and pyarrow is not installed.
    """
    path, reject = corpus_file(source), on_error or raise_it
    if path == source and holds_documents(source):
        return read_files(path, lambda where, reason, row: reject(BadRow(where, reason, row)))
    return READERS.get(suffix_of(path), read_jsonl)(path, reject)


def corpus_file(source: Path) -> Path:
    """Return the `corpus.jsonl` of the BEIR folder `source`, or `source` itself if it is a file or any other folder."""
    path = beir_file(source, "corpus.jsonl")
    return path if os.path.lexists(path) else source


def beir_file(source: Path, name: str) -> Path:
    """Return the file `name` in the folder `source`, or `source` itself if it is a file.

    The compressed file (`name` with `.gz`) is chosen if the folder holds it and not the plain one.
    """
    if not os.path.isdir(source):  # Path.is_dir may raise
        return source
    plain, packed = source / name, source / f"{name}.gz"
    return packed if packed.is_file() and not plain.exists() else plain
