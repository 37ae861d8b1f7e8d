"""A Qdrant server, through qdrant-client. All that is qdrant-client stays in this file."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from d2llm.errors import StoreError, import_extra
from d2llm.index import RESERVED

from .engine import (
    HNSW_EF_CONSTRUCT,
    HNSW_M,
    HNSW_MIN_KB,
    VECTOR,
    Engine,
    Metadata,
    StoredPoint,
)

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

BATCH = 128
BACKOFF = (0.2, 0.8)
"""Seconds before the second and the third try of a call that failed for a reason that passes."""
LONGEST_WAIT = 10.0
"""Seconds: a server that asks for more is reported instead of waited for."""
POLL = 1.0

T = TypeVar("T")


class ServerEngine(Engine):
    """One collection on a server. Thread-safe, as the client is."""

    exclusive = False

    def __init__(self, collection: str, url: str, api_key: str | None, timeout: float, grpc_port: int | None) -> None:
        self._collection, self._url = collection, url
        self._api_key, self._grpc_port = api_key, grpc_port
        self._timeout = math.ceil(timeout)  # the client takes whole seconds
        self._client: QdrantClient | None = None

    def open(self) -> Metadata | None:
        self.models = import_extra("qdrant_client.models", "qdrant")
        if self._client is None:
            self._client = import_extra("qdrant_client", "qdrant").QdrantClient(
                url=self._url,
                api_key=self._api_key,
                timeout=self._timeout,
                prefer_grpc=self._grpc_port is not None,
                grpc_port=self._grpc_port or 6334,
                check_compatibility=False,  # a thread that only warns; an unreachable server is reported below
            )
        if not self._call(self._client.collection_exists):
            return None
        return Metadata.parse(self._metadata().get(RESERVED), f"collection {self._collection!r} at {self._url}")

    def create(self, metadata: Metadata) -> None:
        models = self.models
        self._call(
            self._opened.create_collection,
            vectors_config={
                VECTOR: models.VectorParams(size=metadata.embedding_dim, distance=models.Distance.COSINE, on_disk=True)
            },
            hnsw_config=models.HnswConfigDiff(
                m=HNSW_M, ef_construct=HNSW_EF_CONSTRUCT, full_scan_threshold=HNSW_MIN_KB
            ),
            quantization_config=models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
            ),
            on_disk_payload=True,
            metadata={RESERVED: metadata.to_json()},
            timeout=self._timeout,
        )
        if RESERVED not in self._metadata():
            raise StoreError(
                f"the server at {self._url} keeps no collection metadata: d2llm needs Qdrant 1.16 or newer. "
                f"The empty collection {self._collection!r} was left there."
            )

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        for start in range(0, len(points), BATCH):
            batch = [
                self.models.PointStruct(id=point.id, vector={VECTOR: point.vector}, payload=point.payload)
                for point in points[start : start + BATCH]
            ]
            self._call(self._opened.upsert, points=batch, wait=True, timeout=self._timeout)

    def query(
        self, vector: list[float], limit: int, filter: Any, params: Any
    ) -> tuple[list[float], list[dict[str, Any]]]:
        hits = self._call(
            self._opened.query_points,
            query=vector,
            using=VECTOR,
            query_filter=filter,
            limit=limit,
            with_payload=True,
            search_params=params,
            timeout=self._timeout,
        ).points
        return [hit.score for hit in hits], [hit.payload or {} for hit in hits]

    def retrieve(self, ids: Sequence[str], *, without: str = "", only: Sequence[str] = ()) -> list[dict[str, Any]]:
        models = self.models
        keys = (
            models.PayloadSelectorInclude(include=list(only))
            if only
            else models.PayloadSelectorExclude(exclude=[without])
        )
        records = self._call(self._opened.retrieve, ids=list(ids), with_payload=keys, timeout=self._timeout)
        return [record.payload or {} for record in records]

    def delete(self, ids: Sequence[str]) -> None:
        selector = self.models.PointIdsList(points=list(ids))
        self._call(self._opened.delete, points_selector=selector, wait=True, timeout=self._timeout)

    def count(self, filter: Any) -> int:
        return self._call(self._opened.count, count_filter=filter, exact=True, timeout=self._timeout).count

    def indexed(self) -> int:
        return self._call(self._opened.get_collection).indexed_vectors_count or 0

    def optimize(self) -> None:
        """Wait: a server indexes by itself."""
        while (info := self._call(self._opened.get_collection)).status == self.models.CollectionStatus.YELLOW:
            time.sleep(POLL)
        if info.status == self.models.CollectionStatus.RED:
            raise StoreError(
                f"the server at {self._url} could not index {self._collection!r} ({info.optimizer_status}): see its log"
            )

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def _opened(self) -> QdrantClient:
        assert self._client is not None, "open() comes first"
        return self._client

    def _metadata(self) -> dict[str, Any]:
        return self._call(self._opened.get_collection).config.metadata or {}

    def _call(self, method: Callable[..., T], **arguments: Any) -> T:
        """Call a client method on our collection, again after a failure that passes: all our calls may be repeated."""
        for backoff in (*BACKOFF, None):
            try:
                return method(collection_name=self._collection, **arguments)
            except Exception as error:  # the one seam: every kind is sorted below
                problem = self._problem(error)
                if problem is None:
                    raise
                wait = None if backoff is None else _wait(error, backoff)
                if wait is None:
                    raise problem from error
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _problem(self, error: Exception) -> StoreError | None:
        """The one place that reads the client's errors; None if it is not one of them."""
        status = _status(error)
        place = f"Qdrant at {self._url}"
        if status is None:
            return None
        if status == "UNAVAILABLE":
            ports = f" and gRPC port {self._grpc_port}" if self._grpc_port else ""
            text = f"cannot reach {place}: is it running, and are its address{ports} right? ({_text(error)})"
        elif status == "DEADLINE_EXCEEDED":
            text = f"{place} did not answer within {self._timeout} s: raise timeout, or see what keeps it busy"
        elif status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            text = f"{place} refuses access to {self._collection!r}: check the API key ({_text(error)})"
        elif status == "NOT_FOUND":
            text = f"{place} has no collection {self._collection!r} any more: index the corpus again"
        elif status == "ALREADY_EXISTS":
            text = f"{place}: another process just made the collection {self._collection!r}: run this again"
        elif status == "RESOURCE_EXHAUSTED":
            text = f"{place} is out of capacity (a rate limit, or disk or memory): {_text(error)}"
        else:
            text = f"{place}, collection {self._collection!r}: {_text(error)}"
        return StoreError(text)


_HTTP = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ALREADY_EXISTS",
    429: "RESOURCE_EXHAUSTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
    507: "RESOURCE_EXHAUSTED",
}


def _status(error: Exception) -> str | None:
    """One vocabulary, gRPC's, for the three unrelated families of exceptions that the client raises."""
    import httpx
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    grpc = import_extra("grpc", "qdrant")
    if isinstance(error, grpc.RpcError):
        return str(error.code().name) if isinstance(error, grpc.Call) else "UNKNOWN"
    if isinstance(error, ResourceExhaustedResponse):
        return "RESOURCE_EXHAUSTED"
    if isinstance(error, UnexpectedResponse):
        return _HTTP.get(error.status_code or 0, "UNKNOWN")
    if isinstance(error, ResponseHandlingException):
        if isinstance(error.source, httpx.TimeoutException):
            return "DEADLINE_EXCEEDED"
        return "UNAVAILABLE" if isinstance(error.source, httpx.TransportError) else "UNKNOWN"
    return "UNKNOWN" if isinstance(error, json.JSONDecodeError) else None  # a proxy's page instead of an answer


def _wait(error: Exception, backoff: float) -> float | None:
    """Seconds to wait before another try; None if there should be none."""
    if _status(error) not in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
        return None
    asked = getattr(error, "retry_after_s", None)
    if asked is not None:
        return float(asked) if asked <= LONGEST_WAIT else None
    return backoff * random.uniform(0.75, 1.5)


def _text(error: Exception) -> str:
    details = getattr(error, "details", None)  # of gRPC: its str() is a page
    return str(details() if callable(details) else error).strip()
