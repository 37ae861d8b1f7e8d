"""The data types that all parts share: documents, embeddings, points, candidates, hits."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from d2llm.errors import ArgumentError, DataError

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]
"""Packed features of passages, uint8."""
StrPath: TypeAlias = str | PathLike[str]
"""The path of a file or folder."""
Task: TypeAlias = Literal["symmetric", "asymmetric"]
Filter: TypeAlias = Mapping[str, Any]
"""A condition on payloads, such as `{"lang": "en", "year": {"gte": 2020}, "tag": ["a", "b"]}`.

Every key must match. A list matches any of its values. `gt`, `gte`, `lt` and `lte` bound a number and compare 64-bit
floats. `{"exists": True}` matches a field that is there and neither null nor an empty list; with False, all others. A
key that begins with a dot is a path into objects: `.metadata.source` is the field `source` of the field `metadata`."""

Fusion: TypeAlias = Literal["rrf", "dbsf"]
"""How hybrid recall merges the cosine ranking and the BM25 ranking.

`rrf` merges by rank (reciprocal rank fusion, Cormack et al. 2009, k=60), `dbsf` by score (distribution-based score
fusion)."""

RESERVED = "_d2llm"
"""The payload key that d2llm keeps for itself; documents cannot use it."""

TASKS: tuple[Task, ...] = ("symmetric", "asymmetric")
"""The IEM branches, in the order of the graph (paper section 3.2).

`symmetric` compares two texts of the same kind. `asymmetric` judges whether the passage answers the query."""

Part: TypeAlias = Literal["cosine", "words", "vectors", "mlp"]
PARTS: tuple[Part, ...] = ("cosine", "words", "vectors", "mlp")
"""The parts that the IEM's score may have (see `Model.parts`), in the order of the graph."""
Scales: TypeAlias = Mapping[str, Mapping[str, float]]
"""Weights of the parts of the score by branch, such as `{"asymmetric": {"cosine": 20, "words": 0.25}}`. A branch that
is left out has the model's own."""


def task_id(task: str) -> int:
    """Return the index of the IEM branch `task`.

    Raises:
        ArgumentError: there is no such branch; names the choices.
    """
    if task not in TASKS:
        raise ArgumentError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    return TASKS.index(task)


def is_utf8(text: str) -> bool:
    """Return whether `text` can be written as UTF-8.

    Half of a surrogate pair cannot. Python produces it from half an escape in JSON, and from a byte on the command line
    that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def strings(values: Iterable[str], what: str = "text") -> Iterator[str]:
    """Yield the strings in `values` after checking each. Messages call a value `what`.

    Raises:
        TypeError: `values` is a single string, which would yield its characters; or a value is not a string.
        DataError: a value cannot be written as UTF-8.
    """
    if isinstance(values, str):
        raise TypeError(f"expected a list of {what}s, found a single string: pass [{what}]")
    for value in values:
        if not isinstance(value, str):
            way_out = f": pass {str(value)!r}" if isinstance(value, int) else ""
            raise TypeError(f"expected each {what} to be a string, found {reprlib.repr(value)}{way_out}")
        if not is_utf8(value):
            raise DataError(f"{what} {reprlib.repr(value)} cannot be written as UTF-8: it has half of a surrogate pair")
        yield value


@dataclass(frozen=True, slots=True)
class Document:
    """A passage to index: a unique id, a text, an optional title, and a payload that comes back with each hit.

    Example:
        >>> document = d2llm.Document("a", "Refunds take five days.", title="Refunds", payload={"lang": "en"})
        >>> document.content
        'Refunds Refunds take five days.'
    """

    id: str
    text: str
    title: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)
    vectors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Vectors of another program by name, which an index may keep for its searches (see `CollectionOptions.kept`). An
    index in memory leaves them out."""

    @property
    def content(self) -> str:
        """The text that the encoder reads: the title, then the text."""
        return f"{self.title} {self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The encoder's output for N texts.

    `vectors` [N, E] float32: unit vectors. ANN recall compares them by cosine.
    `features`: what the IEM reads of the texts, [N, H] float32 for queries and [N, P] uint8 for passages.
    `truncated`: how many texts were longer than the limit and lost their tail.

    Example:
        >>> passages = model.encode_document(["Refunds take five days.", "We ship on Mondays."])
        >>> passages.vectors.shape == (2, model.config.embedding_dim)
        True
        >>> passages.truncated
        0
    """

    vectors: Floats
    features: npt.NDArray[Any]
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True, slots=True)
class Passage:
    """The place of a passage in its document, which is too long to be one passage.

    Example:
        >>> import d2llm
        >>> index = d2llm.FlatIndex()
        >>> report = index.add(model, [{"id": "a", "text": "Refunds take five days. " * 200}])
        >>> hit = d2llm.Searcher(model, index).search("how long does a refund take?")[0]
        >>> passage = hit.passage
        >>> index.get(["a"])["a"]["text"][passage.start : passage.end] == hit.payload["text"]
        True
    """

    number: int
    """From 0."""
    of: int
    """The number of passages of the document."""
    start: int
    """The first character in the text of the document."""
    end: int
    """The character after the last one."""
    heading: str = ""
    """The Markdown headings of the sections in which the passage begins, such as `Install > Linux`."""


@dataclass(frozen=True, slots=True)
class Point:
    """A passage as an index stores it: `vector` [E] float32, `features` [P] uint8.

    `id`, `digest` and the fields of `payload` are those of its document, but `text` is that of the passage. `passage`
    is None if the document is one passage. `vectors` are those of its document, if it is the first passage.
    """

    id: str
    vector: Floats
    features: Bytes
    payload: dict[str, Any]
    digest: str
    passage: Passage | None = None
    vectors: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The K passages that recall fetched for one query, best first.

    `scores` [K] float32: the cosine of each passage with the query.
    `features` [K, P] uint8: the passage features, which the IEM reads.
    `bm25_scores` [K] float32: the BM25 scores in hybrid recall, otherwise None.
    `passages`: the place of each passage in its document, None for a document of one passage. Several candidates may be
    passages of one document, and so have the same id.

    Cosine orders the candidates; in hybrid recall the fused ranking does.

    Example:
        >>> index = d2llm.FlatIndex()
        >>> report = index.add(model, [{"id": "a", "text": "Refunds take five days."}])
        >>> candidates = index.recall(model.encode_query(["refund"]).vectors[0], limit=10)
        >>> candidates.ids, candidates.scores.shape
        (['a'], (1,))
    """

    ids: list[str]
    scores: Floats
    features: Bytes
    payloads: list[dict[str, Any]]
    bm25_scores: Floats | None = None
    passages: list[Passage | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.passages:
            object.__setattr__(self, "passages", [None] * len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def hit(self, row: int, score: float, rank: int | None = None) -> Hit:
        """Return the candidate in this row as a hit of this score. `rank` is its rank in recall, by default row + 1."""
        recall_score, rank = float(self.scores[row]), rank or row + 1
        return Hit(self.ids[row], score, recall_score, rank, self.payloads[row], self.passages[row])

    def without(self, id_: str | None, limit: int) -> Candidates:
        """Return the first `limit` candidates, without those of the document of this id."""
        return self.rows([row for row, other in enumerate(self.ids) if other != id_][:limit])

    def documents(self) -> Candidates:
        """Return the first candidate of each document."""
        first = {id_: row for row, id_ in reversed([*enumerate(self.ids)])}
        return self.rows(sorted(first.values()))

    def rows(self, rows: Sequence[int]) -> Candidates:
        """Return the candidates in these rows."""
        return Candidates(
            [self.ids[row] for row in rows],
            self.scores[rows],
            self.features[rows],
            [self.payloads[row] for row in rows],
            None if self.bm25_scores is None else self.bm25_scores[rows],
            [self.passages[row] for row in rows],
        )


def stacked(rows: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return arrays [K, ...] as one [Q, K, ...], with zeros after the shorter ones."""
    if len(rows) == 1:
        return rows[0][None]
    stacked = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return stacked


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result.

    `score` orders the hits. `recall_score` (the cosine) and `recall_rank` (from 1; in a hybrid search the rank in the
    fused ranking) come from recall, before the IEM. `payload` holds the document's `text`, its `title` if it has one,
    and its own fields.

    A document that was split into passages is scored by its best one. Then `text` is the text of this passage, and
    `passage` its place. `Index.get` returns the whole document.

    Example:
        >>> index = d2llm.FlatIndex()
        >>> report = index.add(model, [{"id": "a", "text": "Refunds take five days.", "lang": "en"}])
        >>> hit = d2llm.Searcher(model, index).search("how long does a refund take?")[0]
        >>> hit.id, hit.recall_rank, hit.payload["lang"]
        ('a', 1, 'en')
    """

    id: str
    score: float
    recall_score: float
    recall_rank: int
    payload: dict[str, Any]
    passage: Passage | None = None
