"""Make documents and queries from rows, and check them.

Both have the fields `_id` (or `id`) and `text`. A document may have a `title`. Every other field is payload.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from d2llm.bad_rows import BadRow, OnError, raise_it, stated_id
from d2llm.errors import DataError
from d2llm.payload import check_document
from d2llm.readers import (
    READERS,
    Rows,
    beir_file,
    corpus_file,
    parse_object,
    read_jsonl,
    read_lines,
    read_rows,
    suffix_of,
)
from d2llm.types import Document, StrPath

logger = logging.getLogger(__name__)


def parse_document(row: Mapping[str, Any], where: str, *, keep_empty: bool = False) -> Document:
    """Make a `Document` from a mapping. `where` is its place, which starts every message.

    Raises:
        BadRow: a field is missing or wrong, no index can store the document (`check_document`), or it has neither text
            nor title (allowed with `keep_empty`).
    """
    payload, id_ = dict(row), stated_id(row)
    stated = payload.pop("_id", None)
    stated = payload.pop("id", None) if stated is None else stated
    text, title = payload.pop("text", None), payload.pop("title", None) or ""
    if id_ is None:
        reason = f'expected an "_id" (or "id") that is a non-empty string or an integer, found {stated!r}'
        raise BadRow(where, reason, row)
    for name, value in (("text", text), ("title", title)):
        if not isinstance(value, str):
            raise BadRow(where, f'document {id_!r}: expected "{name}" to be a string, found {value!r}', row)
    if not (keep_empty or text.strip() or title.strip()):
        raise BadRow(where, f"document {id_!r} is empty: neither text nor title", row)
    document = Document(id_, text, title, payload)
    try:
        check_document(document)
    except DataError as error:
        raise BadRow(where, str(error), row) from error
    return document


def read_documents(source: StrPath, on_error: OnError | None = None, *, keep_empty: bool = False) -> Iterator[Document]:
    """Yield the documents of a corpus, in any of the formats of `read_rows`.

    Ids are unique. With `keep_empty`, a document may have neither text nor title.

    Raises:
        DataError: see `read_rows`.
        BadRow: see `read_rows`; also a missing field, an empty document, or an id that an earlier row has.
    """
    reject = on_error or raise_it
    return _documents(read_rows(Path(source), reject), reject, keep_empty)


def _documents(rows: Rows, reject: OnError, keep_empty: bool) -> Iterator[Document]:
    seen: set[int] = set()  # 64-bit digests, not ids: about 60 bytes a document, however long the ids are
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
    """Read a whole corpus. Returns `{id: document}`, and the ids of the empty documents, which are left out.

    A document is empty if it has neither text nor title: real data sets have some. A warning says how many.

    Raises:
        DataError: see `read_documents`.
    """
    documents = {document.id: document for document in read_documents(source, keep_empty=True)}
    empty = frozenset(id_ for id_, document in documents.items() if not document.content.strip())
    if empty:
        logger.warning("%s: %d of %d documents are empty and left out", corpus_file(source), len(empty), len(documents))
    return {id_: document for id_, document in documents.items() if id_ not in empty}, empty


def read_contents(source: Path | None) -> list[str]:
    """Return the contents of the passages of a corpus, as `read_corpus` reads it, or none without a corpus.

    Raises:
        DataError: the corpus has no passage.
    """
    contents = [] if source is None else [document.content for document in read_corpus(source)[0].values()]
    if source is not None and not contents:
        raise DataError(f"{source} has no passages: give a corpus, or none")
    return contents


def read_queries(source: Path, *, keep_empty: bool = False, numbered: bool = False) -> dict[str, str]:
    """Read queries with their ids, `{id: text}`, in any of the formats of `read_query_log`.

    With `numbered`, a query without an id has the number of its line in the file, from 1; in Parquet, of its row.

    Raises:
        DataError: a row fails a check of `read_documents`, such as unique ids.
    """
    rows = _query_rows(source)
    if numbered:
        rows = ((where, {"id": where.rpartition(":")[2], **row}) for where, row in rows)
    return {document.id: document.text for document in _documents(rows, raise_it, keep_empty)}


def read_query_log(source: Path) -> list[str]:
    """Read the texts of queries, in their order and without duplicates.

    `source` is one of

    - a text file with one query a line;
    - a file of JSON lines with the field `text` (or `query`): its first line begins with a brace, or its name ends in
      `.jsonl`, `.ndjson` or `.json`;
    - CSV, TSV or Parquet, as `read_rows` reads it;
    - a BEIR folder: its `queries.jsonl` is read.

    Ids are not needed. Empty queries are left out; a warning gives the number of rows with an empty query.

    Raises:
        DataError: the file is missing or has no query, or a line is broken or has no text (names the line).
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
    path = beir_file(source, "queries.jsonl")
    json_lines = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_jsonl}
    read = {**READERS, **json_lines}.get(suffix_of(path), _read_json_or_text)
    for where, row in read(path, raise_it):
        yield where, row if "text" in row or "query" not in row else {**row, "text": row["query"]}


def _read_json_or_text(path: Path, on_error: OnError) -> Rows:
    """Read JSON lines if the first line begins with a brace, otherwise lines of text."""
    parse: Callable[[bytes], dict[str, Any]] | None = None

    def parse_as_first(line: bytes) -> dict[str, Any]:
        nonlocal parse
        if parse is None:
            parse = parse_object if line.lstrip().startswith(b"{") else _parse_text
        return parse(line)

    return read_lines(path, on_error, parse_as_first)


def _parse_text(line: bytes) -> dict[str, Any]:
    try:
        return {"text": line.decode().strip()}
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 ({error})") from error
