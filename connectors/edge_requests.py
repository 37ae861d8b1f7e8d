"""Translates collection settings, points and searches into objects of the embedded engine, and its records back.

It runs nothing on a collection: edge.py does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from d2llm.fusion import RRF_K

from .engine import Search, Sparse, StoredPoint
from .schema import HNSW_MIN_KB, SPARSE, VECTOR, Metadata, Quantization


def collection_config(metadata: Metadata, edge: Any, indexing_threshold_kb: int | None) -> Any:
    """How a collection is to be stored.

    Memory is `Cached` (a memory map that the system may evict) or `Pinned` (stays in RAM). `Cold` would read from the
    disk each time.
    """
    options = metadata.options
    datatype = {"float32": "Float32", "float16": "Float16"}[options.datatype]
    kept = {
        name: edge.EdgeVectorParams(
            size=vector.size, distance=getattr(edge.Distance, vector.distance), memory=edge.Memory.Cached
        )
        for name, vector in options.kept.items()
    }
    return edge.EdgeConfig(
        vectors={
            VECTOR: edge.EdgeVectorParams(
                size=metadata.embedding_dim,
                distance=edge.Distance.Cosine,
                datatype=getattr(edge.VectorStorageDatatype, datatype),
                quantization_config=_quantization(options.quantization, edge),
                memory=edge.Memory.Cached,
            ),
            **kept,
        },
        sparse_vectors={SPARSE: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)} if options.bm25 else None,
        payload_memory=edge.Memory.Cached,
        hnsw_config=edge.HnswIndexConfig(
            m=options.hnsw_m, ef_construct=options.hnsw_ef_construct, full_scan_threshold=HNSW_MIN_KB
        ),
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=indexing_threshold_kb),
        wal_enabled=True,  # off, nothing is locked and a crash loses everything since the last flush
    )


def _quantization(kind: Quantization, edge: Any) -> Any:
    if kind == "none":
        return None
    if kind == "int8":
        return edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, memory=edge.Memory.Pinned)
    if kind == "binary":
        return edge.BinaryQuantizationConfig(memory=edge.Memory.Pinned)
    bits = getattr(edge.TurboQuantBitSize, kind.replace("turbo", "Bits"))
    return edge.TurboQuantQuantizationConfig(bits=bits, memory=edge.Memory.Pinned)


def upsert_operation(points: Sequence[StoredPoint], edge: Any) -> Any:
    """Store the points."""
    return edge.UpdateOperation.upsert_points([_point(point, edge) for point in points])


def _point(point: StoredPoint, edge: Any) -> Any:
    vectors: dict[str, Any] = {VECTOR: point.vector, **point.kept}
    if point.sparse is not None:
        vectors[SPARSE] = edge.SparseVector(*point.sparse)
    return edge.Point(id=point.id, vector=vectors, payload=point.payload)


def stored_point(record: Any) -> StoredPoint:
    """The point that the engine returned as `record`."""
    vectors = record.vector or {}
    sparse = vectors.get(SPARSE)
    return StoredPoint(
        str(record.id),
        vectors.get(VECTOR, []),
        record.payload or {},
        None if sparse is None else Sparse(sparse.indices, sparse.values),
        {name: vector for name, vector in vectors.items() if name not in (VECTOR, SPARSE)},
    )


def having(names: Iterable[str], edge: Any) -> list[Any]:
    """For each name a filter that passes the points which have a vector of this name."""
    return [edge.Filter(must=[edge.HasVectorCondition(name)]) for name in names]


def nearest(search: Search, edge: Any, payloads: bool) -> Any:
    """A search by cosine. `payloads` says whether the points come with theirs."""
    return edge.QueryRequest(
        query=edge.Query.Nearest(search.vector, using=VECTOR),
        filter=search.filter,
        with_payload=payloads,
        limit=search.limit,
        params=search.params,
    )


def hybrid(search: Search, edge: Any, payloads: bool) -> Any:
    """A hybrid search: three requests in one batch, for the arguments of `merged_hits`.

    They ask for the fused ranking, for the BM25 scores of all passages that it was chosen from, and for the cosines
    and payloads of the passages in the fused ranking.
    """
    assert search.sparse is not None
    nearest = edge.Query.Nearest(search.vector, using=VECTOR)
    bm25 = edge.Query.Nearest(edge.SparseVector(*search.sparse), using=SPARSE)
    common = {"limit": search.limit, "params": search.params}
    both = [
        edge.Prefetch(query=nearest, filter=search.filter, **common),
        edge.Prefetch(query=bm25, filter=search.filter, limit=search.limit),
    ]
    fusion = edge.Fusion.Rrf(k=RRF_K) if search.fusion == "rrf" else edge.Fusion.Dbsf()
    fused = edge.Prefetch(query=fusion, prefetches=both, limit=search.limit)
    return edge.QueryBatchRequest([
        edge.QueryRequest(query=fusion, prefetches=both, limit=search.limit),
        edge.QueryRequest(query=bm25, prefetches=both, limit=2 * search.limit),
        edge.QueryRequest(query=nearest, prefetches=[fused], with_payload=payloads, **common),
    ])  # fmt: skip
