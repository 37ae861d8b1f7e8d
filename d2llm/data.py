"""Files of documents, queries, judgements and pairs. Errors name the file, the line and what was expected.

Documents and queries are JSON lines with `_id` (or `id`) and `text`; documents may have a `title`, and every other key
is payload. A BEIR folder holds `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from d2llm.errors import DataError
from d2llm.types import Document

OnError: TypeAlias = Callable[[DataError], None]
"""Called with each bad row instead of raising; reading goes on after it."""


def read_jsonl(path: Path, on_error: OnError | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE:LINE", object) for each non-blank line.

    Raises:
        DataError: the file is missing or not UTF-8, or a line is no JSON object.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
                if rb"\u" in line:
                    json.dumps(row, ensure_ascii=False).encode()  # half of an escaped surrogate pair is no text
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
            except (ValueError, UnicodeDecodeError) as error:
                problem = error if isinstance(error, DataError) else DataError(f"{where}: not valid JSON ({error})")
                if on_error is None:
                    raise problem from error
                on_error(problem)
                continue
            yield where, row


def parse_document(row: Mapping[str, Any], where: str) -> Document:
    """Make a `Document` of a mapping; `where` starts the message of the `DataError` if a field is missing or wrong."""
    rest = dict(row)
    id_ = rest.pop("_id", None)
    id_ = rest.pop("id", None) if id_ is None else id_
    text, title = rest.pop("text", None), rest.pop("title", None) or ""
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)
    if not isinstance(id_, str) or not id_:
        raise DataError(f'{where}: expected an "_id" (or "id") that is a non-empty string or an integer, found {id_!r}')
    for name, value in (("text", text), ("title", title)):
        if not isinstance(value, str):
            raise DataError(f'{where}: document {id_!r}: expected "{name}" to be a string, found {value!r}')
    if not (text.strip() or title.strip()):
        raise DataError(f"{where}: document {id_!r} is empty: neither text nor title")
    return Document(id_, text, title, rest)


def corpus_file(source: Path) -> Path:
    """The JSONL file of `source`: itself, or the `corpus.jsonl` of a BEIR folder."""
    return source / "corpus.jsonl" if source.is_dir() else source


def read_documents(source: Path, on_error: OnError | None = None) -> Iterator[Document]:
    """Yield the documents of a JSONL file or BEIR folder; ids are unique.

    Raises:
        DataError: a broken line, a missing field, an empty text, an id that was seen before.
    """
    path = corpus_file(source)
    seen: set[int] = set()  # 64-bit digests, not ids: some 60 bytes a document, whatever the ids look like
    for where, row in read_jsonl(path, on_error):
        try:
            document = parse_document(row, where)
            key = int.from_bytes(hashlib.blake2b(document.id.encode(), digest_size=8).digest())
            if key in seen:
                raise DataError(f"{where}: duplicate id {document.id!r}: an earlier line has it too")
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        seen.add(key)
        yield document


def read_queries(path: Path) -> dict[str, str]:
    """Queries of a JSONL file, `{id: text}`, with the checks of `read_documents`."""
    return {document.id: document.text for document in read_documents(path)}


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Judgements of a BEIR TSV (`query-id corpus-id score`, one header line), `{query id: {document id: grade}}`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if number == 1 or not line.strip():
            continue
        try:
            query, document, grade = line.decode().split("\t")
            qrels.setdefault(query, {})[document] = int(grade)
        except ValueError as error:
            found = line.decode(errors="replace")
            raise DataError(f"{path}:{number}: expected query-id<TAB>corpus-id<TAB>score, found {found!r}") from error
    return qrels


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """A BEIR folder with one split's judgements; `queries` are those that the split judges."""

    documents: dict[str, Document]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @classmethod
    def load(cls, folder: Path, split: str) -> RetrievalData:
        """Read `folder`; a `DataError` says what is missing, or which judged query has no text."""
        qrels = read_qrels(folder / "qrels" / f"{split}.tsv")
        texts = read_queries(folder / "queries.jsonl")
        documents = {document.id: document for document in read_documents(folder)}
        for query, judged in qrels.items():
            if query not in texts:
                raise DataError(f"{folder}/qrels/{split}.tsv judges query {query!r}, which queries.jsonl does not have")
            missing = next((document for document in judged if document not in documents), None)
            if missing is not None:
                raise DataError(f"{folder}/qrels/{split}.tsv judges {missing!r}, which corpus.jsonl does not have")
        if not qrels or not documents:
            raise DataError(f"{folder}: {len(documents)} documents and {len(qrels)} judged queries in split {split!r}")
        return cls(documents, {query: texts[query] for query in qrels}, qrels)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts and how much they belong together: a similarity score, or 1/0 for a label."""

    text_a: str
    text_b: str
    score: float


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a JSONL file: `text_a`, `text_b`, and `score` (a number) or `label` (`entailment`, or 1/0)."""
    pairs = []
    for where, row in read_jsonl(path):
        texts = [row.get("text_a"), row.get("text_b")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f'{where}: expected non-empty strings "text_a" and "text_b", found {texts!r}')
        value = row.get("score", row.get("label"))
        if isinstance(value, str):
            value = float(value == "entailment")
        if not isinstance(value, int | float):
            raise DataError(f'{where}: expected a number in "score" or a "label", found {value!r}')
        pairs.append(Pair(row["text_a"], row["text_b"], float(value)))
    if not pairs:
        raise DataError(f"{path}: no pairs")
    return pairs
