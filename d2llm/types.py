"""The things that travel between the parts: documents, embeddings, candidates, hits. No logic beyond their own."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from d2llm.errors import ArgumentError, DataError

Floats: TypeAlias = npt.NDArray[np.float32]
Task: TypeAlias = Literal["symmetric", "asymmetric"]
Filter: TypeAlias = Mapping[str, Any]
"""`{"lang": "en", "year": {"gte": 2020}, "tag": ["a", "b"]}`: every key must match; a list matches any of its values;
`gt`, `gte`, `lt`, `lte` bound a number, and compare 64-bit floats."""

Fusion: TypeAlias = Literal["rrf", "dbsf"]
"""How hybrid recall joins the ranking by cosine and the ranking by BM25: by ranks (reciprocal rank fusion, Cormack et
al. 2009, k=60) or by scores (distribution-based score fusion)."""

RESERVED = "_d2llm"
"""The payload key that is ours."""

TASKS: tuple[Task, ...] = ("symmetric", "asymmetric")
"""IEM branches in graph order (paper section 3.2): `symmetric` compares two texts of one kind, `asymmetric` asks
whether the passage answers the query."""


def task_id(task: str) -> int:
    """Index of the IEM branch called `task`; a `ValueError` names the choices."""
    if task not in TASKS:
        raise ArgumentError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    return TASKS.index(task)


def is_utf8(text: str) -> bool:
    """Whether `text` can be written as UTF-8. Half of a surrogate pair cannot: Python makes one of half an escape in
    JSON, and of a byte on the command line that is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def strings(values: Iterable[str], what: str = "text") -> Iterator[str]:
    """Yield `values`; `what` is one of them, in words.

    Raises:
        TypeError: a single string in place of a list, which would give its characters; or a value that is no string.
        DataError: a value that cannot be written as UTF-8.
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
    """A passage to index: a unique id, its text, an optional title, and what else the caller wants back with a hit."""

    id: str
    text: str
    title: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """What the encoder reads: title and text."""
        return f"{self.title} {self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What the encoder makes of N texts.

    `vectors` [N, E] float32: unit vectors, what ANN recall compares by cosine.
    `features` [N, H] float32: this side's half of the IEM's first layer.
    `truncated`: how many texts were longer than the limit and lost their tail.
    """

    vectors: Floats
    features: Floats
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True, slots=True)
class Point:
    """A document as an index stores it: `vector` [E] and `features` [H] float32, `digest` of its content."""

    id: str
    vector: Floats
    features: Floats
    payload: dict[str, Any]
    digest: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """The K nearest passages of one query, best first: `scores` [K] float32 cosines, `features` [K, H] float32.

    Cosine orders them. Hybrid recall orders them by the fused ranking and gives `bm25_scores` [K] float32 too.
    """

    ids: list[str]
    scores: Floats
    features: Floats
    payloads: list[dict[str, Any]]
    bm25_scores: Floats | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result. `score` orders the hits. `recall_score` (cosine) and `recall_rank` (from 1; in a hybrid search
    that of the fused ranking) come from recall, before the IEM. `payload` holds the document's `text`, `title` and own
    fields."""

    id: str
    score: float
    recall_score: float
    recall_rank: int
    payload: dict[str, Any]
