"""What `QdrantIndex` needs of an engine, and what every collection says about itself. Knows no engine."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

from d2llm.errors import MismatchError
from d2llm.folder import ModelConfig

VECTOR = "recall"
"""Name of the vector that is searched."""
HNSW_M, HNSW_EF_CONSTRUCT = 16, 100
HNSW_MIN_KB = 10_000
"""Full vectors in a segment, in units of 1024 bytes, below which the engines make no graph of it."""
OVERSAMPLING = 2.0
"""Candidates compared by their full vectors, as a multiple of those asked for: makes up for 8-bit quantization."""
FORMAT = 1


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
        ValueError: `hnsw_ef` below 1.
    """

    hnsw_ef: int | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.hnsw_ef is not None and self.hnsw_ef < 1:
            raise ValueError(f"hnsw_ef must be at least 1, found {self.hnsw_ef}: leave it out for the default")

    def compile(self, limit: int, models: Any) -> Any:
        """The parameters of a search for `limit` points, in the classes of `models`."""
        if self.exact:
            return models.SearchParams(exact=True)
        return models.SearchParams(
            hnsw_ef=search_effort(limit) if self.hnsw_ef is None else self.hnsw_ef,
            quantization=models.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING),
        )


class StoredPoint(NamedTuple):
    """A point as an engine takes it: `id` is a UUID, `payload` includes the reserved key."""

    id: str
    vector: list[float]
    payload: dict[str, Any]


@dataclass(frozen=True)
class Metadata:
    """What a collection remembers of the model that made it."""

    fingerprint: str
    embedding_dim: int
    feature_dim: int
    created: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def of(cls, config: ModelConfig) -> Metadata:
        """That of a collection made now, for the vectors of this model."""
        created = {"d2llm": importlib.metadata.version("d2llm"), "at": datetime.now(UTC).isoformat(timespec="seconds")}
        return cls(config.fingerprint, config.embedding_dim, config.feature_dim, created)

    @classmethod
    def parse(cls, content: Any, where: str) -> Metadata:
        """Read what `to_json` made.

        Raises:
            MismatchError: `content` is something else, or of another format; names `where`.
        """
        names = {entry.name for entry in fields(cls)}
        if not isinstance(content, dict) or not names <= content.keys():
            raise MismatchError(f"{where} was made by something else than d2llm: choose another collection name")
        if content["format"] != FORMAT:
            raise MismatchError(
                f"{where} has format {content['format']}, this d2llm reads {FORMAT}: index the corpus again"
            )
        return cls(**{name: content[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def require(self, config: ModelConfig, where: str) -> None:
        """Raise `MismatchError` unless the collection `where` holds vectors of this model's passage side."""
        config.require_fingerprint(self.fingerprint, where)
        found, expected = (self.embedding_dim, self.feature_dim), (config.embedding_dim, config.feature_dim)
        if found != expected:
            raise MismatchError(
                f"{where} holds vectors and features of {found[0]} and {found[1]} dimensions, the model makes "
                f"{expected[0]} and {expected[1]}"
            )


class Engine(ABC):
    """One collection in one engine. Every error is a `StoreError` that names the place, or a `MismatchError`."""

    exclusive: bool
    """Whether calls must come one at a time."""
    models: Any
    """The module with the engine's classes for filters and search parameters; there once the engine is open."""

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
    def query(
        self, vector: list[float], limit: int, filter: Any, params: Any
    ) -> tuple[list[float], list[dict[str, Any]]]:
        """Scores and whole payloads of the nearest points, best first, searched for with these search parameters."""

    @abstractmethod
    def retrieve(self, ids: Sequence[str], *, without: str = "", only: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Payloads of those points that exist, without one key or with some keys alone."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> None:
        """Remove points."""

    @abstractmethod
    def count(self, filter: Any) -> int:
        """How many points pass."""

    @abstractmethod
    def indexed(self) -> int:
        """How many vectors are in search indexes."""

    @abstractmethod
    def optimize(self) -> None:
        """Return when every search index is built."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect."""
