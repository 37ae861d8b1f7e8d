"""`FlatIndex`, the simplest index: arrays in memory, searched exhaustively."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from d2llm.errors import ArgumentError, MismatchError, StoreError
from d2llm.filters import check_filter, matches
from d2llm.folder import ModelConfig
from d2llm.index import Index, check_limit, check_points, check_vector
from d2llm.payload import stored_payload
from d2llm.types import Candidates, Filter, Floats, Fusion, Point, Scales, strings


class FlatIndex(Index):
    """An exact index in memory: it compares the query with every passage.

    It serves small corpora, and it is the ground truth for other indexes. It is not kept on disk.

    Example:
        >>> index = d2llm.FlatIndex()
        >>> report = index.add(model, [{"id": "a", "text": "Refunds take five days."}])
        >>> index.count(), index.get(["a"])
        (1, {'a': {'text': 'Refunds take five days.'}})
    """

    scales: Scales | None = None

    def __init__(self) -> None:
        self._config: ModelConfig | None = None
        self._points: dict[str, Point] = {}
        self._matrix: Floats | None = None

    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        if self._config is None and create:
            self._config = config
        stored = self._stored_config()
        config.require_fingerprint(stored.fingerprint, "this index")
        config.require_dimensions(stored.embedding_dim, stored.feature_bytes, "this index")

    def _stored_config(self) -> ModelConfig:
        """Return the configuration of the model that made the index."""
        if self._config is None:
            raise StoreError("this index is empty: add documents first, with Index.add")
        return self._config

    def upsert(self, points: Sequence[Point]) -> None:
        config = self._stored_config()
        check_points(points, config.embedding_dim, config.feature_bytes)
        self._points |= {
            point.id: Point(point.id, _unit(point.vector), point.features.copy(), stored_payload(point), point.digest)
            for point in points
        }
        self._matrix = None

    def digests(self, ids: Iterable[str]) -> dict[str, str]:
        return {point.id: point.digest for point in self._stored_points(ids)}

    def ids(self) -> Iterator[str]:
        self._stored_config()
        return iter(list(self._points))

    def recall(
        self, vector: Floats, limit: int, *, filter: Filter | None = None, query_text: str = "", fusion: Fusion = "rrf"
    ) -> Candidates:
        config = self._stored_config()
        check_vector(vector, config.embedding_dim)
        check_limit(limit)
        rows = np.array(self._matching_rows(filter), np.int64)
        if query_text:
            raise MismatchError("a flat index has no BM25 vectors: search it without hybrid recall")
        points = list(self._points.values())
        if self._matrix is None:
            vectors = [point.vector for point in points]
            self._matrix = np.array(vectors, np.float32).reshape(len(points), config.embedding_dim)
        scores = self._matrix @ _unit(vector)
        best = rows[np.argsort(-scores[rows], kind="stable")[:limit]]
        features = [points[row].features for row in best]
        return Candidates(
            [points[row].id for row in best],
            scores[best],
            np.array(features, np.uint8).reshape(len(best), config.feature_bytes),
            [deepcopy(points[row].payload) for row in best],
        )

    def get(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        return {point.id: deepcopy(point.payload) for point in self._stored_points(ids)}

    def delete(self, ids: Iterable[str]) -> None:
        for point in self._stored_points(ids):
            del self._points[point.id]
        self._matrix = None

    def count(self, filter: Filter | None = None) -> int:
        return len(self._matching_rows(filter))

    def _stored_points(self, ids: Iterable[str]) -> list[Point]:
        """Return the stored points among `ids`, each once."""
        self._stored_config()
        unique_ids = dict.fromkeys(strings(ids, "id"))
        return [self._points[id_] for id_ in unique_ids if id_ in self._points]

    def _matching_rows(self, filter: Filter | None) -> list[int]:
        """Return the rows of the points whose payload matches `filter`."""
        self._stored_config()
        if filter is None:
            return list(range(len(self._points)))
        if not isinstance(filter, Mapping):
            raise ArgumentError(f'filter {filter!r}: expected a mapping, such as {{"lang": "en"}}')
        check_filter(filter)
        return [row for row, point in enumerate(self._points.values()) if matches(point.payload, filter)]


def _unit(vector: Floats) -> Floats:
    """Scale a vector to length 1, so that inner products are cosines."""
    length = np.linalg.norm(vector)
    unit: Floats = vector / length if length else vector.copy()
    return unit
