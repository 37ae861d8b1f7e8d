"""Translates collection settings, points and searches into objects of qdrant-client, and its records back.

It sends nothing: server.py does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from d2llm.errors import StoreError
from d2llm.fusion import RRF_K

from .engine import Search, SearchResult, Sparse, StoredPoint
from .schema import HNSW_MIN_KB, SPARSE, VECTOR, Metadata, Quantization

BATCH, BATCH_BYTES = 128, 8 * 2**20
"""Points in a request, and their size as JSON: a server takes no request of more than 32 MB."""


def collection_settings(metadata: Metadata, models: Any) -> dict[str, Any]:
    """How a collection is to be stored: arguments of `create_collection`.

    Raises:
        StoreError: this qdrant-client does not know the quantization.
    """
    options = metadata.options
    vector = models.VectorParams(
        size=metadata.embedding_dim,
        distance=models.Distance.COSINE,
        on_disk=options.on_disk,
        datatype=models.Datatype(options.datatype),
        quantization_config=_quantization(options.quantization, models),
    )
    kept = {
        name: models.VectorParams(size=vector.size, distance=models.Distance(vector.distance), on_disk=True)
        for name, vector in options.kept.items()
    }
    return {
        "vectors_config": {VECTOR: vector, **kept},
        "sparse_vectors_config": {SPARSE: models.SparseVectorParams(modifier=models.Modifier.IDF)}
        if options.bm25
        else None,
        "shard_number": options.shards,
        "replication_factor": options.replicas,
        "write_consistency_factor": options.write_consistency,
        "hnsw_config": models.HnswConfigDiff(
            m=options.hnsw_m, ef_construct=options.hnsw_ef_construct, full_scan_threshold=HNSW_MIN_KB
        ),
        "optimizers_config": models.OptimizersConfigDiff(indexing_threshold=HNSW_MIN_KB),
        "on_disk_payload": True,
    }


def _quantization(kind: Quantization, models: Any) -> Any:
    if kind == "none":
        return None
    if kind == "int8":
        scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
        return models.ScalarQuantization(scalar=scalar)
    if kind == "binary":
        return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
    if not hasattr(models, "TurboQuantization"):
        raise StoreError(f"quantization {kind!r} needs a newer qdrant-client: pip install -U qdrant-client")
    bits = models.TurboQuantBitSize[kind.replace("turbo", "BITS")]
    return models.TurboQuantization(turbo=models.TurboQuantQuantizationConfig(bits=bits, always_ram=True))


def batches(points: Sequence[StoredPoint], models: Any) -> Iterator[list[Any]]:
    """The points as `PointStruct`, as many at a time as a request may hold."""
    batch, total = list[Any](), 0
    for point in points:
        numbers = len(point.vector) + 2 * len(point.sparse.indices if point.sparse else ())
        numbers += sum(map(len, point.kept.values()))
        size = 20 * numbers + len(json.dumps(point.payload, ensure_ascii=False).encode())
        if batch and (len(batch) == BATCH or total + size > BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(_point(point, models))
        total += size
    if batch:
        yield batch


def _point(point: StoredPoint, models: Any) -> Any:
    vectors: dict[str, Any] = {VECTOR: point.vector, **point.kept}
    if point.sparse is not None:
        vectors[SPARSE] = _sparse(point.sparse, models)
    return models.PointStruct(id=point.id, vector=vectors, payload=point.payload)


def _sparse(vector: Sparse, models: Any) -> Any:
    return models.SparseVector(indices=vector.indices, values=vector.values)


def stored_point(record: Any) -> StoredPoint:
    """The point that the server returned as `record`."""
    vectors = record.vector or {}
    sparse = vectors.get(SPARSE)
    return StoredPoint(
        str(record.id),
        vectors.get(VECTOR, []),
        record.payload or {},
        None if sparse is None else Sparse(list(sparse.indices), list(sparse.values)),
        {name: vector for name, vector in vectors.items() if name not in (VECTOR, SPARSE)},
    )


def having(names: Iterable[str], models: Any) -> list[Any]:
    """For each name a filter that passes the points which have a vector of this name."""
    return [models.Filter(must=[models.HasVectorCondition(has_vector=name)]) for name in names]


def search_requests(searches: Iterable[Search], models: Any) -> list[Any]:
    """The searches as requests of one `query_batch_points`: one for each search by cosine, three for a hybrid one."""
    return [
        request
        for search in searches
        for request in ([_nearest(search, models)] if search.sparse is None else _hybrid(search, models))
    ]


def search_results(searches: Iterable[Search], answers: Iterable[Any]) -> list[SearchResult]:
    """What each search found, from the answers to its `search_requests`."""
    lists = (answer.points for answer in answers)
    return [
        SearchResult.of(next(lists)) if search.sparse is None else SearchResult.of_hybrid(*islice(lists, 3))
        for search in searches
    ]


def _nearest(search: Search, models: Any) -> Any:
    return models.QueryRequest(
        query=search.vector,
        using=VECTOR,
        filter=search.filter,
        limit=search.limit,
        with_payload=True,
        params=search.params,
    )


def _hybrid(search: Search, models: Any) -> list[Any]:
    """The requests of a hybrid search, for the arguments of `SearchResult.of_hybrid`.

    They ask for the fused ranking, for the BM25 scores of all passages that it was chosen from, and for the cosines
    and payloads of the passages in the fused ranking.
    """
    assert search.sparse is not None
    common = {"filter": search.filter, "limit": search.limit}
    bm25 = _sparse(search.sparse, models)
    both = [
        models.Prefetch(query=search.vector, using=VECTOR, params=search.params, **common),
        models.Prefetch(query=bm25, using=SPARSE, **common),
    ]
    fusion = (
        models.RrfQuery(rrf=models.Rrf(k=RRF_K))
        if search.fusion == "rrf"
        else models.FusionQuery(fusion=models.Fusion.DBSF)
    )
    fused = models.Prefetch(prefetch=both, query=fusion, limit=search.limit)
    return [
        models.QueryRequest(prefetch=both, query=fusion, limit=search.limit),
        models.QueryRequest(prefetch=both, query=bm25, using=SPARSE, limit=2 * search.limit),
        models.QueryRequest(
            prefetch=fused, query=search.vector, using=VECTOR, params=search.params, limit=search.limit,
            with_payload=True,
        ),
    ]  # fmt: skip


def alias_steps(alias: str, collection: str, exists: bool, models: Any) -> list[Any]:
    """Operations that, sent together, make `alias` a name of `collection` alone. `exists`: a collection has it now."""
    create = models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=collection, alias_name=alias))
    delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))
    return [delete, create] if exists else [create]
