"""What threads of the service compute, each for a batch of requests. Equal works are done together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from d2llm.errors import StoreError
from d2llm.index import Index
from d2llm.indexing import AddReport
from d2llm.model import Model, TextEncoder
from d2llm.reasons import Reasons
from d2llm.search import Explanation, Searcher, SearchOptions
from d2llm.types import Document, Floats, Hit, Task


@dataclass(frozen=True)
class Search:
    """Search for queries with the same options. `reasons` also tells why the candidates have their scores."""

    searcher: Searcher
    options: SearchOptions
    reasons: bool = False
    observe: Callable[[Mapping[str, float]], None] = lambda _: None
    """Called with the seconds of each stage of a batch."""

    def __call__(self, queries: Sequence[str]) -> list[Explanation]:
        """Return one explanation for each query. An empty index has no hits, which is no error of a service."""
        options: Any = {field.name: getattr(self.options, field.name) for field in fields(SearchOptions)}
        try:
            found = self.searcher.explain_many(queries, reasons=self.reasons, **options)
        except StoreError:
            if self.searcher.index.count():
                raise
            reasons = Reasons({}, []) if self.reasons else None
            return [Explanation([], 0, truncated=False, reasons=reasons) for _ in queries]
        self.observe(found[0].seconds)
        return found


class Embedded(NamedTuple):
    """A text as a vector [E]."""

    vector: Floats
    tokens: int
    """The number of tokens that were read."""
    truncated: bool
    """Whether the text was longer than the limit and lost its end."""


@dataclass(frozen=True)
class Embed:
    """Encode texts of one side."""

    encoder: TextEncoder

    def __call__(self, texts: Sequence[str]) -> list[Embedded]:
        """Return one vector for each text."""
        tokens = self.encoder.tokenize(texts)
        vectors = self.encoder.encode_tokens(tokens).vectors
        return [Embedded(vector, len(each.ids), each.truncated) for vector, each in zip(vectors, tokens, strict=True)]


class Pairs(NamedTuple):
    """A query, and texts to rank for it."""

    query: str
    texts: Sequence[str]


class Scores(NamedTuple):
    """The score of each text with the query, and whether any of them was cut to the length limit."""

    scores: Sequence[float]
    truncated: bool


@dataclass(frozen=True)
class Rerank:
    """Encode queries and their texts, and score them by the IEM with the weights that searches have."""

    model: Model
    index: Index
    task: Task

    def __call__(self, requests: Sequence[Pairs]) -> list[Scores]:
        """Return the scores of each request."""
        scales = self.index.scales_for(self.model.config)[self.task]
        queries = self.model.query.tokenize([request.query for request in requests])
        texts = self.model.document.tokenize([text for request in requests for text in request.texts])
        query, passage = self.model.query.encode_tokens(queries), self.model.document.encode_tokens(texts)
        found, start = [], 0
        for row, request in enumerate(requests):
            rows = slice(start, start + len(request.texts))
            start = rows.stop
            cosine_1K = query.vectors[row : row + 1] @ passage.vectors[rows].T
            scores_1K = self.model.score(
                query.features[row : row + 1], passage.features[None, rows], cosine_1K, self.task, scales=scales
            )
            cut = queries[row].truncated or any(each.truncated for each in texts[rows])
            found.append(Scores(scores_1K[0].tolist(), cut))
        return found


class Stored(NamedTuple):
    """A query, and the ids of documents to rank for it."""

    query: str
    ids: Sequence[str]


@dataclass(frozen=True)
class RerankStored:
    """Encode queries, and score stored documents by their features in the index."""

    searcher: Searcher
    task: Task

    def __call__(self, requests: Sequence[Stored]) -> list[list[Hit]]:
        """Return the hits of each request, best first."""
        return [self.searcher.rerank(request.query, request.ids, self.task) for request in requests]


@dataclass(frozen=True, eq=False)
class Add:
    """Store documents. Each request is stored by itself: its answer says that all of them are on the disk."""

    index: Index
    model: Model
    chunk: bool

    def __call__(self, requests: Sequence[Sequence[Document]]) -> list[AddReport]:
        """Return what was stored."""
        return [self.index.add(self.model, documents, chunk=self.chunk) for documents in requests]


@dataclass(frozen=True, eq=False)
class Delete:
    """Remove documents."""

    index: Index

    def __call__(self, requests: Sequence[Sequence[str]]) -> list[int]:
        """Return how many of the documents were there."""
        counts = []
        for ids in requests:
            counts.append(len(self.index.digests(ids)))
            self.index.delete(ids)
        return counts
