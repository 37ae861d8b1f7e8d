"""Compare searches in long documents that are split into passages with searches in documents that are cut.

    python benchmarks/long_documents.py MODEL DATA --split dev

DATA is a BEIR folder. Its documents are joined at random into long ones, ten at a time; a long document is relevant to
a query if one of its ten is. The documents are indexed twice, cut at the model's limit and split. Then the queries of
the split are searched, and scored with all passages too: this is the exact ranking of documents, by their best passage
(or by other functions of the scores of their passages).

At the end it compares the time of indexing documents with that of encoding their passages alone. Both take turns.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

import d2llm
from d2llm.beir import RetrievalData
from d2llm.cli_options import echo_table
from d2llm.connectors import QdrantIndex
from d2llm.metrics import evaluate_each, overlap, paired_test
from d2llm.passages import content_of, split
from d2llm.types import Document, Embeddings, Floats, Point

MEASURE = "nDCG@10"
ROUNDS, SAMPLE = 5, 500
"""How often indexing and encoding are timed, with about so many passages."""


class Kept(d2llm.FlatIndex):
    """Keeps what it is given in another index too."""

    def __init__(self, other: QdrantIndex) -> None:
        super().__init__()
        self.other, self.points = other, list[Point]()

    def upsert(self, points: Sequence[Point]) -> None:
        """Store the points in both."""
        super().upsert(points)
        self.other.open_for(self._stored_config())
        self.other.upsert(points)
        self.points += points


POOLINGS: dict[str, Callable[[Floats], float]] = {
    "split, every passage scored": lambda scores: float(scores.max()),
    "... sum of the best 2, half weight": lambda scores: float(np.sort(scores)[-2:] @ _weights(scores, 2)),
    "... sum of the best 3, half weights": lambda scores: float(np.sort(scores)[-3:] @ _weights(scores, 3)),
    "... logarithm of the sum of exponentials": lambda scores: float(np.logaddexp.reduce(scores)),
}


def _weights(scores: Floats, most: int) -> Floats:
    """1 for the best, 1/2 for the next, 1/4: in ascending order of the scores, scaled to the sum 1."""
    weights = 0.5 ** np.arange(min(most, len(scores)), dtype=np.float32)[::-1]
    return np.asarray(weights / weights.sum(), np.float32)


def joined(data: RetrievalData, size: int, seed: int) -> tuple[list[Document], dict[str, dict[str, int]]]:
    """Return the long documents, and the judgements of the queries for them."""
    ids = sorted(data.documents)
    random.Random(seed).shuffle(ids)
    home = {id_: f"long-{row // size}" for row, id_ in enumerate(ids)}
    texts: dict[str, list[str]] = {}
    for id_ in ids:
        texts.setdefault(home[id_], []).append(data.documents[id_].content)
    qrels: dict[str, dict[str, int]] = {}
    for query, grades in data.qrels.items():
        for id_, grade in grades.items():
            if id_ in home:
                judged = qrels.setdefault(query, {})
                judged[home[id_]] = max(grade, judged.get(home[id_], 0))
    return [Document(id_, "\n\n".join(parts)) for id_, parts in texts.items()], qrels


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.argument("data_folder", type=click.Path(path_type=Path, exists=True))
@click.option("--split", "split_name", default="dev", show_default=True)
@click.option("--join", "size", default=10, show_default=True, help="Documents in a long one.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=int, help="CPU threads of the encoder. [default: one a core]")
def main(model_folder: Path, data_folder: Path, split_name: str, size: int, seed: int, threads: int | None) -> None:
    """Compare with MODEL_FOLDER on DATA_FOLDER."""
    model = d2llm.load(model_folder, threads=threads)
    data = RetrievalData.load(data_folder, split_name)
    documents, qrels = joined(data, size, seed)
    queries = {query: data.queries[query] for query in qrels}
    with tempfile.TemporaryDirectory() as folder, QdrantIndex("long", folder, options={"bm25": {}}) as index:
        cut, kept = d2llm.FlatIndex(), Kept(index)
        cut.add(model, documents, chunk=False, progress=True)
        report = kept.add(model, documents, progress=True)
        index.optimize()
        rankings = {
            "cut at the limit": _searched(d2llm.Searcher(model, cut), queries),
            "split, without the IEM": _searched(d2llm.Searcher(model, index, rescore=False), queries),
            "split": _searched(d2llm.Searcher(model, index), queries),
            "split, 400 candidates": _searched(d2llm.Searcher(model, index, candidates=400), queries),
            "split, hybrid": _searched(d2llm.Searcher(model, index, hybrid="rrf"), queries),
            "split, hybrid, 400 candidates": _searched(
                d2llm.Searcher(model, index, hybrid="rrf", candidates=400), queries
            ),
            **_exact(model, kept.points, queries),
        }
    click.echo(f"{len(queries)} queries ({split_name}), {len(documents)} documents of {size} joined, "
               f"{report.passages} passages, limit {model.config.document_max_length} tokens\n")  # fmt: skip
    values = {name: [each[MEASURE] for each in evaluate_each(_run(ranking, queries), qrels).values()]
              for name, ranking in rankings.items()}  # fmt: skip
    exact = list(rankings["split, every passage scored"].values())
    rows, result = [], {}
    for name, ranking in rankings.items():
        test = paired_test(values[name], values["cut at the limit"])
        measured = {MEASURE: float(np.mean(values[name])), "overlap@10": overlap(list(ranking.values()), exact), **test}
        result[name] = measured
        rows.append([name, f"{measured[MEASURE]:.4f}", f"{measured['overlap@10']:.4f}"])
        gain = [f"{test['difference']:+.4f}", f"{test['low']:+.4f} to {test['high']:+.4f}"]
        rows[-1] += ["", ""] if name == "cut at the limit" else gain
    echo_table(rows, header=["documents", MEASURE, "overlap@10", "gain", "95 % interval"])
    speed = _speed(model, documents[: max(1, SAMPLE * len(documents) // report.passages)])
    click.echo(f"\nindexing takes {speed:.3f} times as long as encoding the same passages alone")
    click.echo(json.dumps({"rows": result, "passages": report.passages, "indexing / encoding": speed}))


def _searched(searcher: d2llm.Searcher, queries: dict[str, str]) -> dict[str, list[str]]:
    return {query: [hit.id for hit in searcher.search(text, k=10)] for query, text in queries.items()}


def _exact(model: d2llm.Model, points: Sequence[Point], queries: dict[str, str]) -> dict[str, dict[str, list[str]]]:
    """Rank all documents by the scores of all their passages, by each of `POOLINGS`."""
    passages = Embeddings(np.array([point.vector for point in points]), np.array([point.features for point in points]))
    scores_QN = model.score_all(model.encode_query(list(queries.values())), passages)
    rows: dict[str, list[int]] = {}
    for row, point in enumerate(points):
        rows.setdefault(point.id, []).append(row)
    rankings: dict[str, dict[str, list[str]]] = {name: {} for name in POOLINGS}
    for query, scores_N in zip(queries, scores_QN, strict=True):
        for name, pool in POOLINGS.items():
            scores = {id_: pool(scores_N[of]) for id_, of in rows.items()}
            rankings[name][query] = sorted(scores, key=scores.__getitem__, reverse=True)[:10]
    return rankings


def _run(ranking: dict[str, list[str]], queries: dict[str, str]) -> dict[str, dict[str, float]]:
    return {query: {id_: -float(rank) for rank, id_ in enumerate(ranking[query])} for query in queries}


def _speed(model: d2llm.Model, documents: Sequence[Document]) -> float:
    """Return the time of indexing documents over that of encoding their passages alone, of medians."""
    limit = model.config.document_max_length
    contents = [
        content_of(document, passage, limit, model.document.count_tokens)
        for document in documents
        for passage in split(document, model.document.count_tokens, limit)
    ]
    seconds: dict[str, list[float]] = {"index": [], "encode": []}
    for turn in range(ROUNDS):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, QdrantIndex("long", folder) as index:
            index.add(model, [replace(document, id=f"{turn} {document.id}") for document in documents])
        middle = time.perf_counter()
        model.encode_document(contents)
        seconds["index"].append(middle - start)
        seconds["encode"].append(time.perf_counter() - middle)
    return float(np.median(seconds["index"]) / np.median(seconds["encode"]))


if __name__ == "__main__":
    main()
