"""BEIR folders and TREC run files: judged queries over a corpus, and rankings of its documents.

A BEIR folder holds `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`. Each may be compressed (`corpus.jsonl.gz`).
"""

from __future__ import annotations

import codecs
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2llm.corpus import read_corpus, read_queries
from d2llm.errors import DataError
from d2llm.files import write_lines
from d2llm.metrics import itself
from d2llm.readers import beir_file, corpus_file, open_bytes, text_of
from d2llm.types import Document, StrPath

logger = logging.getLogger(__name__)

JUDGED = {3: "query-id<TAB>corpus-id<TAB>score", 4: "query-id 0 corpus-id score"}
"""The two formats of a judgement, by number of columns: BEIR's and TREC's."""


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Read judgements, `{query id: {document id: score}}`, from a file in one of the formats of `JUDGED`.

    Tabs separate the columns, or else white space does. The first line is a header if its ids and its score have no
    digit. Scores are whole numbers; `1.0` is one too. A negative score counts as 0 in all measures: not relevant.
    The file may be compressed (`*.gz`).

    Raises:
        DataError: the file is missing, a line has another format, or a document is judged twice for the same query with
            different scores.
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
            raise DataError(f"{where}: expected {form}, with a whole score, found {text_of(line)!r}") from error
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
    """Yield ("FILE:LINE", line) for each non-blank line of a text file, without line ends and byte-order mark."""
    with open_bytes(path) as file:
        lines = file.read().removeprefix(codecs.BOM_UTF8).splitlines()
    return ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """A BEIR data set with the judgements of one split. `queries` holds the judged queries only.

    Example:
        >>> from d2llm.beir import RetrievalData
        >>> (tmp_path / "qrels").mkdir()
        >>> written = (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "Refunds take five days."}')
        >>> written = (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "refund"}')
        >>> written = (tmp_path / "qrels" / "test.tsv").write_text("query-id\\tcorpus-id\\tscore\\nq1\\ta\\t1\\n")
        >>> data = RetrievalData.load(tmp_path, "test")
        >>> data.queries, data.qrels
        ({'q1': 'refund'}, {'q1': {'a': 1}})
    """

    documents: dict[str, Document]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    empty: frozenset[str] = frozenset()
    """Ids of documents without a text. No search returns them, but `qrels` may judge them: published figures count such
    judgements too."""

    @classmethod
    def load(cls, folder: StrPath, split: str) -> RetrievalData:
        """Read the BEIR folder `folder` with the judgements of `split`.

        Raises:
            DataError: a file is missing or broken, the judgements name a query or document that does not exist, or
                there are no documents or no judgements.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(
                f"{folder}: not a folder. Expected a folder with corpus.jsonl, queries.jsonl and qrels/{split}.tsv"
            )
        judgements, query_file = (beir_file(folder, name) for name in (f"qrels/{split}.tsv", "queries.jsonl"))
        qrels = read_qrels(judgements)
        texts = read_queries(folder, keep_empty=True)
        documents, empty = read_corpus(folder)
        for query, judged in qrels.items():
            if not texts.get(query, "").strip():
                reason = f"is empty in {query_file.name}" if query in texts else f"is not in {query_file.name}"
                raise DataError(f"{judgements} judges query {query!r}, which {reason}")
            missing = next((id_ for id_ in judged if id_ not in documents and id_ not in empty), None)
            if missing is not None:
                raise DataError(f"{judgements} judges document {missing!r}, which is not in {corpus_file(folder).name}")
        if not qrels or not documents:
            raise DataError(
                f"{folder} has {len(documents)} documents and {len(qrels)} judged queries in split {split!r}: "
                "at least one of each is needed"
            )
        return cls(documents, {query: texts[query] for query in qrels}, qrels, empty)


def read_run(path: Path, data: RetrievalData) -> dict[str, dict[str, float]]:
    """Read a TREC run file (`query-id Q0 document-id rank score tag`), `{query id: {document id: score}}`.

    As in trec_eval, the score orders the documents and the rank is not read. The document that is the query `itself`
    is left out. A judged query that the file lacks counts as a query without results; a warning says how many there
    are.

    Raises:
        DataError: the file is missing, a line has another format, a document is ranked twice for a query, or `data` has
            no such judged query or document.
    """
    run: dict[str, dict[str, float]] = {}
    for where, line in _lines(path):
        query, document, score = _parse_ranked(line, where)
        if query not in data.qrels:
            raise DataError(f"{where}: query {query!r} is not one of the {len(data.qrels)} judged queries")
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
            raise ValueError(text)  # NaN and infinity order nothing
    except ValueError as error:
        raise DataError(
            f"{where}: expected query-id Q0 document-id rank score tag, found {line.decode(errors='replace')!r}"
        ) from error
    return query, document, score


def write_run(path: Path, run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Write a TREC run file with the documents of each query by descending score.

    Raises:
        DataError: an id has white space in it, which the format cannot hold.
    """
    ranked = {query: sorted(documents.items(), key=lambda item: -item[1]) for query, documents in run.items()}
    write_lines(path, [line for query, documents in ranked.items() for line in run_lines(query, documents, tag)])


def run_lines(query: str, ranked: Iterable[tuple[str, float]], tag: str) -> Iterator[str]:
    """Yield the lines of a TREC run file for one query. `ranked` are pairs of a document and its score, best first.

    Raises:
        DataError: an id has white space in it, which the format cannot hold.
    """
    for rank, (document, score) in enumerate(ranked, 1):
        if any(id_.split() != [id_] for id_ in (query, document)):
            raise DataError(f"a run file cannot hold ids with white space: {query!r}, {document!r}")
        yield f"{query} Q0 {document} {rank} {score} {tag}"
