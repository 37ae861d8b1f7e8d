"""Measure each stage of a model on judged data. The results are tables of plain numbers.

Q is the number of queries, N of passages or pairs, K of candidates.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from d2llm.beir import RetrievalData, read_qrels
from d2llm.bm25 import Bm25, stemmer
from d2llm.corpus import read_queries
from d2llm.deprecated import warn
from d2llm.errors import ArgumentError, DataError, import_extra
from d2llm.fusion import WEIGHTS, Recalled, Rows, dbsf, rrf, weighted_sum
from d2llm.indexing import cut_documents
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
from d2llm.readers import beir_file
from d2llm.types import Document, Embeddings, Floats, Task

Table: TypeAlias = dict[str, dict[str, float]]
"""Measures by row, `{row: {measure: value}}`."""

STAGES = ("BM25", "recall", "recall + IEM", "exhaustive IEM")
"""The rows that every table of a model has."""
EXHAUSTIVE = STAGES[-1]
HYBRID_IEM = "hybrid + IEM"
"""The row of a hybrid search of ours: the candidates of RRF, rescored by the IEM."""
HYBRIDS = ("RRF", "DBSF", "cosine + BM25")
"""The rows of hybrid searches without an IEM (see `d2llm.fusion`). The last one needs training queries."""
TRAINING_QUERIES = 300
"""The number of training queries that choose the weight of BM25 in the last of `HYBRIDS`."""
MAIN_MEASURE = "nDCG@10"
"""The measure that retention and significance compare."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The ranked document ids of each query, best first."""

    ids: list[list[str]]

    @classmethod
    def of(cls, run: Run, queries: Iterable[str]) -> Ranking:
        """Rank the documents of `run` as trec_eval does: by score, equal scores by id, both descending.

        A query that the run lacks has no ids.
        """
        return cls(
            [sorted(docs, key=lambda id_: (docs[id_], id_), reverse=True) for docs in (run.get(q, {}) for q in queries)]
        )

    def run(self, queries: Iterable[str]) -> Run:
        """Return the ranking as a run for trec_eval. The score is minus the rank, so that no ties are left to break."""
        return {
            q: {id_: -float(rank) for rank, id_ in enumerate(ids, 1)} for q, ids in zip(queries, self.ids, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The rankings of one model's stages on one data set, all of the same queries, and the table of their measures.

    `bm25_weight` is the weight in the row `cosine + BM25`, or None if there is no such row. `passages` is the number of
    passages of the documents.
    """

    rankings: dict[str, Ranking]
    table: Table
    bm25_weight: float | None = None
    passages: int = 0


@dataclass(frozen=True, slots=True)
class Passages:
    """The encoded passages of a corpus: a passage for each document, or several for one that is too long.

    `ids` holds the id of each passage's document, `texts` what BM25 reads of it: the title, then the passage.
    """

    ids: list[str]
    texts: list[str]
    embeddings: Embeddings


def encode_passages(
    model: Model, documents: Iterable[Document], *, chunk: bool = True, progress: bool = False
) -> Passages:
    """Encode documents as `Index.add` does: with `chunk`, those that are too long in passages."""
    ids, texts, contents = list[str](), list[str](), list[str]()
    documents = list(documents)
    for document, cuts in zip(documents, cut_documents(model, documents, chunk=chunk), strict=True):
        for passage, content, _ in cuts:
            part = document if passage is None else replace(document, text=document.text[passage.start : passage.end])
            ids.append(document.id)
            texts.append(part.content)
            contents.append(content)
    return Passages(ids, texts, model.encode_document(contents, progress=progress))


def evaluate_retrieval(
    model: Model,
    data: RetrievalData,
    *,
    candidates: int = 100,
    task: Task = "asymmetric",
    training: RetrievalData | None = None,
    stems: str | None = None,
    others: Mapping[str, Ranking] | None = None,
    progress: bool = False,
    recall: int | None = None,
    chunk: bool = True,
) -> Retrieval:
    """Measure the stages of a model, the rows `STAGES`, a hybrid search with the IEM, the row `HYBRID_IEM`, and hybrid
    searches without it, the rows `HYBRIDS`.

    The stages are BM25, recall alone, recall with IEM rescoring, and the IEM over all passages. A hybrid search fuses
    the `candidates` best passages by cosine and the `candidates` best by BM25. In the row `HYBRID_IEM` the IEM
    rescores the `candidates` best of RRF. The row `cosine + BM25` is their
    weighted sum, with the weight that has the highest nDCG@10 on the queries of `training` (see `training_sample`).
    Without `training` there is no such row. `stems` is the language of BM25's stems in all rows; None is no stems.

    A document that is longer than the model's limit is split into passages, as in an index, and ranks where its best
    passage does. Without `chunk` it loses its end. Each row ranks `candidates` passages. Several may be of one
    document, so a row may rank fewer documents, which limits Recall@100; so does a number below 100. A document that is
    the query `itself` is left out. `others` adds rows to the table: rankings of `data.queries` by other systems, used
    as they are.

    The measures are `metrics.MEASURES` and `overlap@10`, the share of the exhaustive IEM's top ten that the row has in
    its own top ten. All embeddings are held in memory, so the function suits data sets, not large corpora.

    `recall` is the old name of `candidates`.

    Raises:
        MissingExtraError: the extra `eval` is not installed.
        ArgumentError: there are no stems of the language `stems`.
    """
    if recall is not None:
        warn("recall", "candidates")
        candidates = recall
    # Fail now, not after minutes of encoding.
    import_extra("ir_measures", "eval")
    if stems is not None:
        stemmer(stems)
    passages = encode_passages(model, data.documents.values(), chunk=chunk, progress=progress)
    ids, documents, bm25 = passages.ids, passages.embeddings, Bm25(passages.texts, stems=stems)
    queries = model.encode_query(list(data.queries.values()), progress=progress)
    weight = None if training is None else _choose_weight(model, training, passages, bm25, candidates)
    fusions: dict[str, Callable[[Recalled], Rows]] = dict(zip(HYBRIDS, (rrf, dbsf), strict=False))
    if weight is not None:
        fusions[HYBRIDS[-1]] = partial(weighted_sum, weight=weight)
    by_bm25, exhaustive, hybrid_iem = Ranking([]), Ranking([]), Ranking([])
    hybrids = {name: Ranking([]) for name in fusions}
    searches = zip(data.queries, _recall_both(data, passages, queries, bm25, candidates), strict=True)
    for row, (query_id, search) in enumerate(tqdm(searches, total=len(queries), unit="query", disable=not progress)):
        query = Embeddings(queries.vectors[row : row + 1], queries.features[row : row + 1])
        own = itself(query_id, data.qrels)
        for ranking, scores_N in (
            (by_bm25, search.bm25_N),
            (exhaustive, model.score_all(query, documents, task)[0]),
        ):
            ranking.ids.extend(_ranking(ids, _nearest(ids, scores_N, candidates, own)).ids)
        for name, fuse in fusions.items():
            hybrids[name].ids.extend(_ranking(ids, fuse(search)[None, :candidates]).ids)
        fused_1K = rrf(search)[None, :candidates]
        iem_1K = model.score(query.features, documents.features[fused_1K], search.cosine_N[fused_1K], task)
        hybrid_iem.ids.extend(rerank(ids, fused_1K, iem_1K).ids)
    stages = by_bm25, *recall_and_rescore(model, data, passages, queries, candidates, task), exhaustive
    rankings = {**dict(zip(STAGES, stages, strict=True)), HYBRID_IEM: hybrid_iem, **hybrids, **(others or {})}
    return Retrieval(rankings, tabulate(rankings, list(data.queries), data), weight, len(ids))


def training_sample(folder: Path, measured: RetrievalData) -> RetrievalData:
    """Return at most `TRAINING_QUERIES` queries of the split `train` of `folder`, always the same random ones.

    Each has a relevant document, and no query of `measured` has its text.

    Raises:
        DataError: the split is missing or broken, or has no such query.
    """
    # The corpus is that of `measured`: reading it again would take as long as all the rest.
    qrels, texts = read_qrels(beir_file(folder, "qrels/train.tsv")), read_queries(folder, keep_empty=True)
    taboo = {"", *(text.strip() for text in measured.queries.values())}
    usable = [
        query
        for query, grades in qrels.items()
        if texts.get(query, "").strip() not in taboo and max(grades.values()) > 0
    ]
    if not usable:
        raise DataError(
            f"{folder}: the split train has {len(qrels)} queries, but all of them are measured, or have no text or no "
            "relevant document"
        )
    chosen = random.Random(0).sample(usable, min(TRAINING_QUERIES, len(usable)))
    return replace(
        measured, queries={query: texts[query] for query in chosen}, qrels={query: qrels[query] for query in chosen}
    )


def _choose_weight(model: Model, training: RetrievalData, passages: Passages, bm25: Bm25, candidates: int) -> float:
    """Return the weight with the highest nDCG@10 on the queries of `training`; the smallest of equals."""
    queries = model.encode_query(list(training.queries.values()))
    rankings = {weight: Ranking([]) for weight in WEIGHTS}
    for recalled in _recall_both(training, passages, queries, bm25, candidates):
        for weight, ranking in rankings.items():
            ranking.ids.extend(_ranking(passages.ids, weighted_sum(recalled, weight)[None, :candidates]).ids)
    return max(
        WEIGHTS, key=lambda weight: evaluate(rankings[weight].run(training.queries), training.qrels)[MAIN_MEASURE]
    )


def _recall_both(
    data: RetrievalData, passages: Passages, queries: Embeddings, bm25: Bm25, candidates: int
) -> Iterator[Recalled]:
    """Yield the passages that cosine and BM25 recall for each query of `data`.

    The document that is the query `itself` is left out. As in Qdrant, BM25 recalls no passage without a word of the
    query.
    """
    ids = passages.ids
    for (query, text), vector in zip(data.queries.items(), queries.vectors, strict=True):
        cosine_N, bm25_N = passages.embeddings.vectors @ vector, bm25.scores(text)
        own = itself(query, data.qrels)
        by_cosine, by_bm25 = (_nearest(ids, scores_N, candidates, own)[0] for scores_N in (cosine_N, bm25_N))
        yield Recalled(cosine_N, bm25_N, by_cosine, by_bm25[bm25_N[by_bm25] > 0])


def recall_and_rescore(
    model: Model, data: RetrievalData, passages: Passages, queries: Embeddings, candidates: int, task: Task
) -> tuple[Ranking, Ranking]:
    """Return two rankings: the `candidates` nearest passages by exact search, and the same passages rescored by IEM.

    `passages` are those of the documents of `data`, `queries` the embeddings of its queries, in the same order. The
    document that is the query `itself` is left out.
    """
    ids, documents = passages.ids, passages.embeddings
    recalled, rescored = Ranking([]), Ranking([])
    for query_id, vector, features in zip(data.queries, queries.vectors, queries.features, strict=True):
        cosine_1N = vector[None] @ documents.vectors.T
        nearest_1K = _nearest(ids, cosine_1N[0], candidates, itself(query_id, data.qrels))
        cosine_1K = np.take_along_axis(cosine_1N, nearest_1K, axis=1)
        iem_1K = model.score(features[None], documents.features[nearest_1K], cosine_1K, task)
        recalled.ids.extend(_ranking(ids, nearest_1K).ids)
        rescored.ids.extend(rerank(ids, nearest_1K, iem_1K).ids)
    return recalled, rescored


def tabulate(rankings: Mapping[str, Ranking], queries: Sequence[str], data: RetrievalData) -> Table:
    """Return the measures of each ranking. `overlap@10` compares it with the ranking named `EXHAUSTIVE`."""
    exact = rankings[EXHAUSTIVE].ids
    return {
        name: {**evaluate(ranking.run(queries), data.qrels), "overlap@10": overlap(ranking.ids, exact)}
        for name, ranking in rankings.items()
    }


def tabulate_queries(rankings: Mapping[str, Ranking], data: RetrievalData) -> dict[str, Table]:
    """Return the measures of each query, `{query id: {row: {measure: value}}}`."""
    tables = {name: evaluate_each(ranking.run(data.queries), data.qrels) for name, ranking in rankings.items()}
    return {query: {name: table[query] for name, table in tables.items()} for query in data.queries}


def significance(rankings: Mapping[str, Ranking], data: RetrievalData, baseline: str = "recall") -> Table:
    """Compare the nDCG@10 of every other row with the row `baseline` by `metrics.paired_test`.

    Raises:
        ArgumentError: there is no row `baseline`, or there is only one query.
    """
    _require_row(baseline, rankings)
    values = {
        name: list(per_query(ranking.run(data.queries), data.qrels, MAIN_MEASURE).values())
        for name, ranking in rankings.items()
    }
    return {name: paired_test(row, values[baseline]) for name, row in values.items() if name != baseline}


def retention(table: Table, teacher: str) -> dict[str, float]:
    """Return the nDCG@10 of each row in percent of the nDCG@10 of the row `teacher`.

    Raises:
        ArgumentError: there is no row `teacher`.
        DataError: the teacher's nDCG@10 is 0.
    """
    _require_row(teacher, table)
    teacher_value = table[teacher][MAIN_MEASURE]
    if teacher_value == 0:
        raise DataError(f"the teacher {teacher!r} has {MAIN_MEASURE} 0, so retention is not defined: name another row")
    return {name: 100 * (values[MAIN_MEASURE] / teacher_value) for name, values in table.items()}


def rerank(ids: Sequence[str], candidates_QK: npt.NDArray[np.int64], scores_QK: Floats) -> Ranking:
    """Rank the documents of each query's candidates by the score of their best passage.

    `candidates_QK` holds indices into `ids`, which names the document of each passage.
    """
    return _ranking(ids, np.take_along_axis(candidates_QK, _top(scores_QK, scores_QK.shape[1]), axis=1))


def evaluate_pairs(
    model: Model, pairs: Sequence[Pair], task: Task = "symmetric", *, threshold_pairs: Sequence[Pair] | None = None
) -> Table:
    """Measure how well the cosine and the IEM agree with judged pairs. The rows are `cosine` and `IEM`.

    Scored pairs (STS) give Pearson and Spearman correlations. Labelled pairs (NLI) give accuracy, precision and recall
    of entailment, and average precision, in the symmetric branch as in the paper (tables 1 and 2).

    The paper does not say how it chooses the threshold. Here it is the threshold with the highest accuracy on
    `threshold_pairs`, or else on `pairs` themselves. In the second case the accuracy is an upper bound: no threshold
    gives more.

    Raises:
        DataError: there are fewer than two scored pairs, or all pairs have the same judgement.
        ArgumentError: some pairs have a score and others a label, or `threshold_pairs` have no labels.
    """
    scores = _score_pairs(model, pairs, task)
    gold = [pair.score for pair in pairs if pair.score is not None]
    if len(gold) == len(pairs) and threshold_pairs is None:
        return {name: correlations(scores_N, gold) for name, scores_N in scores.items()}
    labels = _labels(pairs)
    threshold_labels = labels if threshold_pairs is None else _labels(threshold_pairs)
    threshold_scores = scores if threshold_pairs is None else _score_pairs(model, threshold_pairs, task)
    return {
        name: classification(scores_N, labels, best_threshold(threshold_scores[name], threshold_labels))
        for name, scores_N in scores.items()
    }


def _require_row(name: str, rows: Collection[str]) -> None:
    if name not in rows:
        raise ArgumentError(f"no row {name!r}: the rows are {', '.join(rows)}")


def _score_pairs(model: Model, pairs: Sequence[Pair], task: Task) -> dict[str, Floats]:
    """Return the cosine [N] and the IEM score [N] of each pair, by row name."""
    a = model.encode_query([pair.text_a for pair in pairs])
    b = model.encode_document([pair.text_b for pair in pairs])
    cosine_N = np.einsum("ne,ne->n", a.vectors, b.vectors)
    iem_N1 = model.score(a.features, b.features[:, None], cosine_N[:, None], task)
    return {"cosine": cosine_N, "IEM": iem_N1[:, 0]}


def _labels(pairs: Sequence[Pair]) -> list[bool]:
    labels = [pair.label for pair in pairs if pair.label is not None]
    if len(labels) != len(pairs):
        raise ArgumentError(f"expected a label on every pair: {len(pairs) - len(labels)} of {len(pairs)} have none")
    return labels


def _nearest(ids: Sequence[str], scores_N: Floats, k: int, without: str | None) -> npt.NDArray[np.int64]:
    """Return the indices [1, K] of the k best passages, best first. The document with the id `without` is left out."""
    spare = 0 if without is None else ids.count(without)
    best = [i for i in _top(scores_N[None], k + spare)[0].tolist() if ids[i] != without]
    return np.array([best[:k]], np.int64)


def _top(scores_QN: Floats, k: int) -> npt.NDArray[np.int64]:
    best: npt.NDArray[np.int64] = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return best


def _ranking(ids: Sequence[str], best_QK: npt.NDArray[np.int64]) -> Ranking:
    """Return the documents of the passages of each query, each document once: where its best passage is."""
    return Ranking([list(dict.fromkeys(ids[i] for i in row)) for row in best_QK])
