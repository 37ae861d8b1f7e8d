"""`FlatIndex`, the simplest index: arrays in memory, searched exhaustively."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from d2llm.errors import ArgumentError, MismatchError, StoreError
from d2llm.filters import check_filter, matches
from d2llm.folder import ModelConfig
from d2llm.index import Index, by_document, check_limit, check_points, check_vector
from d2llm.passages import joined
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
        self._documents: dict[str, list[Point]] = {}
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
        copies = (
            replace(point, vector=_unit(point.vector), features=point.features.copy(), payload=stored_payload(point))
            for point in points
        )
        self._documents |= by_document(copies)
        self._matrix = None

    def digests(self, ids: Iterable[str]) -> dict[str, str]:
        return {id_: points[0].digest for id_, points in self._stored(ids).items()}

    def ids(self) -> Iterator[str]:
        self._stored_config()
        return iter(list(self._documents))

    def recall(
        self, vector: Floats, limit: int, *, filter: Filter | None = None, query_text: str = "", fusion: Fusion = "rrf"
    ) -> Candidates:
        texts = [query_text] if query_text else []
        return self.recall_many([vector], limit, filter=filter, query_texts=texts, fusion=fusion)[0]

    def recall_many(
        self,
        vectors: Floats | Sequence[Floats],
        limit: int,
        *,
        filter: Filter | None = None,
        query_texts: Sequence[str] = (),
        fusion: Fusion = "rrf",
        payloads: bool = True,
    ) -> list[Candidates]:
        config = self._stored_config()
        for vector in vectors:
            check_vector(vector, config.embedding_dim)
        check_limit(limit)
        if query_texts:
            raise MismatchError("a flat index has no BM25 vectors: search it without hybrid recall")
        points = [point for points in self._documents.values() for point in points]
        rows = np.arange(len(points))
        if filter is not None:
            matching = self._matching(filter)
            rows = np.array([row for row, point in enumerate(points) if point.id in matching], np.int64)
        if self._matrix is None:
            matrix = [point.vector for point in points]
            self._matrix = np.array(matrix, np.float32).reshape(len(points), config.embedding_dim)
        if not len(vectors):
            return []
        scores_QN = np.stack([_unit(vector) for vector in vectors]) @ self._matrix.T
        found = [_nearest(points, rows, scores_N, limit, config.feature_bytes) for scores_N in scores_QN]
        return [self.with_payloads(one, range(len(one))) for one in found] if payloads else found

    def with_payloads(self, candidates: Candidates, rows: Sequence[int]) -> Candidates:
        chosen = candidates.rows(rows)
        return replace(chosen, payloads=deepcopy(chosen.payloads))

    def candidates(self, ids: Iterable[str], vector: Floats) -> Candidates:
        config = self._stored_config()
        check_vector(vector, config.embedding_dim)
        points = [point for points in self._stored(ids).values() for point in points]
        vectors_NE = np.array([point.vector for point in points], np.float32).reshape(len(points), config.embedding_dim)
        rows = np.arange(len(points))
        found = _nearest(points, rows, vectors_NE @ _unit(vector), len(points), config.feature_bytes)
        return self.with_payloads(found, range(len(found)))

    def get(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        return {
            id_: deepcopy(joined([(point.passage, point.payload) for point in points]))
            for id_, points in self._stored(ids).items()
        }

    def delete(self, ids: Iterable[str]) -> None:
        for id_ in self._stored(ids):
            del self._documents[id_]
        self._matrix = None

    def count(self, filter: Filter | None = None) -> int:
        return len(self._matching(filter))

    def _stored(self, ids: Iterable[str]) -> dict[str, list[Point]]:
        """Return the stored documents among `ids`."""
        self._stored_config()
        unique_ids = dict.fromkeys(strings(ids, "id"))
        return {id_: self._documents[id_] for id_ in unique_ids if id_ in self._documents}

    def _matching(self, filter: Filter | None) -> set[str]:
        """Return the ids of the documents whose payload matches `filter`."""
        self._stored_config()
        if filter is None:
            return set(self._documents)
        if not isinstance(filter, Mapping):
            raise ArgumentError(f'filter {filter!r}: expected a mapping, such as {{"lang": "en"}}')
        check_filter(filter)
        return {id_ for id_, points in self._documents.items() if matches(points[0].payload, filter)}


def _nearest(
    points: Sequence[Point], rows: npt.NDArray[np.int64], scores_N: Floats, limit: int, feature_bytes: int
) -> Candidates:
    """The `limit` points in `rows` with the highest scores. Their payloads are the index's own."""
    best = rows[np.argsort(-scores_N[rows], kind="stable")[:limit]]
    features = [points[row].features for row in best]
    return Candidates(
        [points[row].id for row in best],
        scores_N[best],
        np.array(features, np.uint8).reshape(len(best), feature_bytes),
        [points[row].payload for row in best],
        passages=[points[row].passage for row in best],
    )


def _unit(vector: Floats) -> Floats:
    """Scale a vector to length 1, so that inner products are cosines."""
    length = np.linalg.norm(vector)
    unit: Floats = vector / length if length else vector.copy()
    return unit
