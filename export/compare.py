"""Query encoders side by side: what each costs a query, and what it keeps of the ranking. One run, one set of passages.

Q queries, N passages, K candidates.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from d2llm.beir import RetrievalData
from d2llm.errors import DataError, import_extra
from d2llm.evaluate import MAIN_MEASURE, recall_and_rescore
from d2llm.metrics import evaluate, paired_test, per_query
from d2llm.model import Model, TextEncoder, load
from d2llm.student import Student
from d2llm.types import Task

from .onnx import Precision, add_query_encoder, export, load_query_encoder

FULL = "full"
"""The row of the student's own encoder."""
BLOCK = 8
"""Queries that one encoder reads before it is the next one's turn: as in serving, its weights are in the caches."""


@dataclass(frozen=True, slots=True)
class Row:
    """One query encoder in one precision. Times are of single queries, in milliseconds."""

    name: str
    kind: str
    precision: str
    parameters: int
    p50: float
    p95: float
    """Of tokenising and encoding."""
    graph_p50: float
    graph_p95: float
    """Of encoding alone: what onnxruntime takes."""
    recall_100: float
    ndcg_10: float
    """After the IEM has rescored the recall."""
    difference: float
    low: float
    high: float
    """nDCG@10 minus the full encoder's, with its 95 % confidence interval."""
    speedup: float
    """The full encoder's p50 in fp32 over this one's."""
    graph_speedup: float
    retention: float | None
    """nDCG@10 in percent of the full encoder's in fp32; None if that is 0."""


def compare(
    student: Path,
    data: RetrievalData,
    encoders: Sequence[Path],
    *,
    precisions: Sequence[Precision] = ("fp32", "int8"),
    candidates: int = 100,
    task: Task = "asymmetric",
    timed: int = 200,
    threads: int | None = None,
    progress: bool = False,
) -> list[Row]:
    """Export `student` and each small encoder in each precision, and measure all of them on the same queries.

    Passages are encoded once, by the full encoder in fp32: every row ranks the same vectors and features. `timed`
    queries are encoded one at a time by every encoder in turn, in blocks of a few.

    Raises:
        ModelError: a folder that is no student or no query encoder.
        MismatchError: an encoder that was aligned to another student.
        DataError: two encoders with the same name, or fewer than two queries.
    """
    names = [folder.name for folder in encoders]
    if len({FULL, *names}) <= len(names):
        raise DataError(f"each encoder is a row: {', '.join(names)} are not all different, or one is called {FULL!r}")
    if len(data.queries) < 2:
        raise DataError(f"a comparison needs two or more queries, found {len(data.queries)}")
    import_extra("ir_measures", "eval")  # what is missing is said now, not after minutes of encoding
    with tempfile.TemporaryDirectory() as folder:
        contestants = _export(student, encoders, precisions, Path(folder), threads, progress)
        return _measure(contestants, data, candidates, task, timed, progress)


@dataclass(frozen=True, slots=True)
class _Contestant:
    name: str
    kind: str
    precision: str
    parameters: int
    model: Model


def _export(
    student: Path,
    encoders: Sequence[Path],
    precisions: Sequence[Precision],
    folder: Path,
    threads: int | None,
    progress: bool,
) -> list[_Contestant]:
    """Everything as a model folder that is opened for queries; the full encoder in fp32 first."""
    found, whole = list[_Contestant](), Student.load(student)
    for encoder in encoders:  # one of another student is refused before a minute of exporting
        load_query_encoder(encoder, whole, student)
    parameters = sum(parameter.numel() for parameter in whole.query_parameters())
    base, places = folder / "fp32", list(product(encoders, precisions))
    bar = tqdm(total=len({"fp32", *precisions}) + len(places), desc="exporting", disable=not progress)
    with bar:
        for precision in dict.fromkeys(("fp32", *precisions)):
            export(student, folder / precision, precision=precision)
            model = load(folder / precision, threads=threads)
            found.append(_Contestant(FULL, FULL, precision, parameters, model))
            bar.update()
        for encoder, precision in places:
            place = folder / f"{encoder.name}-{precision}"
            shutil.copytree(base, place)
            small = add_query_encoder(student, place, encoder, precision=precision).query_encoder
            assert small is not None, "it was just added"
            layers = small.provenance["layers"]
            kind = f"layers {','.join(map(str, layers))}" if layers else small.kind
            model = load(place, threads=threads)
            found.append(_Contestant(encoder.name, kind, precision, small.parameters, model))
            bar.update()
    return found


def _measure(
    contestants: Sequence[_Contestant], data: RetrievalData, candidates: int, task: Task, timed: int, progress: bool
) -> list[Row]:
    full = contestants[0].model
    queries = list(data.queries.values())
    documents = full.encode_document([document.content for document in data.documents.values()], progress=progress)
    times = _latencies([contestant.model.query for contestant in contestants], queries[:timed])
    rows, ndcg = list[Row](), list[list[float]]()
    for contestant, (whole, graph) in zip(contestants, times, strict=True):
        embeddings = contestant.model.encode_query(queries)
        _, rescored = recall_and_rescore(full, data, documents, embeddings, candidates, task)
        run = rescored.run(data.queries)
        ndcg.append(list(per_query(run, data.qrels, MAIN_MEASURE).values()))
        difference = paired_test(ndcg[-1], ndcg[0])
        rows.append(
            Row(
                contestant.name,
                contestant.kind,
                contestant.precision,
                contestant.parameters,
                *(_percentile(whole, 50), _percentile(whole, 95), _percentile(graph, 50), _percentile(graph, 95)),
                recall_100=evaluate(run, data.qrels)["Recall@100"],
                ndcg_10=sum(ndcg[-1]) / len(queries),
                difference=difference["difference"],
                low=difference["low"],
                high=difference["high"],
                speedup=_percentile(times[0][0], 50) / _percentile(whole, 50),
                graph_speedup=_percentile(times[0][1], 50) / _percentile(graph, 50),
                retention=100 * (sum(ndcg[-1]) / sum(ndcg[0])) if any(ndcg[0]) else None,
            )
        )
    return rows


def _latencies(encoders: Sequence[TextEncoder], queries: Sequence[str]) -> list[tuple[list[float], list[float]]]:
    """Seconds that each encoder takes for each query: tokenising and encoding, encoding alone.

    The encoders take turns, a block of queries each, in an order that rotates; the first query of a block warms up.
    """
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in encoders]
    for turn, start in enumerate(range(0, len(queries), BLOCK)):
        for place in range(len(encoders)):
            number = (place + turn) % len(encoders)
            encoder, (whole, graph) = encoders[number], times[number]
            block = queries[start : start + BLOCK]
            for query in (block[0], *block):
                began = time.perf_counter()
                tokens = encoder.tokenize([query])
                read = time.perf_counter()
                encoder.run(tokens, keep_features=True)
                done = time.perf_counter()
                whole.append(done - began)
                graph.append(done - read)
            del whole[-len(block) - 1], graph[-len(block) - 1]
    return times


def _percentile(seconds: Sequence[float], percent: float) -> float:
    return float(np.percentile(seconds, percent)) * 1e3


def draw(rows: Sequence[Row], target: Path, title: str = "") -> None:
    """A picture of the rows: time of a query against nDCG@10, and the frontier that no encoder beats in both."""
    import_extra("matplotlib", "eval")
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for precision, marker in zip(dict.fromkeys(row.precision for row in rows), "os^", strict=False):
        mine = [row for row in rows if row.precision == precision]
        axes.scatter([row.p50 for row in mine], [row.ndcg_10 for row in mine], marker=marker, label=precision, zorder=3)
    best = frontier(rows)
    axes.step([row.p50 for row in best], [row.ndcg_10 for row in best], where="post", color="0.6", label="frontier")
    for row in rows:
        axes.annotate(row.name, (row.p50, row.ndcg_10), xytext=(5, -10), textcoords="offset points", fontsize=8)
    axes.axhline(0.98 * rows[0].ndcg_10, color="0.8", linestyle=":", label="98 % of the full encoder")
    axes.set(
        xscale="log",
        xlabel="ms a query (p50: tokenising and encoding, one at a time)",
        ylabel=MAIN_MEASURE,
        title=title,
    )
    axes.legend(loc="lower right")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, format="png")


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other one beats in both time and nDCG@10, fastest first (Pareto)."""
    best = list[Row]()
    for row in sorted(rows, key=lambda row: (row.p50, -row.ndcg_10)):
        if not best or row.ndcg_10 > best[-1].ndcg_10:
            best.append(row)
    return best
