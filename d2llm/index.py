"""What an index is, whatever engine holds it: the contract `Index`, and the checks that each index makes."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Self

import numpy as np
from tqdm.auto import tqdm

from d2llm.errors import ArgumentError, DataError, MismatchError
from d2llm.folder import ModelConfig
from d2llm.indexing import CHUNK, AddReport, encoded_chunks
from d2llm.model import Model
from d2llm.types import Candidates, Document, Filter, Floats, Fusion, Point, strings


class Index(ABC):
    """Passage vectors, features and payloads under document ids, all made by one passage encoder."""

    def add(
        self,
        model: Model,
        documents: Iterable[Document | Mapping[str, Any]],
        *,
        prune: bool = False,
        progress: bool = False,
        total: int | None = None,
    ) -> AddReport:
        """Encode and store `documents`. Those already here with the same content are left alone, so an interrupted
        job is completed by running it again; those with new content replace the old. With `prune`, those that are here
        and not among `documents` are removed, once all others are stored.

        Reading, tokenising, encoding and storing overlap. Memory does not grow with the number of documents (`prune`
        remembers 60 bytes of each). `total` is for the progress bar.

        Raises:
            DataError: an empty document, a missing field, a reserved payload key, an id twice within one chunk; `prune`
                without any documents.
            MismatchError: the index was made by another passage encoder.
            StoreError: the index cannot be reached or is in use.
            TypeError: `documents` is a single one, or one of them is neither a `Document` nor a mapping.
        """
        if isinstance(documents, str | Mapping | Document):
            raise TypeError("expected a list of documents, found a single one: pass [document]")
        self.open_for(model.config)
        report = AddReport()
        seen: set[int] = set()
        chunks = encoded_chunks(model, documents, self.digests, seen if prune else None)
        with tqdm(total=total, unit="doc", disable=not progress) as bar, closing(chunks):
            for chunk in chunks:
                if chunk.points:
                    self.upsert(chunk.points)
                report.added += len(chunk.new)
                report.unchanged += chunk.unchanged
                report.truncated += chunk.truncated
                bar.update(len(chunk.new) + chunk.unchanged)
        if prune:
            report.pruned = self._prune(seen)
        return report

    def prune(self, ids: Iterable[str]) -> int:
        """Remove the documents whose ids are not among `ids`; how many they were.

        Raises:
            DataError: there are no `ids`: that would empty the index.
            TypeError: `ids` is a single string, or one of them is no string.
        """
        return self._prune({hash(id_) for id_ in strings(ids, "id")})

    def _prune(self, seen: set[int]) -> int:
        if not seen:
            raise DataError("no documents were given: pruning would empty the index")
        vanished = [id_ for id_ in self.ids() if hash(id_) not in seen]
        for start in range(0, len(vanished), CHUNK):
            self.delete(vanished[start : start + CHUNK])
        return len(vanished)

    @contextmanager
    def bulk_load(self) -> Iterator[None]:
        """A block that stores much: what makes a large index fast is left for its end, and then built."""
        yield
        self.optimize()

    @abstractmethod
    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        """Make sure the index holds this model's vectors; make it if it is missing and `create`.

        Raises:
            MismatchError: another passage encoder made it.
            StoreError: it is missing (without `create`), cannot be reached, or is in use.
        """

    @abstractmethod
    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, replacing those with the same id. All acknowledged when this returns."""

    @abstractmethod
    def digests(self, ids: Iterable[str]) -> dict[str, str]:
        """Content digests of those `ids` that are stored.

        Raises:
            TypeError: `ids` is a single string, or one of them is no string.
        """

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Every stored id, in no order. Documents that come or go meanwhile may or may not be among them."""

    @abstractmethod
    def recall(
        self, vector: Floats, limit: int, *, filter: Filter | None = None, query_text: str = "", fusion: Fusion = "rrf"
    ) -> Candidates:
        """The `limit` nearest passages to `vector` [E] by cosine, best first, among those that `filter` lets pass.

        With `query_text` recall is hybrid: BM25 fetches `limit` passages too, `fusion` joins the two rankings, and the
        `limit` best of both come back in that order, each with its cosine.

        Raises:
            MismatchError: a vector of another width, or `query_text` and the index has no BM25 vectors.
            ArgumentError: NaN or infinity in the vector, `limit` below 1, or a filter of another form.
            StoreError: the index is missing, cannot be reached, or is in use.
        """

    async def arecall(
        self, vector: Floats, limit: int, *, filter: Filter | None = None, query_text: str = "", fusion: Fusion = "rrf"
    ) -> Candidates:
        """`recall` for an event loop: in a thread, unless the index can wait without one."""
        return await asyncio.to_thread(self.recall, vector, limit, filter=filter, query_text=query_text, fusion=fusion)

    @abstractmethod
    def get(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Payloads of those `ids` that are stored.

        Raises:
            TypeError: `ids` is a single string, or one of them is no string.
        """

    @abstractmethod
    def delete(self, ids: Iterable[str]) -> None:
        """Remove documents; ids that are not stored are no error.

        Raises:
            TypeError: `ids` is a single string, or one of them is no string. Nothing is removed then.
        """

    @abstractmethod
    def count(self, filter: Filter | None = None) -> int:
        """How many documents are stored, or pass `filter`."""

    def optimize(self) -> None:  # noqa: B027  (a backend without it is complete)
        """Build what makes a large index fast, where there is such a thing. Call it after loading."""

    def close(self) -> None:  # noqa: B027  (nothing to close is the common case)
        """Release what the index holds open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_limit(limit: int) -> None:
    """Raise an `ArgumentError` unless `limit` passages can be asked for: from 1 on, also more than there are."""
    if limit < 1:
        raise ArgumentError(f"expected to recall at least 1 passage, found {limit}")


def check_vector(vector: Floats, width: int) -> None:
    """Raise unless `vector` has shape [width] and is finite: a NaN query finds nothing and says nothing."""
    if vector.shape != (width,):
        raise MismatchError(f"the index holds vectors of {width} dimensions, the query has shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ArgumentError("the query vector holds NaN or infinity")


def check_points(points: Sequence[Point], embedding_dim: int, feature_dim: int) -> None:
    """Raise if a point's vector or features have another width, or are not finite, so that it is never stored."""
    for point in points:
        for what, found, width in (("vectors", point.vector, embedding_dim), ("features", point.features, feature_dim)):
            if found.shape != (width,):
                raise MismatchError(f"the index holds {what} of {width} dimensions, {point.id!r} has {found.shape}")
        if not (np.isfinite(point.vector).all() and np.isfinite(point.features).all()):
            raise ArgumentError(f"the vector or features of {point.id!r} hold NaN or infinity")
