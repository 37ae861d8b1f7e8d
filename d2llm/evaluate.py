"""What each stage of a model is worth on judged data: tables of plain numbers, for the command line and for code.

Q queries, N passages or pairs, K candidates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from d2llm.beir import RetrievalData
from d2llm.bm25 import Bm25
from d2llm.deprecated import warn
from d2llm.errors import ArgumentError, DataError, import_extra
from d2llm.metrics import (
    Run,
    best_threshold,
    classification,
    correlations,
    evaluate,
    evaluate_each,
    itself,
    overlap,
    paired_test,
    per_query,
)
from d2llm.model import Model
from d2llm.pairs import Pair
from d2llm.types import Embeddings, Floats, Task

Table: TypeAlias = dict[str, dict[str, float]]
"""`{row: {measure: value}}`."""

STAGES = ("BM25", "recall", "recall + IEM", "exhaustive IEM")
"""The rows that every model has."""
EXHAUSTIVE = STAGES[-1]
MAIN_MEASURE = "nDCG@10"
"""What retention and significance are about."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ids, best first, for each query."""

    ids: list[list[str]]

    @classmethod
    def of(cls, run: Run, queries: Iterable[str]) -> Ranking:
        """The order in which trec_eval reads `run`: by score, equal ones by id, both descending.

        A query that the run lacks has no ids.
        """
        return cls(
            [sorted(docs, key=lambda id_: (docs[id_], id_), reverse=True) for docs in (run.get(q, {}) for q in queries)]
        )

    def run(self, queries: Iterable[str]) -> Run:
        """As trec_eval takes it. Scores are made from the ranks, so that ties stay as they are ordered here."""
        return {
            q: {id_: -float(rank) for rank, id_ in enumerate(ids, 1)} for q, ids in zip(queries, self.ids, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The stages of one model on one data set, as rankings of the same queries, and the table of their measures."""

    rankings: dict[str, Ranking]
    table: Table


def evaluate_retrieval(
    model: Model,
    data: RetrievalData,
    *,
    candidates: int = 100,
    task: Task = "asymmetric",
    others: Mapping[str, Ranking] | None = None,
    progress: bool = False,
    recall: int | None = None,
) -> Retrieval:
    """Rank with BM25, by recall alone, by recall and IEM, and by the IEM over everything: the rows of `STAGES`.

    Each stage ranks `candidates` passages: below 100 they also bound Recall@100. A document that is the query `itself`
    is left out. `others` are further rows: rankings of `data.queries` by other systems, used as they are.
    Measures: those of `metrics.MEASURES`, and `overlap@10`: how much of the exhaustive IEM's first ten the row has
    among its own. The embeddings are held in memory: for data sets, not for corpora.

    `recall` is the old name of `candidates`.
    """
    if recall is not None:
        warn("recall", "candidates")
        candidates = recall
    import_extra("ir_measures", "eval")  # what is missing is said now, not after minutes of encoding
    ids, contents = list(data.documents), [document.content for document in data.documents.values()]
    bm25 = Bm25(contents)
    documents = model.encode_document(contents, progress=progress)
    queries = model.encode_query(list(data.queries.values()), progress=progress)
    by_words, exhaustive = Ranking([]), Ranking([])
    for row, (query_id, text) in enumerate(tqdm(data.queries.items(), unit="query", disable=not progress)):
        query = Embeddings(queries.vectors[row : row + 1], queries.features[row : row + 1])
        for ranking, scores_N in (
            (by_words, bm25.scores(text)),
            (exhaustive, model.score_all(query, documents, task)[0]),
        ):
            ranking.ids.extend(_ranking(ids, _nearest(ids, scores_N, candidates, itself(query_id, data.qrels))).ids)
    stages = by_words, *recall_and_rescore(model, data, documents, queries, candidates, task), exhaustive
    rankings = {**dict(zip(STAGES, stages, strict=True)), **(others or {})}
    return Retrieval(rankings, tabulate(rankings, list(data.queries), data))


def recall_and_rescore(
    model: Model, data: RetrievalData, documents: Embeddings, queries: Embeddings, candidates: int, task: Task
) -> tuple[Ranking, Ranking]:
    """Two rankings: the `candidates` nearest documents of `data` by exact search, and the same after the IEM.

    The document that is the query `itself` is left out. `documents` and `queries` are the embeddings of the documents
    and queries of `data`, in the same order.
    """
    ids = list(data.documents)
    found, rescored = Ranking([]), Ranking([])
    for query_id, vector, features in zip(data.queries, queries.vectors, queries.features, strict=True):
        cosine_1N = vector[None] @ documents.vectors.T
        nearest_1K = _nearest(ids, cosine_1N[0], candidates, itself(query_id, data.qrels))
        cosine_1K = np.take_along_axis(cosine_1N, nearest_1K, axis=1)
        iem_1K = model.score(features[None], documents.features[nearest_1K], cosine_1K, task)
        found.ids.extend(_ranking(ids, nearest_1K).ids)
        rescored.ids.extend(rerank(ids, nearest_1K, iem_1K).ids)
    return found, rescored


def tabulate(rankings: Mapping[str, Ranking], queries: Sequence[str], data: RetrievalData) -> Table:
    """The measures of each ranking; overlap is with the one called `exhaustive IEM`."""
    exact = rankings[EXHAUSTIVE].ids
    return {
        name: {**evaluate(ranking.run(queries), data.qrels), "overlap@10": overlap(ranking.ids, exact)}
        for name, ranking in rankings.items()
    }


def tabulate_queries(rankings: Mapping[str, Ranking], data: RetrievalData) -> dict[str, Table]:
    """The measures of each query: `{query id: {row: {measure: value}}}`."""
    found = {name: evaluate_each(ranking.run(data.queries), data.qrels) for name, ranking in rankings.items()}
    return {query: {name: values[query] for name, values in found.items()} for query in data.queries}


def significance(rankings: Mapping[str, Ranking], data: RetrievalData, baseline: str = "recall") -> Table:
    """`metrics.paired_test` of the nDCG@10 of every other row against that of the row `baseline`.

    Raises:
        ArgumentError: there is no such row, or only one query.
    """
    _require_row(baseline, rankings)
    values = {
        name: list(per_query(ranking.run(data.queries), data.qrels, MAIN_MEASURE).values())
        for name, ranking in rankings.items()
    }
    return {name: paired_test(row, values[baseline]) for name, row in values.items() if name != baseline}


def retention(table: Table, teacher: str) -> dict[str, float]:
    """nDCG@10 of each row in percent of the row `teacher`.

    Raises:
        ArgumentError: there is no such row.
        DataError: the teacher's nDCG@10 is 0.
    """
    _require_row(teacher, table)
    best = table[teacher][MAIN_MEASURE]
    if best == 0:
        raise DataError(f"the teacher {teacher!r} has {MAIN_MEASURE} 0: there is nothing to retain")
    return {name: 100 * (values[MAIN_MEASURE] / best) for name, values in table.items()}


def rerank(ids: Sequence[str], candidates_QK: npt.NDArray[np.int64], scores_QK: Floats) -> Ranking:
    """The candidates of each query, given as indices into `ids`, ordered by their scores."""
    return _ranking(ids, np.take_along_axis(candidates_QK, _top(scores_QK, scores_QK.shape[1]), axis=1))


def evaluate_pairs(
    model: Model, pairs: Sequence[Pair], task: Task = "symmetric", *, threshold_pairs: Sequence[Pair] | None = None
) -> Table:
    """How well the cosine and the IEM, the two rows, agree with judged pairs.

    Scored pairs (STS): Pearson and Spearman. Labelled pairs (NLI): accuracy, precision and recall of telling entailment
    from the rest, and average precision, in the symmetric branch as in the paper (tables 1 and 2). The paper does not
    say where its threshold comes from. Here it is the one with the highest accuracy on `threshold_pairs`, or, without
    them, on `pairs` themselves: then accuracy is the best that any threshold could reach, an upper bound.

    Raises:
        DataError: all pairs have the same judgement.
        ArgumentError: some pairs have a score and others a label, or `threshold_pairs` have no labels.
    """
    scores = _score_pairs(model, pairs, task)
    gold = [pair.score for pair in pairs if pair.score is not None]
    if len(gold) == len(pairs) and threshold_pairs is None:
        return {name: correlations(scores_N, gold) for name, scores_N in scores.items()}
    labels = _labels(pairs)
    chosen_from = pairs if threshold_pairs is None else threshold_pairs
    their_labels = _labels(chosen_from)
    their_scores = scores if threshold_pairs is None else _score_pairs(model, threshold_pairs, task)
    return {
        name: classification(scores_N, labels, best_threshold(their_scores[name], their_labels))
        for name, scores_N in scores.items()
    }


def _require_row(name: str, rows: Collection[str]) -> None:
    if name not in rows:
        raise ArgumentError(f"no row {name!r}: the rows are {', '.join(rows)}")


def _score_pairs(model: Model, pairs: Sequence[Pair], task: Task) -> dict[str, Floats]:
    """Cosine and IEM score of each of the N pairs."""
    a = model.encode_query([pair.text_a for pair in pairs])
    b = model.encode_document([pair.text_b for pair in pairs])
    cosine_N = np.einsum("ne,ne->n", a.vectors, b.vectors)
    iem_N1 = model.score(a.features, b.features[:, None], cosine_N[:, None], task)
    return {"cosine": cosine_N, "IEM": iem_N1[:, 0]}


def _labels(pairs: Sequence[Pair]) -> list[bool]:
    labels = [pair.label for pair in pairs if pair.label is not None]
    if len(labels) != len(pairs):
        raise ArgumentError(f"expected pairs with labels: {len(pairs) - len(labels)} of {len(pairs)} have none")
    return labels


def _nearest(ids: Sequence[str], scores_N: Floats, k: int, without: str | None) -> npt.NDArray[np.int64]:
    """Indices [1, K] of the k best documents, best first, but for the one of the id `without`."""
    best = [i for i in _top(scores_N[None], k + 1)[0].tolist() if ids[i] != without]
    return np.array([best[:k]], np.int64)


def _top(scores_QN: Floats, k: int) -> npt.NDArray[np.int64]:
    best: npt.NDArray[np.int64] = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return best


def _ranking(ids: Sequence[str], best_QK: npt.NDArray[np.int64]) -> Ranking:
    return Ranking([[ids[i] for i in row] for row in best_QK])
