"""What each stage of a model is worth on judged data: tables of plain numbers, for the command line and for code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from d2llm.data import Pair, RetrievalData
from d2llm.errors import import_extra
from d2llm.lexical import Bm25
from d2llm.metrics import Run, evaluate, overlap
from d2llm.model import Model
from d2llm.types import Floats, Task

logger = logging.getLogger(__name__)

Table: TypeAlias = dict[str, dict[str, float]]
"""`{row: {measure: value}}`."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ids, best first, for each query."""

    ids: list[list[str]]

    def run(self, queries: Sequence[str]) -> Run:
        """As trec_eval takes it. Scores are made from the ranks, so that ties stay as they are ordered here."""
        return {
            q: {id_: -float(rank) for rank, id_ in enumerate(ids)} for q, ids in zip(queries, self.ids, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The stages of one model on one data set, as rankings of the same queries, and the table of their measures."""

    rankings: dict[str, Ranking]
    table: Table


def evaluate_retrieval(
    model: Model, data: RetrievalData, *, recall: int = 100, task: Task = "asymmetric", progress: bool = False
) -> Retrieval:
    """Rank with BM25, by recall alone, by recall and IEM, and by the IEM over everything.

    Measures: MRR@10, nDCG@10, Recall@100 (trec_eval's), and `overlap@10`: how much of the exhaustive IEM's first ten
    the row has among its own. Everything is held in memory: for data sets, not for corpora.
    """
    ids, queries = list(data.documents), list(data.queries)
    import_extra("ir_measures", "eval")  # what is missing is said now, not after minutes of encoding
    bm25 = Bm25([document.content for document in data.documents.values()])
    documents = model.encode_document([document.content for document in data.documents.values()], progress=progress)
    query = model.encode_query(list(data.queries.values()), progress=progress)
    cosine_QN = query.vectors @ documents.vectors.T
    nearest_QK = _top(cosine_QN, recall)
    cosine_QK = np.take_along_axis(cosine_QN, nearest_QK, axis=1)
    iem_QK = model.score(query.features, documents.features[nearest_QK], cosine_QK, task)
    exact_QN = model.score_all(query, documents, task)
    bm25_QN = np.stack([bm25.scores(text) for text in data.queries.values()])
    rankings = {
        "BM25": _ranking(ids, _top(bm25_QN, recall)),
        "recall": _ranking(ids, nearest_QK),
        "recall + IEM": rerank(ids, nearest_QK, iem_QK),
        "exhaustive IEM": _ranking(ids, _top(exact_QN, recall)),
    }
    return Retrieval(rankings, tabulate(rankings, queries, data))


def tabulate(rankings: dict[str, Ranking], queries: Sequence[str], data: RetrievalData) -> Table:
    """The measures of each ranking; overlap is with the one called `exhaustive IEM`."""
    exact = rankings["exhaustive IEM"].ids
    return {
        name: {**evaluate(ranking.run(queries), data.qrels), "overlap@10": overlap(ranking.ids, exact)}
        for name, ranking in rankings.items()
    }


def rerank(ids: Sequence[str], candidates_QK: npt.NDArray[np.int64], scores_QK: Floats) -> Ranking:
    """The candidates of each query, given as indices into `ids`, ordered by their scores."""
    return _ranking(ids, np.take_along_axis(candidates_QK, _top(scores_QK, scores_QK.shape[1]), axis=1))


def evaluate_pairs(model: Model, pairs: Sequence[Pair], task: Task = "symmetric") -> Table:
    """Pearson and Spearman correlation of cosine and of IEM scores with the pairs' own."""
    first, second = [pair.text_a for pair in pairs], [pair.text_b for pair in pairs]
    gold = np.array([pair.score for pair in pairs])
    vectors = model.encode_query(first).vectors, model.encode_document(second).vectors
    rows = {"cosine": np.einsum("ne,ne->n", *vectors), "IEM": model.score_pairs(first, second, task)}
    return {
        name: {"Pearson": _pearson(scores, gold), "Spearman": _pearson(_ranks(scores), _ranks(gold))}
        for name, scores in rows.items()
    }


def _top(scores_QN: Floats, k: int) -> npt.NDArray[np.int64]:
    best: npt.NDArray[np.int64] = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return best


def _ranking(ids: Sequence[str], best_QK: npt.NDArray[np.int64]) -> Ranking:
    return Ranking([[ids[i] for i in row] for row in best_QK])


def _pearson(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: npt.NDArray[np.floating] = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return means
