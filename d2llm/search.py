"""Search: fetch candidates from an index, then rescore them with the IEM. Needs neither torch nor Qdrant."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex, TypedDict, Unpack, get_args

import numpy as np

from d2llm.deprecated import renamed
from d2llm.errors import ArgumentError, ChangedError, DataError, StoreError
from d2llm.filters import check_filter
from d2llm.index import Index
from d2llm.model import Model, Tokens
from d2llm.reasons import Reasons, reasons_of, reasons_of_recall
from d2llm.types import Candidates, Filter, Floats, Fusion, Hit, Scales, Task, stacked, task_id

BM25_WEIGHT = 0.1
"""The default weight of BM25 scores beside IEM scores, in a hybrid search with a model whose score has no words.

It is the best of eight values on training queries of medquad, a domain that the model was trained on. In other domains
a higher weight is better (docs/results.md)."""

BATCH = 8192
"""The number of candidates that are recalled and rescored at once, if there are several queries. It bounds memory."""

MAX_BM25_WEIGHT = 1e6
"""The largest weight of BM25. Above it only BM25 would count, and float32 sums would overflow."""

OLD_NAMES = {"recall": "candidates", "words_weight": "bm25_weight"}
"""The options that had another name in the last release, `{old: new}`."""


class SearchKeywords(TypedDict, total=False):
    """The fields of `SearchOptions` except `k`, as keyword arguments."""

    candidates: int
    filter: Filter | None
    task: Task
    rescore: bool
    hybrid: Fusion | None
    bm25_weight: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """The options of one search.

    Raises:
        ArgumentError: `k` is below 1 or above `candidates`, the task or the fusion is unknown, the filter is malformed,
            or the weight is negative or above `MAX_BM25_WEIGHT`.

    Example:
        >>> options = d2llm.SearchOptions(k=3, candidates=50)
        >>> options.changed({"filter": {"lang": "en"}}).filter
        {'lang': 'en'}
    """

    k: int = 10
    """The number of hits to return."""
    candidates: int = 100
    """The number of passages that recall fetches and the IEM rescores. If they are of fewer than `k` documents, recall
    fetches more."""
    filter: Filter | None = None
    """Search only passages whose payload matches this filter (see `Filter`)."""
    task: Task = "asymmetric"
    """The branch of the IEM."""
    rescore: bool = True
    """Whether the IEM rescores the candidates. If not, the hits keep the order of recall."""
    hybrid: Fusion | None = None
    """How hybrid recall merges the cosine ranking and the BM25 ranking. None recalls by cosine alone."""
    bm25_weight: float | None = None
    """The weight of BM25 scores beside IEM scores in a hybrid search (see `add_bm25`). None: `default_bm25_weight`."""

    def __post_init__(self) -> None:
        for name in ("k", "candidates"):
            if not isinstance(value := getattr(self, name), SupportsIndex):
                raise ArgumentError(f"expected {name} to be a whole number, found {value!r}")
            object.__setattr__(self, name, operator.index(value))  # numpy's whole numbers become Python's
        if not 1 <= self.k <= self.candidates:
            raise ArgumentError(
                f"expected 1 <= k <= candidates, found k={self.k}, candidates={self.candidates}: raise candidates or "
                "lower k"
            )
        task_id(self.task)
        if self.hybrid is not None and self.hybrid not in get_args(Fusion):
            raise ArgumentError(f"unknown fusion {self.hybrid!r}: choose one of {', '.join(get_args(Fusion))}, or None")
        if self.bm25_weight is not None and not 0 <= self.bm25_weight <= MAX_BM25_WEIGHT:
            raise ArgumentError(f"expected bm25_weight from 0 to {MAX_BM25_WEIGHT:,.0f}, found {self.bm25_weight}")
        if self.filter:
            check_filter(self.filter)

    def changed(self, changes: Mapping[str, Any]) -> SearchOptions:
        """Return a copy of these options with `changes`, `{name: value}`. Old names work with a warning.

        Raises:
            ArgumentError: a value is out of range; see the class.
            TypeError: there is no option of a given name.
        """
        return replace(self, **renamed(changes, OLD_NAMES))


@dataclass(frozen=True, slots=True)
class Explanation:
    """The hits of one search, with the number of candidates and the duration of each stage.

    `candidates` is the number of passages that recall fetched. `truncated` says whether the query was cut to the length
    limit. `seconds` holds the duration of each stage: tokenise, encode, recall, rescore. `reasons` say why the
    candidates have their scores, if they were asked for.
    """

    hits: list[Hit]
    candidates: int
    truncated: bool
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: Reasons | None = None


class Searcher:
    """Search an index with the model that made it: recall, then rescoring by the IEM.

    Example:
        >>> index = d2llm.FlatIndex()
        >>> report = index.add(model, [{"id": "a", "text": "Refunds take five days."}])
        >>> d2llm.Searcher(model, index).search("how long does a refund take?")[0].id
        'a'
    """

    def __init__(
        self, model: Model, index: Index, *, scales: Scales | None = None, **options: Unpack[SearchKeywords]
    ) -> None:
        """Open `index` for `model`. `options` are the defaults of every search, fields of `SearchOptions`.

        `scales` weigh the parts of the IEM's score. None takes those that the index has now (see `d2llm tune
        --calibrate`), or else the model's.

        Raises:
            ArgumentError: an option is out of range (see `SearchOptions`), or a scale is not possible.
            MismatchError: another passage encoder made the index, or the scales are of other parts than the model's.
            StoreError: the index does not exist or cannot be reached.
        """
        if not isinstance(index, Index):
            raise TypeError(f"expected an index, such as QdrantIndex or FlatIndex; found {index!r}")
        self.options = SearchOptions().changed(options)
        index.open_for(model.config, create=False)
        self.model, self.index = model, index
        self._scales = (
            index.scales_for(model.config)
            if scales is None
            else model.config.scales_with(scales, "the argument scales", "name these parts")
        )

    def search(self, query: str, k: int | None = None, **options: Unpack[SearchKeywords]) -> list[Hit]:
        """Return the `k` best hits for `query`.

        Recall fetches the nearest passages by cosine, and the IEM rescores them. `options` are fields of
        `SearchOptions`. The searcher's defaults replace options that are not given.

        Cost: one query encoding, one index query for the candidates and their features, one IEM call.

        Raises:
            DataError: the query is empty.
            StoreError: the index is empty, cannot be reached, or is in use.
            MismatchError: the search is hybrid and the index has no BM25 vectors.
            ArgumentError: an option is out of range; see `SearchOptions`.
            TypeError: the query is not a string, or there is no option of a given name.
        """
        return self.explain(query, k, **options).hits

    def explain(
        self, query: str, k: int | None = None, *, reasons: bool = False, **options: Unpack[SearchKeywords]
    ) -> Explanation:
        """Search as `search` does, and measure how long each stage takes. With `reasons`, also find what each part of
        the score and each shared word adds to the scores of all candidates."""
        _check_query(query)
        return self.explain_many([query], k, reasons=reasons, **options)[0]

    async def asearch(self, query: str, k: int | None = None, **options: Unpack[SearchKeywords]) -> list[Hit]:
        """Search as `search` does, for an event loop. It awaits a server without a thread, and computes in a thread."""
        _check_query(query)
        return (await self.asearch_many([query], k, **options))[0]

    def search_many(
        self, queries: Sequence[str], k: int | None = None, **options: Unpack[SearchKeywords]
    ) -> list[list[Hit]]:
        """Return the `k` best hits for each of `queries`, the same as `search` finds, in less time.

        Cost: the queries are encoded in batches. Then for every `BATCH` candidates, the index is asked once, and the
        IEM is called once. Memory grows with the queries and hits, not with the candidates.

        Raises:
            DataError: a query is empty; says which.
            TypeError: `queries` is a single string, or a query is not a string.
            StoreError, MismatchError, ArgumentError: see `search`.

        Example:
            >>> index = d2llm.FlatIndex()
            >>> report = index.add(model, [{"id": "a", "text": "Refunds take five days."}])
            >>> [hits[0].id for hits in d2llm.Searcher(model, index).search_many(["refund", "how many days?"])]
            ['a', 'a']
        """
        return [found.hits for found in self.explain_many(queries, k, **options)]

    def explain_many(
        self, queries: Sequence[str], k: int | None = None, *, reasons: bool = False, **options: Unpack[SearchKeywords]
    ) -> list[Explanation]:
        """Search as `search_many` does, and explain as `explain` does. The durations are those of all queries
        together."""
        chosen = self._merged_options(k, options)
        found, seconds = list[Explanation](), dict[str, float]()
        for batch in self._batches(_checked(queries), chosen, seconds):
            for payloads in (reasons, True):
                with suppress(ChangedError):
                    batch.start()
                    while batch.unanswered:
                        with _timed(seconds, "recall"):
                            batch.take(self.index.recall_many(**batch.request(payloads)))
                    found += self._explain(batch, reasons, seconds)
                    break
        return found

    async def asearch_many(
        self, queries: Sequence[str], k: int | None = None, **options: Unpack[SearchKeywords]
    ) -> list[list[Hit]]:
        """Search as `search_many` does, for an event loop (see `asearch`)."""
        return [found.hits for found in await self.aexplain_many(queries, k, **options)]

    async def aexplain_many(
        self, queries: Sequence[str], k: int | None = None, *, reasons: bool = False, **options: Unpack[SearchKeywords]
    ) -> list[Explanation]:
        """Search as `explain_many` does, for an event loop (see `asearch`)."""
        chosen = self._merged_options(k, options)
        found, seconds = list[Explanation](), dict[str, float]()
        for batch in await asyncio.to_thread(self._batches, _checked(queries), chosen, seconds):
            for payloads in (reasons, True):
                with suppress(ChangedError):
                    batch.start()
                    while batch.unanswered:
                        with _timed(seconds, "recall"):
                            batch.take(await self.index.arecall_many(**batch.request(payloads)))
                    found += await asyncio.to_thread(self._explain, batch, reasons, seconds)
                    break
        return found

    def rerank(self, query: str, ids: Iterable[str], task: Task | None = None) -> list[Hit]:
        """Rank documents that something else found, by the score that a search gives them.

        Only the query is encoded: the features of the passages come from the index. Returns a hit for each stored
        document among `ids`; `recall_rank` is its rank by cosine among their passages.

        Raises:
            DataError: the query is empty.
            StoreError: the index cannot be reached, or is in use.
            ArgumentError: an unknown task.
            TypeError: the query is not a string, or `ids` is a single string or contains something else.

        Example:
            >>> index = d2llm.FlatIndex()
            >>> report = index.add(model, [{"id": "a", "text": "Refunds take five days."}, {"id": "b", "text": "Sun."}])
            >>> [hit.id for hit in d2llm.Searcher(model, index).rerank("how long does a refund take?", ["b", "a"])]
            ['a', 'b']
        """
        _check_query(query)
        (batch,) = self._batches([query], self._merged_options(None, {} if task is None else {"task": task}), {})
        batch.found = [self.index.candidates(ids, batch.vectors_QE[0])]
        scores_K = self._score(batch)[0] if len(batch.found[0]) else None
        return rank(batch.found[0], scores_K, len(batch.found[0]))

    def _merged_options(self, k: int | None, options: Mapping[str, Any]) -> SearchOptions:
        """Return the searcher's defaults, changed by `options` and `k`."""
        return self.options.changed(options if k is None else {**options, "k": k})

    def _batches(self, queries: list[str], options: SearchOptions, seconds: dict[str, float]) -> list[_Batch]:
        """Encode the queries, and return them in batches for the index and the IEM."""
        with _timed(seconds, "tokenise"):
            tokens = self.model.query.tokenize(queries)
        with _timed(seconds, "encode"):
            if len(queries) == 1:  # its features stay on the device where the IEM reads them
                vectors_QE, features_QH = self.model.query.run(tokens, keep_features=True)
                return [_Batch(queries, vectors_QE, features_QH, tokens, options)]
            encoded = self.model.query.encode_tokens(tokens)
        size = max(1, BATCH // options.candidates)
        return [
            _Batch(queries[rows], encoded.vectors[rows], encoded.features[rows], tokens[rows], options)
            for rows in (slice(start, start + size) for start in range(0, len(queries), size))
        ]

    def _explain(self, batch: _Batch, reasons: bool, seconds: dict[str, float]) -> list[Explanation]:
        """Rescore and rank the candidates of each query of a batch."""
        options = batch.options
        if not options.filter and not all(map(len, batch.found)):
            raise StoreError("the index is empty: add documents first, with Index.add or `d2llm index`")
        scores: Sequence[Floats | None] = [None] * len(batch.found)
        if options.rescore and any(map(len, batch.found)):
            with _timed(seconds, "rescore"):
                scores = self._score(batch)
        return [
            Explanation(
                rank(candidates, scores_K, options.k, self.index.with_payloads),
                len(candidates),
                tokens.truncated,
                seconds,
                self._reasons(batch, row) if reasons else None,
            )
            for row, (candidates, scores_K, tokens) in enumerate(zip(batch.found, scores, batch.tokens, strict=True))
        ]

    def _score(self, batch: _Batch) -> list[Floats]:
        """Return the scores [K] of the candidates of each query of a batch, by one call of the IEM."""
        task = batch.options.task
        features_QKP = stacked([candidates.features for candidates in batch.found])
        cosine_QK = stacked([candidates.scores for candidates in batch.found])
        scales = self._scales.get(task)
        iem_QK = self.model.score(batch.features_QH, features_QKP, cosine_QK, task, scales=scales)
        weight = self._bm25_weight(batch.options)
        return [
            iem_K[: len(candidates)]
            if candidates.bm25_scores is None
            else add_bm25(iem_K[: len(candidates)], candidates.bm25_scores, weight)
            for iem_K, candidates in zip(iem_QK, batch.found, strict=True)
        ]

    def _bm25_weight(self, options: SearchOptions) -> float:
        if options.bm25_weight is not None:
            return options.bm25_weight
        return default_bm25_weight(self.model.config.parts, self._scales.get(options.task, ()))

    def _reasons(self, batch: _Batch, row: int) -> Reasons:
        """Return the reasons for the scores of one query of a batch."""
        candidates, options = batch.found[row], batch.options
        if not (options.rescore and len(candidates)):
            return reasons_of_recall(candidates)
        scales = dict(zip(self.model.config.parts, self._scales[options.task], strict=True))
        features_1H = batch.features_QH if len(batch.found) == 1 else batch.features_QH[row : row + 1]
        weight = self._bm25_weight(options)
        return reasons_of(self.model, batch.queries[row], features_1H, candidates, options.task, scales, weight)


class _Batch:
    """Q encoded queries that are searched together, and the candidates found for each.

    Recall fetches passages. A long document may have so many near a query that few other documents are among them. So a
    query stays `unanswered` until it has candidates of `k` documents, or the index has no more.
    """

    def __init__(
        self, queries: list[str], vectors_QE: Floats, features_QH: Any, tokens: list[Tokens], options: SearchOptions
    ) -> None:
        """`features_QH` are an array, or an `OrtValue` on the device where the model computed them."""
        self.queries, self.vectors_QE, self.features_QH = queries, vectors_QE, features_QH
        self.tokens, self.options = tokens, options
        self.start()

    def start(self) -> None:
        """Begin anew: no query is answered."""
        self.found = list[Candidates]()
        self.unanswered = list(range(len(self.queries)))
        self._limit = self.options.candidates

    def request(self, payloads: bool) -> dict[str, Any]:
        """Return the arguments of `Index.recall_many` for the queries that are unanswered."""
        rows, options = self.unanswered, self.options
        request = {
            "vectors": self.vectors_QE[rows], "limit": self._limit, "filter": options.filter, "payloads": payloads,
        }  # fmt: skip
        if options.hybrid is None:
            return request
        return {**request, "query_texts": [self.queries[row] for row in rows], "fusion": options.hybrid}

    def take(self, found: Sequence[Candidates]) -> None:
        """Take the candidates of the queries that were unanswered."""
        self.found = self.found or list(found)  # the first answer is for all queries
        for row, candidates in zip(self.unanswered, found, strict=True):
            self.found[row] = candidates
        self.unanswered = [row for row in self.unanswered if self._lacks_documents(self.found[row])]
        self._limit *= 2

    def _lacks_documents(self, candidates: Candidates) -> bool:
        return len(candidates) >= self._limit and len(set(candidates.ids)) < self.options.k


def _checked(queries: Sequence[str]) -> list[str]:
    """Return the queries after checking each."""
    if isinstance(queries, str):
        raise TypeError(f"expected a list of queries, found a single string: pass [{queries!r}]")
    queries = list(queries)
    for number, query in enumerate(queries, 1):
        _check_query(query, f"query {number} of {len(queries)}: " if len(queries) > 1 else "")
    return queries


def _check_query(query: str, place: str = "") -> None:
    if not isinstance(query, str):
        raise TypeError(f"{place}expected one query as a string, found {query!r}")
    if not query.strip():
        raise DataError(f"{place}the query is empty ({query!r}): type at least one word")


def default_bm25_weight(parts: Sequence[str], scales: Sequence[float]) -> float:
    """Return the weight of BM25 in hybrid searches with a model whose score has these `parts` with these `scales`: 0 if
    words are among them, since they are BM25 already, otherwise `BM25_WEIGHT`."""
    return 0.0 if dict(zip(parts, scales, strict=False)).get("words") else BM25_WEIGHT


def add_bm25(iem_K: Floats, bm25_K: Floats, weight: float) -> Floats:
    """Return the IEM scores [K] plus `weight` times the standardised BM25 scores [K].

    IEM and BM25 have no scale in common. So the BM25 scores are first shifted to mean 0 and scaled to the standard
    deviation of the candidates' IEM scores.
    """
    spread = float(bm25_K.std())
    if spread == 0:
        return iem_K
    scores_K: Floats = iem_K + weight * iem_K.std() * (bm25_K - bm25_K.mean()) / spread
    return scores_K


def rank(
    candidates: Candidates,
    scores_K: Floats | None,
    k: int,
    with_payloads: Callable[[Candidates, Sequence[int]], Candidates] = Candidates.rows,
) -> list[Hit]:
    """Return the `k` documents with the highest scores [K] as hits. Equal scores keep the order of recall.

    The score of a document is that of its best passage. Without scores, all candidates keep the order of recall.
    `with_payloads` completes candidates that lack their payloads (see `Index.with_payloads`).
    """
    best = range(len(candidates)) if scores_K is None else np.argsort(-scores_K, kind="stable").tolist()
    scores_K = candidates.scores if scores_K is None else scores_K
    documents: dict[str, int] = {}  # and the best candidate of each
    for i in best:
        documents.setdefault(candidates.ids[i], i)
        if len(documents) == k:
            break
    rows = list(documents.values())
    complete = with_payloads(candidates, rows)
    return [complete.hit(i, float(scores_K[row]), rank=row + 1) for i, row in enumerate(rows)]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
