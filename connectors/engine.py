"""What `QdrantIndex` needs of an engine. Knows no engine."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from d2llm.errors import ArgumentError
from d2llm.types import Fusion

from .schema import MOST, Metadata, PayloadType

OVERSAMPLING = 2.0
"""Candidates compared by their full vectors, as a multiple of those asked for: makes up for 8-bit quantization."""
RRF_K = 60
"""Of reciprocal rank fusion, as in its paper. Qdrant's own default is 2."""


def search_effort(limit: int) -> int:
    """Nodes of the HNSW graph that a search for `limit` points keeps in view.

    Of the true 100 among 20,000 clustered vectors of 384, 128, 256 and 400 nodes found 97.6, 98.9 and 99.8 %; between
    the first and the last lie 0.15 ms.
    """
    return max(128, 4 * limit)


@dataclass(frozen=True)
class Effort:
    """How hard one search tries to find the nearest points.

    `hnsw_ef` nodes of the HNSW graph are kept in view (None: `search_effort` of the number of points asked for); the
    engines never keep fewer than `OVERSAMPLING` times that number. Or `exact`: the full vectors of all points are
    compared, without graph and 8-bit vectors, whatever `hnsw_ef` is.

    Raises:
        ArgumentError: `hnsw_ef` below 1.

    Example:
        >>> from d2llm.connectors import Effort
        >>> Effort(hnsw_ef=256)
        Effort(hnsw_ef=256, exact=False)
        >>> # index.recall(vector, 100, effort=Effort(exact=True)) compares all passages
    """

    hnsw_ef: int | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.hnsw_ef is not None and self.hnsw_ef < 1:
            raise ArgumentError(f"hnsw_ef must be at least 1, found {self.hnsw_ef}: leave it out for the default")

    def compile(self, limit: int, models: Any, *, filtered: bool = False) -> Any:
        """The parameters of a search for `limit` points, in the classes of `models`.

        In a graph made without knowing of a field, most neighbours of a point may not pass a filter on it, and the walk
        ends early: of 100,000 passages 10 % passed, and 14 % of the nearest of these were found. ACORN (Patel et al.
        2024) looks at the neighbours' neighbours then.
        """
        if self.exact:
            return models.SearchParams(exact=True)
        return models.SearchParams(
            hnsw_ef=min(MOST, search_effort(limit) if self.hnsw_ef is None else self.hnsw_ef),
            acorn=models.AcornSearchParams(enable=True, max_selectivity=1.0) if filtered else None,
            quantization=models.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING),
        )


class Sparse(NamedTuple):
    """A sparse vector: ascending hashes of words, and their weights."""

    indices: list[int]
    values: list[float]


class StoredPoint(NamedTuple):
    """A point as an engine takes it: `id` is a UUID, `payload` includes the reserved key."""

    id: str
    vector: list[float]
    payload: dict[str, Any]
    sparse: Sparse | None = None


class Search(NamedTuple):
    """A search as an engine takes it, filter and parameters in its own classes. With `sparse` it is hybrid."""

    vector: list[float]
    limit: int
    filter: Any
    params: Any
    sparse: Sparse | None = None
    fusion: Fusion = "rrf"


class SearchResult(NamedTuple):
    """Cosines and whole payloads of the points found, best first; from a hybrid search BM25 scores too."""

    scores: list[float]
    payloads: list[dict[str, Any]]
    bm25_scores: list[float] | None = None

    @classmethod
    def of(cls, hits: Sequence[Any]) -> SearchResult:
        """The result of a search by cosine, from the engine's `hits`."""
        return cls([hit.score for hit in hits], [hit.payload or {} for hit in hits])

    @classmethod
    def of_hybrid(cls, fused: Sequence[Any], bm25: Sequence[Any], cosine: Sequence[Any]) -> SearchResult:
        """The result of a hybrid search, merged from three lists of the engine's hits: the fused ranking, the BM25
        scores of all points that it was chosen from, and the cosines of the points in it.

        Fused scores tie when the two rankings share no points. Then the cosine decides. (The engine may cut ties
        differently each time, so that the last hit by cosine is not in the fused ranking.)
        """
        fused_scores, bm25_scores = ({hit.id: hit.score for hit in hits} for hits in (fused, bm25))
        hits = sorted(cosine, key=lambda hit: (fused_scores.get(hit.id, -math.inf), hit.score), reverse=True)
        return cls.of(hits)._replace(bm25_scores=[bm25_scores.get(hit.id, 0.0) for hit in hits])


class State(NamedTuple):
    """How a collection is: points, those in search indexes, `CollectionInfo.status`, `{field: type}`, bytes on disk."""

    points: int
    indexed: int
    status: str
    payload_indexes: dict[str, str]
    bytes: int | None


class Engine(ABC):
    """One collection in one engine. Thread-safe. Every error is a `StoreError` that names the place, or a
    `MismatchError`."""

    shared = False
    """Whether several processes may have the collection open at once, and an open one follows its alias."""
    models: Any
    """The module with the engine's classes for filters and search parameters; there once the engine is open."""

    def connect(self) -> None:  # noqa: B027  (a folder needs no connection)
        """Reach the place, whether the collection is there or not."""

    @abstractmethod
    def peek(self) -> Metadata | None:
        """What the collection remembers, read without opening it; None if there is no such collection."""

    @abstractmethod
    def remember(self, metadata: Metadata) -> None:
        """Let the open collection remember this, in one step."""

    @abstractmethod
    def open(self) -> Metadata | None:
        """Connect; None if there is no such collection."""

    @abstractmethod
    def create(self, metadata: Metadata) -> None:
        """Make the collection, and connect."""

    @abstractmethod
    def upsert(self, points: Sequence[StoredPoint]) -> None:
        """Store points so that they survive the end of this process."""

    @abstractmethod
    def query(self, search: Search) -> SearchResult:
        """The points that `search` finds, best first."""

    async def aquery(self, search: Search) -> SearchResult:
        """`query` for an event loop: in a thread, unless the engine can wait without one."""
        return await asyncio.to_thread(self.query, search)

    @abstractmethod
    def retrieve(self, ids: Sequence[str], *, without: str = "", only: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Payloads of those points that exist, without one key or with some keys alone."""

    @abstractmethod
    def scroll(self, size: int, *, only: Sequence[str] = (), vectors: bool = False) -> Iterator[list[StoredPoint]]:
        """All points in pages of `size`, with some keys of the payload alone; without `vectors` these are empty."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> None:
        """Remove points."""

    @abstractmethod
    def delete_where(self, filter: Any) -> None:
        """Remove the points that pass."""

    @abstractmethod
    def count(self, filter: Any) -> int:
        """How many points pass."""

    @abstractmethod
    def state(self) -> State:
        """How the collection is."""

    @abstractmethod
    def index_payload(self, fields: Mapping[str, PayloadType]) -> None:
        """Index these paths of the payload; those that are indexed so already stay as they are."""

    def defer(self) -> None:  # noqa: B027  (an engine that builds when asked has nothing to put off)
        """Build no search indexes until `optimize`."""

    def resume(self) -> None:  # noqa: B027  (likewise)
        """Take `defer` back."""

    @abstractmethod
    def optimize(self) -> None:
        """Return when every search index is built."""

    @abstractmethod
    def collections(self) -> tuple[list[str], dict[str, str]]:
        """All collections of the place, d2llm's or not, and `{alias: collection}`."""

    @abstractmethod
    def point_alias(self, alias: str) -> None:
        """Make `alias` a name of this collection, and of no other, in one step."""

    @abstractmethod
    def snapshot(self, file: Path) -> None:
        """Write the collection into a file, whole or not at all."""

    @abstractmethod
    def restore(self, file: Path) -> None:
        """Make the collection of what `snapshot` wrote."""

    @abstractmethod
    def drop(self) -> None:
        """Remove the collection, all that is in it, and its aliases."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect."""

    async def aclose(self) -> None:  # noqa: B027  (most engines open nothing on an event loop)
        """Release what `aquery` opened on the caller's event loop."""
