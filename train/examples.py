"""Training examples: a query with its positives, its hard negatives and its task, as read from files and written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from d2llm.beir import RetrievalData
from d2llm.errors import DataError
from d2llm.files import require_new, write_lines
from d2llm.metrics import itself
from d2llm.readers import read_jsonl
from d2llm.types import TASKS, Task


@dataclass(frozen=True, slots=True)
class Example:
    """One training query. All fields but the task are texts.

    Example:
        >>> Example("where did the cat sit", positives=["the cat sat on the mat"], negatives=[]).task
        'asymmetric'
    """

    query: str
    positives: list[str]
    negatives: list[str]
    task: Task = "asymmetric"
    itself: str | None = None
    """The passage with the content of the query, if the corpus has one. It is never taken as a negative."""


def read_examples(path: Path) -> list[Example]:
    """Read a JSONL file with rows `{"query", "positives", "negatives", "task", "itself"}`. The last three are optional.
    `itself` is the text of the document that is the query (`metrics.itself`), which is never a negative.

    Raises:
        DataError: a field is missing or wrong. The error names line and field.
    """
    examples = []
    for where, row in read_jsonl(path):
        query, task = row.get("query"), row.get("task", "asymmetric")
        positives, negatives = row.get("positives"), row.get("negatives", [])
        if not isinstance(query, str) or not query.strip():
            raise DataError(f'{where}: expected "query" to be a non-empty string, found {query!r}')
        if not _texts(positives) or not positives:
            raise DataError(f'{where}: expected "positives" to be a list of one or more texts, found {positives!r}')
        if not _texts(negatives):
            raise DataError(f'{where}: expected "negatives" to be a list of texts, found {negatives!r}')
        if task not in TASKS:
            raise DataError(f'{where}: expected "task" to be one of {", ".join(TASKS)}, found {task!r}')
        if not isinstance(own := row.get("itself"), str | None):
            raise DataError(f'{where}: expected "itself" to be a text, found {own!r}')
        examples.append(Example(query, positives, negatives, task, own))
    if not examples:
        raise DataError(f"{path}: no examples")
    return examples


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as `read_examples` reads them. The file appears whole or not at all.

    Raises:
        OutputExistsError: `path` exists.
    """
    require_new(path, file=True)
    rows = ({name: value for name, value in asdict(example).items() if value is not None} for example in examples)
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def examples_of(data: RetrievalData) -> list[Example]:
    """The judged queries of a BEIR split, without negatives. Queries whose positives have no text are left out."""
    examples = []
    for query, judged in data.qrels.items():
        relevant = [document for document, grade in judged.items() if grade > 0 and document not in data.empty]
        positives = [data.documents[document].content for document in relevant]
        if positives:
            own = data.documents.get(itself(query, data.qrels) or "")
            examples.append(Example(data.queries[query], positives, [], itself=own.content if own else None))
    return examples
