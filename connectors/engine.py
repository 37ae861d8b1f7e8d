"""The contract between a collection and the engine that stores it. Knows no engine."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from d2llm.errors import ArgumentError
from d2llm.types import Bytes, Fusion

from .schema import MOST, CollectionOptions, Metadata, PayloadType

OVERSAMPLING = 2.0
"""Candidates that are compared again by their full vectors, as a multiple of those asked for. This compensates for
quantization."""


def search_effort(limit: int) -> int:
    """Nodes of the HNSW graph that a search for `limit` points keeps in view.

    Measured on 20,000 clustered vectors of 384 dimensions: 128, 256 and 400 nodes find 97.6, 98.9 and 99.8 % of the
    true nearest 100. The last takes 0.15 ms longer than the first.
    """
    return max(128, 4 * limit)


@dataclass(frozen=True)
class Effort:
    """How hard one search tries to find the nearest points.

    `hnsw_ef` is the number of nodes of the HNSW graph that the search keeps in view. More nodes find more of the
    nearest points and take longer. None is 4 times the number of points asked for, at least 128. Engines never keep
    fewer than 2 times that number, so lower values have no effect. `exact` compares the full vectors of all points,
    without the graph and the quantized vectors; `hnsw_ef` is then ignored.

    Raises:
        ArgumentError: `hnsw_ef` below 1.

    Example:
        >>> from d2llm.connectors import Effort
        >>> Effort(hnsw_ef=256)
        Effort(hnsw_ef=256, exact=False)
        >>> index.recall(vector, 100, effort=Effort(exact=True))  # doctest: +SKIP
    """

    hnsw_ef: int | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.hnsw_ef is not None and self.hnsw_ef < 1:
            raise ArgumentError(f"hnsw_ef must be at least 1, found {self.hnsw_ef}: leave it out for the default")

    def compile(self, limit: int, models: Any, *, filtered: bool = False) -> Any:
        """The parameters of a search for `limit` points, in the classes of `models`.

        A filtered search uses ACORN (Patel et al. 2024). If the graph was built before the field was indexed, most
        neighbours of a point may not pass the filter, and a plain walk ends early: with a filter that 10 % of 100,000
        passages passed, it found 14 % of the nearest. ACORN also looks at the neighbours of neighbours.
        """
        if self.exact:
            return models.SearchParams(exact=True)
        return models.SearchParams(
            hnsw_ef=min(MOST, search_effort(limit) if self.hnsw_ef is None else self.hnsw_ef),
            acorn=models.AcornSearchParams(enable=True, max_selectivity=1.0) if filtered else None,
            quantization=models.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING),
        )


def passages_in_graphs(indexed: int, points: int, options: CollectionOptions, kept: int) -> int:
    """How many of `points` have the vector that d2llm searches in a graph.

    The engines tell only how many vectors of all names are `indexed`, with all sparse vectors among them. `kept` others
    are stored beside those that d2llm searches. The same share of both is assumed to be in graphs: this is true when
    all are or none, and about true while graphs are built. The engines may count deleted points too.
    """
    dense = max(0, indexed - (points if options.bm25 else 0))
    return min(points, dense * points // (points + kept) if kept else dense)


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
    kept: Mapping[str, list[float]] = MappingProxyType({})


class Search(NamedTuple):
    """A search as an engine takes it, filter and parameters in its own classes. With `sparse` it is hybrid."""

    vector: list[float]
    limit: int
    filter: Any
    params: Any
    sparse: Sparse | None = None
    fusion: Fusion = "rrf"


class SearchResult(NamedTuple):
    """Cosines and payloads of the points found, best first; from a hybrid search BM25 scores too.

    Payloads are whole. With `features` [K, P] they are not: see `cache.Known`.
    """

    scores: list[float]
    payloads: list[dict[str, Any]]
    bm25_scores: list[float] | None = None
    features: Bytes | None = None

    def rows(self, rows: Sequence[int]) -> SearchResult:
        """The points in these rows."""
        bm25_scores = None if self.bm25_scores is None else [self.bm25_scores[row] for row in rows]
        features = None if self.features is None else self.features[rows]
        return SearchResult(
            [self.scores[row] for row in rows], [self.payloads[row] for row in rows], bm25_scores, features
        )

    def first(self, limit: int) -> SearchResult:
        """The `limit` best points, or all if they are fewer."""
        return self.rows(range(min(limit, len(self.scores))))

    @classmethod
    def of(cls, hits: Sequence[Any]) -> SearchResult:
        """The result of a search by cosine, from the engine's `hits`."""
        return cls([hit.score for hit in hits], [hit.payload or {} for hit in hits])

    @classmethod
    def of_hybrid(cls, fused: Sequence[Any], bm25: Sequence[Any], cosine: Sequence[Any]) -> SearchResult:
        """The result of a hybrid search, from the three lists that `merged_hits` takes."""
        hits, bm25_scores = merged_hits(fused, bm25, cosine)
        return cls.of(hits)._replace(bm25_scores=bm25_scores)


def merged_hits(fused: Sequence[Any], bm25: Sequence[Any], cosine: Sequence[Any]) -> tuple[list[Any], list[float]]:
    """The hits of a hybrid search with their BM25 scores, from three lists of the engine's hits: the fused ranking, the
    BM25 scores of all points that it was chosen from, and the cosines of the points in it.

    Fused scores tie when the two rankings share no points. Then the cosine decides. (The engine may cut ties
    differently each time, so that the last hit by cosine is not in the fused ranking.)
    """
    fused_scores, bm25_scores = ({hit.id: hit.score for hit in hits} for hits in (fused, bm25))
    hits = sorted(cosine, key=lambda hit: (fused_scores.get(hit.id, -math.inf), hit.score), reverse=True)
    return hits, [bm25_scores.get(hit.id, 0.0) for hit in hits]


class State(NamedTuple):
    """The state of a collection: the number of points, how many of them are in HNSW graphs, the status (see
    `CollectionInfo`), the payload indexes `{path: type}`, and bytes on the disk."""

    points: int
    indexed: int
    status: str
    payload_indexes: dict[str, str]
    bytes: int | None


class Engine(ABC):
    """One collection in one engine. Thread-safe.

    Every error is a `StoreError` that names the place, or a `MismatchError`. `connect`, `peek`, `open`, `create`,
    `restore`, `drop` and `collections` work while the collection is closed; all others need it open.
    """

    shared = False
    """Whether several processes may have the collection open at once. An open one then follows its alias too."""
    models: Any
    """The module with the engine's classes for filters and search parameters. Set by `open`."""

    def connect(self) -> None:  # noqa: B027  (a folder needs no connection)
        """Reach the place, whether the collection exists or not."""

    @abstractmethod
    def peek(self) -> Metadata | None:
        """What the collection remembers, read without opening it; None if there is no such collection."""

    @abstractmethod
    def remember(self, metadata: Metadata) -> None:
        """Replace what the open collection remembers, in one step."""

    @abstractmethod
    def open(self) -> Metadata | None:
        """Open the collection; None if there is none."""

    @abstractmethod
    def create(self, metadata: Metadata) -> None:
        """Make the collection, and open it."""

    @abstractmethod
    def upsert(self, points: Sequence[StoredPoint]) -> None:
        """Store points so that they survive the end of this process."""

    @abstractmethod
    def query(self, searches: Sequence[Search], *, payloads: bool = True) -> list[SearchResult]:
        """The points that each search finds, best first. Without `payloads`, they may be left out of the results."""

    async def aquery(self, searches: Sequence[Search], *, payloads: bool = True) -> list[SearchResult]:
        """`query` for an event loop: in a thread, unless the engine can wait without one."""
        return await asyncio.to_thread(self.query, searches, payloads=payloads)

    @abstractmethod
    def retrieve(self, ids: Sequence[str], *, without: str = "", only: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Payloads of those points that exist: without the key `without`, or with the keys `only`."""

    @abstractmethod
    def scroll(self, size: int, *, only: Sequence[str] = (), vectors: bool = False) -> Iterator[list[StoredPoint]]:
        """All points in pages of `size`, with the payload keys `only`, if given. `vectors` says whether they have
        theirs."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> None:
        """Remove points."""

    @abstractmethod
    def delete_where(self, filter: Any) -> None:
        """Remove the points that pass `filter`."""

    @abstractmethod
    def count(self, filter: Any) -> int:
        """How many points pass `filter`; all pass None."""

    @abstractmethod
    def state(self) -> State:
        """The state of the collection."""

    @abstractmethod
    def index_payload(self, fields: Mapping[str, PayloadType]) -> None:
        """Index these paths of the payload. An index of the same type stays, one of another type is replaced."""

    def defer(self) -> None:  # noqa: B027  (an engine that builds on request has nothing to defer)
        """Build no graphs until `resume`."""

    def resume(self) -> None:  # noqa: B027  (nothing was deferred, see `defer`)
        """End `defer`."""

    @abstractmethod
    def optimize(self) -> None:
        """Return when every graph is built."""

    def warm(self) -> None:  # noqa: B027  (an engine on a server has its own caches)
        """Read what searches would otherwise read when they first find a point."""

    @abstractmethod
    def collections(self) -> tuple[list[str], dict[str, str]]:
        """All collections of the place, made by d2llm or not, and `{alias: collection}`."""

    @abstractmethod
    def point_alias(self, alias: str) -> None:
        """Make `alias` a name of this collection, and of no other, in one step."""

    @abstractmethod
    def snapshot(self, file: Path) -> None:
        """Write the collection into a file, complete or not at all."""

    @abstractmethod
    def restore(self, file: Path) -> None:
        """Make the collection from a file that `snapshot` wrote."""

    @abstractmethod
    def drop(self) -> None:
        """Remove the collection with all its points and aliases."""

    @abstractmethod
    def close(self) -> None:
        """Close the collection and the connection. `open` opens them again."""

    async def aclose(self) -> None:  # noqa: B027  (most engines open nothing on an event loop)
        """Release what `aquery` opened on the caller's event loop."""
