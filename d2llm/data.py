"""Files of documents, queries, judgements, runs and pairs. Errors name the file, the line and what was expected.

Documents and queries are JSON lines with `_id` (or `id`) and `text`; documents may have a `title`, and every other key
is payload. A BEIR folder holds `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from d2llm.errors import DataError
from d2llm.types import Document

logger = logging.getLogger(__name__)

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


def read_run(path: Path, data: RetrievalData) -> dict[str, dict[str, float]]:
    """A TREC run file (`query-id Q0 document-id rank score tag`), `{query id: {document id: score}}`.

    As in trec_eval the score orders the documents; the rank is not read. A judged query that the file lacks counts as
    one without results, and a warning says how many do.

    Raises:
        DataError: no such file, a line of another form, a document ranked twice, a query or document that `data` lacks.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    run: dict[str, dict[str, float]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        query, document, score = _parse_ranked(line, f"{path}:{number}")
        if query not in data.qrels:
            raise DataError(f"{path}:{number}: query {query!r} is none of the {len(data.qrels)} judged queries")
        if document not in data.documents:
            raise DataError(f"{path}:{number}: document {document!r} is not in the corpus")
        if document in run.setdefault(query, {}):
            raise DataError(f"{path}:{number}: document {document!r} is ranked twice for query {query!r}")
        run[query][document] = score
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
