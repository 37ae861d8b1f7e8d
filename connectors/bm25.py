"""Sparse vectors for hybrid recall, made by Qdrant's own BM25."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2llm.bm25 import split_words
from d2llm.errors import ArgumentError, import_extra
from d2llm.payload import title_of

from .engine import Sparse, StoredPoint
from .schema import Bm25Options


class Bm25Encoder:
    """Makes sparse vectors of texts, by the engine's own BM25. It splits texts at spaces and punctuation alone, so it
    gets them with `split` words: it takes a run of Chinese for one word, and an accent for the end of a word.

    Raises:
        ArgumentError: an unknown language, or numbers out of range.
    """

    def __init__(self, options: Bm25Options, *, split: bool = True) -> None:
        self._split = split
        edge = import_extra("qdrant_edge", "qdrant")
        try:
            config = edge.Bm25Config(language=options.language, k=options.k, b=options.b, avg_len=options.average_words)
            self._bm25 = edge.Bm25(config)
        except ValueError as error:
            raise ArgumentError(f"BM25 for hybrid recall: {error}") from error

    def document(self, payload: Mapping[str, Any]) -> Sparse:
        """The saturated counts of the words in title and text."""
        vector = self._bm25.embed_document(self._words(f"{title_of(payload)} {payload.get('text', '')}"))
        return Sparse(vector.indices, vector.values)

    def query(self, text: str) -> Sparse:
        """The words of a query, each once. A query of stop words alone has none."""
        vector = self._bm25.embed_query(self._words(text))
        return Sparse(vector.indices, vector.values)

    def _words(self, text: str) -> str:
        return " ".join(split_words(text)) if self._split else text


def with_sparse(points: Sequence[StoredPoint], encoder: Bm25Encoder) -> list[StoredPoint]:
    """The same points with the sparse vectors of their texts."""
    return [point._replace(sparse=encoder.document(point.payload)) for point in points]
