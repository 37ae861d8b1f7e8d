"""Files of documents, queries, judgements, runs and pairs. Errors name the file, the line and what was expected.

Documents and queries have `_id` (or `id`) and `text`; documents may have a `title`, and every other field is payload.
They come as JSON lines, Parquet, CSV or TSV (`read_rows`). A BEIR folder holds `corpus.jsonl`, `queries.jsonl` and
`qrels/SPLIT.tsv`, each of which may be packed (`corpus.jsonl.gz`).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import logging
import math
import os
import re
import reprlib
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast
from uuid import UUID

from d2llm.errors import DataError, import_extra
from d2llm.metrics import itself
from d2llm.payload import check_document
from d2llm.types import Document

logger = logging.getLogger(__name__)

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


def _stop(error: BadRow) -> None:
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
def _open(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
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


def _text_of(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace").rstrip("\r\n")


def read_jsonl(path: Path, on_error: OnError | None = None) -> Rows:
    """Yield ("FILE:LINE", object) for each non-blank line of a file, a `*.gz` file or standard input (`-`).

    Raises:
        DataError: the file is missing, damaged or not UTF-8, or a line is no JSON object (a `BadRow`).
    """
    return _read_lines(path, on_error or _stop, _parse_object)


def _read_lines(path: Path, on_error: OnError, parse: Callable[[bytes], dict[str, Any]]) -> Rows:
    name = "stdin" if path == STDIN else path
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = parse(line)
            except ValueError as error:
                on_error(BadRow(where, str(error), _text_of(line)))
                continue
            yield where, row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _parse_object(line: bytes) -> dict[str, Any]:
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
    with _open(path) as file:
        records = (_tsv_records if _suffix(path) == ".tsv" else _csv_records)(path, file)
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
            yield _Record(where, _text_of(line), [], f"not valid UTF-8 ({error})")
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
                yield _Record(f"{path}:{start}", _text_of(raw), cells, reason, len(taken))
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
    with _open(path):  # says what is wrong in our words
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


def _suffix(path: Path) -> str:
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
    return READERS.get(_suffix(path), read_jsonl)(path, on_error or _stop)


def parse_document(row: Mapping[str, Any], where: str, *, keep_empty: bool = False) -> Document:
    """Make a `Document` of a mapping; `where` starts the message of the `BadRow` if a field is missing or wrong, if no
    index can store the document (`check_document`), or if there is neither text nor title and such documents are not to
    be kept."""
    rest = dict(row)
    id_ = rest.pop("_id", None)
    id_ = rest.pop("id", None) if id_ is None else id_
    text, title = rest.pop("text", None), rest.pop("title", None) or ""
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)
    if not isinstance(id_, str) or not id_:
        raise BadRow(where, f'expected an "_id" (or "id") that is a non-empty string or an integer, found {id_!r}', row)
    for name, value in (("text", text), ("title", title)):
        if not isinstance(value, str):
            raise BadRow(where, f'document {id_!r}: expected "{name}" to be a string, found {value!r}', row)
    if not (keep_empty or text.strip() or title.strip()):
        raise BadRow(where, f"document {id_!r} is empty: neither text nor title", row)
    document = Document(id_, text, title, rest)
    try:
        check_document(document)
    except DataError as error:
        raise BadRow(where, str(error), row) from error
    return document


def corpus_file(source: Path) -> Path:
    """The file of `source`: itself, or the `corpus.jsonl` of a BEIR folder."""
    return _beir_file(source, "corpus.jsonl")


def _beir_file(source: Path, name: str) -> Path:
    """The file of that name in the folder `source`, or its `*.gz` if that is there alone; `source`, if it is a file."""
    if not os.path.isdir(source):  # unlike a path's own method it raises nothing
        return source
    plain, packed = source / name, source / f"{name}.gz"
    return packed if packed.is_file() and not plain.exists() else plain


def read_documents(source: Path, on_error: OnError | None = None, *, keep_empty: bool = False) -> Iterator[Document]:
    """Yield the documents of a corpus: JSON lines, Parquet, CSV, TSV, a BEIR folder or standard input, as `read_rows`
    reads them; ids are unique. With `keep_empty` a document may have neither text nor title.

    Raises:
        DataError: what `read_rows` raises.
        BadRow: also for a missing field, an empty text, an id that was seen before.
    """
    reject = on_error or _stop
    return _documents(read_rows(source, reject), reject, keep_empty)


def _documents(rows: Rows, reject: OnError, keep_empty: bool) -> Iterator[Document]:
    seen: set[int] = set()  # 64-bit digests, not ids: some 60 bytes a document, whatever the ids look like
    for where, row in rows:
        try:
            document = parse_document(row, where, keep_empty=keep_empty)
            key = int.from_bytes(hashlib.blake2b(document.id.encode(), digest_size=8).digest())
            if key in seen:
                raise BadRow(where, f"duplicate id {document.id!r}: an earlier line has it too", row)
        except BadRow as error:
            reject(error)
            continue
        seen.add(key)
        yield document


def read_corpus(source: Path) -> tuple[dict[str, Document], frozenset[str]]:
    """All documents of a corpus by their ids, and the ids of those that are left out because they have neither text nor
    title: real data sets have some. A warning says how many.

    Raises:
        DataError: what `read_documents` raises.
    """
    documents = {document.id: document for document in read_documents(source, keep_empty=True)}
    empty = frozenset(id_ for id_, document in documents.items() if not document.content.strip())
    if empty:
        logger.warning("%s: %d of %d documents are empty and left out", corpus_file(source), len(empty), len(documents))
    return {id_: document for id_, document in documents.items() if id_ not in empty}, empty


def read_queries(source: Path, *, keep_empty: bool = False) -> dict[str, str]:
    """Queries of a file or of a BEIR folder's `queries.jsonl`, `{id: text}`: in the formats of `read_query_log`, with
    the checks of `read_documents`, ids among them."""
    rows = _query_rows(source)
    return {document.id: document.text for document in _documents(rows, _stop, keep_empty)}


def read_query_log(source: Path) -> list[str]:
    """The texts of queries, each once, in their order. `source` is one of

    - a text file with a query on each line;
    - a file of JSON lines with `text` (or `query`): one whose first line begins with a brace, or `*.jsonl`, `*.ndjson`,
      `*.json`;
    - CSV, TSV or Parquet, as `read_rows` reads them;
    - a BEIR folder, whose `queries.jsonl` is read.

    Ids are not needed. Empty queries are left out; of those in rows a warning says how many there are.

    Raises:
        DataError: no such file, a broken line, a row without text (names the line), no query at all.
    """
    texts, empty = dict[str, None](), 0
    for where, row in _query_rows(source):
        text = row.get("text")
        if not isinstance(text, str):
            raise DataError(f'{where}: expected "text" (or "query") to be a string, found {text!r}')
        if text.strip():
            texts[text] = None
        else:
            empty += 1
    if empty:
        logger.warning("%s: %d empty queries are left out", source, empty)
    if not texts:
        raise DataError(f"{source}: no queries")
    return list(texts)


def _query_rows(source: Path) -> Rows:
    path = _beir_file(source, "queries.jsonl")
    json_lines = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_jsonl}
    read = {**READERS, **json_lines}.get(_suffix(path), _read_json_or_text)
    for where, row in read(path, _stop):
        yield where, row if "text" in row or "query" not in row else {**row, "text": row["query"]}


def _read_json_or_text(path: Path, on_error: OnError) -> Rows:
    """JSON lines, if the first one looks like it, or else lines of text."""
    parse: Callable[[bytes], dict[str, Any]] | None = None

    def parse_as_first(line: bytes) -> dict[str, Any]:
        nonlocal parse
        if parse is None:
            parse = _parse_object if line.lstrip().startswith(b"{") else _parse_text
        return parse(line)

    return _read_lines(path, on_error, parse_as_first)


def _parse_text(line: bytes) -> dict[str, Any]:
    try:
        return {"text": line.decode().strip()}
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 ({error})") from error


JUDGED = {3: "query-id<TAB>corpus-id<TAB>score", 4: "query-id 0 corpus-id score"}
"""The two forms of a judgement, by the number of columns: BEIR's and TREC's."""


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Judgements, `{query id: {document id: score}}`, of a file (or a `*.gz` file) in one of the two forms of `JUDGED`.

    Tabs separate the columns, or else white space does. The first line is a header if it has no digit in ids and score.
    Scores are whole numbers, also written as `1.0`. A negative one counts as 0 in all measures: not relevant.

    Raises:
        DataError: no such file, a line of another form, a document judged twice for a query, with different scores.
    """
    qrels: dict[str, dict[str, int]] = {}
    width = 0
    for count, (where, line) in enumerate(_lines(path)):
        cells = line.split(b"\t")
        if len(cells) not in JUDGED:
            cells = line.split()
        if count == 0 and len(cells) in JUDGED and not re.search(rb"\d", b"".join([cells[0], *cells[-2:]])):
            continue
        width = width or len(cells)
        try:
            query, document, score = _parse_judged(cells, width)
        except ValueError as error:
            form = JUDGED.get(width) or " or ".join(JUDGED.values())
            raise DataError(f"{where}: expected {form}, with a whole score, found {_text_of(line)!r}") from error
        earlier = qrels.setdefault(query, {}).setdefault(document, score)
        if earlier != score:
            raise DataError(
                f"{where}: document {document!r} is judged twice for query {query!r}: {earlier} and {score}"
            )
    return qrels


def _parse_judged(cells: Sequence[bytes], width: int) -> tuple[str, str, int]:
    query, document, score = (cell.decode() for cell in (cells[0], *cells[-2:]))
    whole = re.fullmatch(r"\s*([+-]?[0-9]{1,6})(\.0*)?\s*", score)
    if len(cells) != width or width not in JUDGED or not (query.strip() and document.strip() and whole):
        raise ValueError(score)
    return query, document, int(whole[1])


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("FILE:LINE", line) for each non-blank line of a text file, without line end and byte-order mark."""
    with _open(path) as file:
        lines = file.read().removeprefix(codecs.BOM_UTF8).splitlines()
    return ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """A BEIR folder with one split's judgements; `queries` are those that the split judges."""

    documents: dict[str, Document]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    empty: frozenset[str] = frozenset()
    """Ids of the corpus without a text. Nothing finds them, but `qrels` may judge them, as published figures do."""

    @classmethod
    def load(cls, folder: Path, split: str) -> RetrievalData:
        """Read `folder`; a `DataError` says what is missing, or which judged query has no text."""
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no folder, expected one with corpus.jsonl, queries.jsonl, qrels/{split}.tsv")
        judgements, asked = (_beir_file(folder, name) for name in (f"qrels/{split}.tsv", "queries.jsonl"))
        qrels = read_qrels(judgements)
        texts = read_queries(folder, keep_empty=True)
        documents, empty = read_corpus(folder)
        for query, judged in qrels.items():
            if not texts.get(query, "").strip():
                fault = f"is empty in {asked.name}" if query in texts else f"{asked.name} does not have"
                raise DataError(f"{judgements} judges query {query!r}, which {fault}")
            missing = next((id_ for id_ in judged if id_ not in documents and id_ not in empty), None)
            if missing is not None:
                raise DataError(f"{judgements} judges {missing!r}, which {corpus_file(folder).name} does not have")
        if not qrels or not documents:
            raise DataError(f"{folder}: {len(documents)} documents and {len(qrels)} judged queries in split {split!r}")
        return cls(documents, {query: texts[query] for query in qrels}, qrels, empty)


def read_run(path: Path, data: RetrievalData) -> dict[str, dict[str, float]]:
    """A TREC run file (`query-id Q0 document-id rank score tag`), `{query id: {document id: score}}`.

    As in trec_eval the score orders the documents; the rank is not read. The document that is the query `itself` is
    left out. A judged query that the file lacks counts as
    one without results, and a warning says how many do.

    Raises:
        DataError: no such file, a line of another form, a document ranked twice, a query or document that `data` lacks.
    """
    run: dict[str, dict[str, float]] = {}
    for where, line in _lines(path):
        query, document, score = _parse_ranked(line, where)
        if query not in data.qrels:
            raise DataError(f"{where}: query {query!r} is none of the {len(data.qrels)} judged queries")
        if document not in data.documents and document not in data.empty:
            raise DataError(f"{where}: document {document!r} is not in the corpus")
        if document in run.setdefault(query, {}):
            raise DataError(f"{where}: document {document!r} is ranked twice for query {query!r}")
        run[query][document] = score
    for query, ranked in run.items():
        ranked.pop(itself(query, data.qrels) or "", None)
    if len(run) < len(data.qrels):
        logger.warning("%s ranks %d of %d judged queries: the others count as 0", path, len(run), len(data.qrels))
    return run


def _parse_ranked(line: bytes, where: str) -> tuple[str, str, float]:
    try:
        query, _, document, _, text, _ = (part.decode() for part in line.split())
        score = float(text)
        if not math.isfinite(score):
            raise ValueError(text)  # it orders nothing
    except ValueError as error:
        found = line.decode(errors="replace")
        raise DataError(f"{where}: expected query-id Q0 document-id rank score tag, found {found!r}") from error
    return query, document, score


def write_run(path: Path, run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Write a TREC run file, each query's documents by descending score.

    Raises:
        DataError: an id with white space in it, which the format cannot hold.
    """
    lines = []
    for query, documents in run.items():
        for rank, document in enumerate(sorted(documents, key=lambda id_: -documents[id_]), 1):
            line = f"{query} Q0 {document} {rank} {documents[document]} {tag}"
            if len(line.split()) != 6:
                raise DataError(f"{path}: a run file cannot hold ids with white space: {query!r}, {document!r}")
            lines.append(line)
    write_lines(path, lines)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file, whole or not at all, in the place of an earlier one; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as staging:
        file = Path(staging) / path.name
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        file.replace(path)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts and the judgement of the pair, one of two: a similarity `score`, or a `label`: entailment or not."""

    text_a: str
    text_b: str
    score: float | None = None
    label: bool | None = None


LABELS = {
    "entailment": True,
    "neutral": False,
    "contradiction": False,
    "true": True,
    "false": False,
    "1": True,
    "0": False,
}
"""What a label may be, in any case: `true`, `false`, 1 and 0 also without quotes."""


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a JSONL file: `text_a`, `text_b`, and on every line a `score` (a number) or on every line a `label`.

    Raises:
        DataError: no such file, no pairs, an empty text, a judgement that is none or an unknown word, or of the other
            kind than the lines before.
    """
    pairs: list[Pair] = []
    for where, row in read_jsonl(path):
        texts = [row.get("text_a"), row.get("text_b")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f'{where}: expected non-empty strings "text_a" and "text_b", found {texts!r}')
        if ("score" in row) == ("label" in row):
            raise DataError(f'{where}: expected either a "score" or a "label", found {sorted(row)}')
        pair = Pair(row["text_a"], row["text_b"], *_parse_judgement(row, where))
        if pairs and (pair.score is None) != (pairs[0].score is None):
            kinds = ("score", "label") if pair.label is None else ("label", "score")
            raise DataError(f'{where}: this pair has a "{kinds[0]}", those before it have a "{kinds[1]}"')
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{path}: no pairs")
    return pairs


def _parse_judgement(row: Mapping[str, Any], where: str) -> tuple[float | None, bool | None]:
    if "score" in row:
        score = row["score"]
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise DataError(f'{where}: expected "score" to be a number, found {score!r}')
        return float(score), None
    word = str(row["label"]).lower()
    if word not in LABELS:
        raise DataError(f"{where}: unknown label {row['label']!r}: known are {', '.join(LABELS)}")
    return None, LABELS[word]
