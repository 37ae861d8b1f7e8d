"""`Index`, the contract that every index fulfils, and the checks that all of them share."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from typing import Any, Self

import numpy as np
from tqdm.auto import tqdm

from d2llm.errors import ArgumentError, DataError, MismatchError
from d2llm.folder import ModelConfig
from d2llm.indexing import BATCH, AddReport, encoded_batches
from d2llm.model import Model
from d2llm.types import Candidates, Document, Filter, Floats, Fusion, Point, Scales, strings


class Index(ABC):
    """Passage vectors, features and payloads by document id, all made by the same passage encoder.

    Example:
        >>> with d2llm.FlatIndex() as index:
        ...     report = index.add(model, [{"id": "a", "text": "Refunds take five days.", "lang": "en"}])
        ...     isinstance(index, d2llm.Index), report.added, index.count({"lang": "de"})
        (True, 1, 0)
    """

    @property
    def scales(self) -> Scales | None:
        """The scales that searches of this index use, in place of the model's. None: the model's."""
        return None

    def scales_for(self, config: ModelConfig) -> dict[str, list[float]]:
        """Return the weight of each part of the score in searches of this index with a model, by branch.

        Raises:
            MismatchError: the index has `scales` of other parts than the model's.
        """
        remedy = "remove them (d2llm tune MODEL --calibrate --reset), then calibrate again"
        return config.scales_with(self.scales, "the index", remedy)

    def add(
        self,
        model: Model,
        documents: Iterable[Document | Mapping[str, Any]],
        *,
        chunk: bool = True,
        prune: bool = False,
        keep: Iterable[str] = (),
        progress: bool = False,
        total: int | None = None,
    ) -> AddReport:
        """Encode and store `documents`.

        A document that is longer than the model's limit is split into passages, which are encoded and stored each (see
        `d2llm.passages.split`). Without `chunk` it loses its end. All methods of an index speak of documents, except
        that `recall` returns passages. Searches return documents, each with its best passage.

        Documents that the index has with the same content are skipped, so run an interrupted job again to complete it.
        Documents with new content replace the stored ones. With `prune`, stored documents that are not in `documents`
        are removed at the end, but for those whose ids are in `keep`.

        Reading, tokenising, encoding and storing overlap. Memory does not grow with the number of documents, except
        that `prune` needs 60 bytes for each. `progress` shows a progress bar; `total` is its length.

        Raises:
            DataError: a document is empty, lacks a field or has a reserved payload key; an id occurs twice within a
                batch; or `prune` is given and there are no documents.
            MismatchError: another passage encoder made the index.
            StoreError: the index cannot be reached or is in use.
            TypeError: `documents` is a single document, or contains something that is neither a `Document` nor a
                mapping; or `keep` is a single string.
        """
        if isinstance(documents, str | Mapping | Document):
            raise TypeError("expected a list of documents, found a single one: pass [document]")
        kept = {hash(id_) for id_ in strings(keep, "id")}
        self.open_for(model.config)
        report = AddReport()
        seen: set[int] = set()
        batches = encoded_batches(model, documents, self.digests, seen if prune else None, chunk=chunk)
        with tqdm(total=total, unit="doc", disable=not progress) as bar, closing(batches):
            for batch in batches:
                if batch.points:
                    self.upsert(batch.points)
                report.count(batch)
                bar.update(report.added + report.unchanged - bar.n)
        self.tidy()
        if prune:
            report.pruned = self._prune(seen, kept)
        return report

    def prune(self, ids: Iterable[str]) -> int:
        """Remove every document whose id is not in `ids`. Returns the number of removed documents.

        Raises:
            DataError: `ids` is empty, which would empty the index.
            TypeError: `ids` is a single string, or contains something that is not a string.
        """
        return self._prune({hash(id_) for id_ in strings(ids, "id")})

    def _prune(self, seen: set[int], kept: Set[int] = frozenset()) -> int:
        if not seen:
            raise DataError("no documents were given, and pruning would empty the index: check the corpus")
        staying = seen | kept
        stale = [id_ for id_ in self.ids() if hash(id_) not in staying]
        for start in range(0, len(stale), BATCH):
            self.delete(stale[start : start + BATCH])
        return len(stale)

    @contextmanager
    def bulk_load(self) -> Iterator[None]:
        """Defer `optimize` to the end of the block. Use it around `add` when you store many documents."""
        yield
        self.optimize()

    @abstractmethod
    def open_for(self, config: ModelConfig, *, create: bool = True) -> None:
        """Open the index for the model that `config` describes. With `create`, create the index if it is missing.

        Raises:
            MismatchError: another passage encoder made the index.
            StoreError: the index is missing (without `create`), cannot be reached, or is in use.
        """

    @abstractmethod
    def upsert(self, points: Sequence[Point]) -> None:
        """Store points. The points of a document come together, and replace it at once. All are acknowledged when this
        returns."""

    def tidy(self) -> None:  # noqa: B027  (an index that replaces a document in one step leaves nothing behind)
        """Remove passages that interrupted jobs left. No search finds them. `add` calls this at its end."""

    @abstractmethod
    def digests(self, ids: Iterable[str]) -> dict[str, str]:
        """Return the content digests of the stored documents among `ids`, `{id: digest}`.

        Raises:
            TypeError: `ids` is a single string, or contains something that is not a string.
        """

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Yield every stored id, in no particular order.

        The ids of documents that are added or removed meanwhile may or may not be included.
        """

    @abstractmethod
    def recall(
        self, vector: Floats, limit: int, *, filter: Filter | None = None, query_text: str = "", fusion: Fusion = "rrf"
    ) -> Candidates:
        """Fetch the `limit` passages nearest to `vector` [E] by cosine, best first. Several may be of one document.

        With `filter`, only passages whose payload matches it are fetched.

        With `query_text`, recall is hybrid: BM25 also fetches `limit` passages, `fusion` merges the two rankings, and
        the `limit` best passages of the merged ranking come back in its order, each with its cosine.

        Raises:
            MismatchError: `vector` has another width, or `query_text` is given and the index has no BM25 vectors.
            ArgumentError: `vector` holds NaN or infinity, `limit` is below 1, or `filter` is malformed.
            StoreError: the index is missing, cannot be reached, or is in use.
        """

    async def arecall(
        self, vector: Floats, limit: int, *, filter: Filter | None = None, query_text: str = "", fusion: Fusion = "rrf"
    ) -> Candidates:
        """Await `recall` in an event loop. It runs in a thread, unless the index can wait without one."""
        return await asyncio.to_thread(self.recall, vector, limit, filter=filter, query_text=query_text, fusion=fusion)

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
        """Do `recall` for each of Q vectors [Q, E], at once if the index can. `query_texts` are Q texts, or none.

        Without `payloads`, an index may leave out the payloads and places of the candidates, if it can find them faster
        so. Then `with_payloads` completes those that are needed.

        Raises:
            ArgumentError: there are texts, but not one for each vector; see also `recall`.
        """
        check_texts(query_texts, vectors)
        texts = query_texts or [""] * len(vectors)
        return [
            self.recall(vector, limit, filter=filter, query_text=text, fusion=fusion)
            for vector, text in zip(vectors, texts, strict=True)
        ]

    async def arecall_many(
        self,
        vectors: Floats | Sequence[Floats],
        limit: int,
        *,
        filter: Filter | None = None,
        query_texts: Sequence[str] = (),
        fusion: Fusion = "rrf",
        payloads: bool = True,
    ) -> list[Candidates]:
        """Await `recall_many` in an event loop. It runs in a thread, unless the index can wait without one."""
        return await asyncio.to_thread(
            self.recall_many, vectors, limit, filter=filter, query_texts=query_texts, fusion=fusion, payloads=payloads
        )

    def candidates(self, ids: Iterable[str], vector: Floats) -> Candidates:
        """Fetch all passages of the stored documents among `ids`, as `recall` does: best first by their cosine with
        `vector` [E].

        Raises:
            MismatchError: `vector` has another width.
            ArgumentError: `vector` holds NaN or infinity.
            StoreError: the index is missing, cannot be reached, or is in use.
            TypeError: `ids` is a single string, or contains something that is not a string.
            NotImplementedError: an index of your own does not have this method.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot fetch candidates by id: give it the method candidates")

    def with_payloads(self, candidates: Candidates, rows: Sequence[int]) -> Candidates:
        """Return these rows of candidates that `recall_many` found, with their payloads and places.

        Raises:
            ChangedError: a document was replaced or removed since.
            StoreError: the index cannot be reached.
        """
        return candidates.rows(rows)

    @abstractmethod
    def get(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the payloads of the stored documents among `ids`, `{id: payload}`, with their whole texts.

        Raises:
            TypeError: `ids` is a single string, or contains something that is not a string.
        """

    @abstractmethod
    def delete(self, ids: Iterable[str]) -> None:
        """Remove the documents with these `ids`. Ids that are not stored are ignored.

        Raises:
            TypeError: `ids` is a single string, or contains something that is not a string. Nothing is removed.
        """

    @abstractmethod
    def count(self, filter: Filter | None = None) -> int:
        """Return the number of stored documents, or of those whose payload matches `filter`."""

    def optimize(self) -> None:  # noqa: B027  (an index needs no such structure)
        """Build the structure that makes a large index fast, if the index has one. Call it after adding documents."""

    def close(self) -> None:  # noqa: B027  (nothing to close is the common case)
        """Release files and connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_limit(limit: int) -> None:
    """Raise an `ArgumentError` if `limit` is below 1. It may exceed the number of passages."""
    if limit < 1:
        raise ArgumentError(f"expected to recall at least 1 passage, found {limit}")


def check_texts(texts: Sequence[str], vectors: Floats | Sequence[Floats]) -> None:
    """Raise an `ArgumentError` unless there is one text for each vector, or none at all."""
    if texts and len(texts) != len(vectors):
        raise ArgumentError(f"a hybrid search needs one text for each vector, found {len(texts)} for {len(vectors)}")


def check_vector(vector: Floats, width: int) -> None:
    """Check that `vector` has shape [width] and is finite. Without the check, NaN would silently find nothing.

    Raises:
        MismatchError: `vector` has another shape.
        ArgumentError: `vector` holds NaN or infinity.
    """
    if vector.shape != (width,):
        raise MismatchError(
            f"the index holds vectors of {width} dimensions, the query has shape {vector.shape}: encode it with the "
            "model that made the index"
        )
    if not np.isfinite(vector).all():
        raise ArgumentError("the query vector holds NaN or infinity")


def check_points(points: Sequence[Point], embedding_dim: int, feature_bytes: int) -> None:
    """Check vector and features of each point, so that a bad point is never stored.

    Raises:
        MismatchError: a vector has another shape than [embedding_dim], or features are not uint8 [feature_bytes].
        ArgumentError: a vector holds NaN or infinity, or not all passages of a document are there.
    """
    for id_, parts in by_document(points).items():
        numbers = [0 if part.passage is None else part.passage.number for part in parts]
        of = 1 if parts[0].passage is None else parts[0].passage.of
        if numbers != list(range(of)):
            raise ArgumentError(
                f"document {id_!r} has {of} passages, found those of the numbers {numbers}: pass all of them at once, "
                "in their order"
            )
    for point in points:
        if point.vector.shape != (embedding_dim,):
            raise MismatchError(
                f"the index holds vectors of {embedding_dim} dimensions, {point.id!r} has {point.vector.shape}"
            )
        if point.features.dtype != np.uint8 or point.features.shape != (feature_bytes,):
            raise MismatchError(
                f"the index holds features of {feature_bytes} bytes, {point.id!r} has {point.features.dtype} "
                f"{point.features.shape}"
            )
        if not np.isfinite(point.vector).all():
            raise ArgumentError(f"the vector of {point.id!r} holds NaN or infinity")


def by_document(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Return the points of each document, `{id: points}`. If a document comes twice, the last one counts."""
    documents: dict[str, list[Point]] = {}
    for point in points:
        if point.passage is None or point.passage.number == 0:
            documents[point.id] = []
        documents.setdefault(point.id, []).append(point)
    return documents
