"""Recall from a Qdrant collection: a query vector in, candidates out."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from d2llm.deprecated import warn
from d2llm.errors import ArgumentError, MismatchError
from d2llm.index import Index, check_limit, check_texts, check_vector
from d2llm.types import RESERVED, Candidates, Filter, Floats, Fusion

from .collection import Collection
from .documents import Documents
from .engine import Effort, Search, SearchResult
from .filters import compile_filter, of_points
from .points import candidates_of
from .schema import MOST, Metadata

if TYPE_CHECKING:
    from qdrant_client import models


class QdrantRecall(Index):
    """The part of `QdrantIndex` that searches."""

    _collection: Collection
    _documents: Documents
    _effort: Effort

    def recall(
        self,
        vector: Floats,
        limit: int,
        *,
        filter: Filter | models.Filter | None = None,
        query_text: str = "",
        fusion: Fusion = "rrf",
        effort: Effort | None = None,
        words: str | None = None,
    ) -> Candidates:
        """As `Index.recall`. A server also takes Qdrant's own filters. `effort` replaces the index's `hnsw_ef` for
        this call. `words` is the old name of `query_text`."""
        if words is not None:
            warn("words", "query_text")
            query_text = words
        texts = [query_text] if query_text else []
        (found,) = self.recall_many([vector], limit, filter=filter, query_texts=texts, fusion=fusion, effort=effort)
        return found

    def recall_many(
        self,
        vectors: Floats | Sequence[Floats],
        limit: int,
        *,
        filter: Filter | models.Filter | None = None,
        query_texts: Sequence[str] = (),
        fusion: Fusion = "rrf",
        payloads: bool = True,
        effort: Effort | None = None,
    ) -> list[Candidates]:
        """As `Index.recall_many`, with the further arguments of `recall`. A server is asked once."""
        metadata = self._collection.open()
        effort = effort or self._effort
        searches = _searches(self._collection, metadata, vectors, limit, filter, query_texts, fusion, effort)
        results = self._documents.search(searches, payloads=payloads)
        return [candidates_of(result, metadata.feature_bytes) for result in results]

    async def arecall(
        self,
        vector: Floats,
        limit: int,
        *,
        filter: Filter | models.Filter | None = None,
        query_text: str = "",
        fusion: Fusion = "rrf",
    ) -> Candidates:
        texts = [query_text] if query_text else []
        (found,) = await self.arecall_many([vector], limit, filter=filter, query_texts=texts, fusion=fusion)
        return found

    async def arecall_many(
        self,
        vectors: Floats | Sequence[Floats],
        limit: int,
        *,
        filter: Filter | models.Filter | None = None,
        query_texts: Sequence[str] = (),
        fusion: Fusion = "rrf",
        payloads: bool = True,
    ) -> list[Candidates]:
        self._collection.require_own_process()
        if (metadata := self._collection.metadata) is None:
            metadata = await asyncio.to_thread(self._collection.open)
        searches = _searches(self._collection, metadata, vectors, limit, filter, query_texts, fusion, self._effort)
        results = await self._documents.asearch(searches, payloads=payloads)
        return [candidates_of(result, metadata.feature_bytes) for result in results]

    def with_payloads(self, candidates: Candidates, rows: Sequence[int]) -> Candidates:
        chosen = candidates.rows(rows)
        has_payloads = not rows or RESERVED not in chosen.payloads[0]
        return chosen if has_payloads else self._documents.with_payloads(chosen)

    def candidates(self, ids: Iterable[str], vector: Floats) -> Candidates:
        metadata = self._collection.open()
        check_vector(vector, metadata.embedding_dim)
        points, models = self._documents.points(ids), self._collection.engine.models
        params = Effort(exact=True).compile(len(points), models)
        search = Search(vector.tolist(), len(points), of_points(points, models), params)
        found = self._documents.search([search])[0] if points else SearchResult([], [])
        return candidates_of(found, metadata.feature_bytes)


def _searches(
    collection: Collection,
    metadata: Metadata,
    vectors: Floats | Sequence[Floats],
    limit: int,
    filter: Filter | models.Filter | None,
    query_texts: Sequence[str],
    fusion: Fusion,
    effort: Effort,
) -> list[Search]:
    """Searches as the engine of an open collection takes them, checked."""
    for vector in vectors:
        check_vector(vector, metadata.embedding_dim)
    check_limit(limit)
    check_texts(query_texts, vectors)
    limit = min(limit, MOST)
    condition = compiled(collection, filter)
    params = effort.compile(limit, collection.engine.models, filtered=condition is not None)
    searches = [Search(vector.tolist(), limit, condition, params, fusion=fusion) for vector in vectors]
    if not query_texts:
        return searches
    if fusion not in get_args(Fusion):
        raise ArgumentError(f"unknown fusion {fusion!r}: choose one of {', '.join(get_args(Fusion))}")
    if collection.bm25_encoder is None:
        place, new = shlex.quote(collection.place), f"{collection.name}-hybrid"
        raise MismatchError(
            f"{collection.where} has no BM25 vectors for hybrid searches. Copy it with them: d2llm collection migrate "
            f"{collection.name} --qdrant {place} --to {place} --as {new} --hybrid. Or index the corpus with them: "
            f"d2llm index MODEL CORPUS.jsonl --qdrant {place} --collection {new} --hybrid"
        )
    words = map(collection.bm25_encoder.query, query_texts)
    return [
        search._replace(sparse=sparse) if sparse.indices else search  # stop words alone find nothing
        for search, sparse in zip(searches, words, strict=True)
    ]


def compiled(collection: Collection, filter: Filter | models.Filter | None) -> Any:
    """The filter as an object of the engine; None for no filter or an empty mapping. The engine's own are unchanged."""
    models = collection.engine.models
    if filter is None or isinstance(filter, Mapping):
        return compile_filter(filter or {}, models)
    if isinstance(filter, models.Filter):
        return filter
    raise ArgumentError(f"filter {filter!r}: expected a mapping, or (on a server) a qdrant_client.models.Filter")
