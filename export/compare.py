"""Compare query encoders of one student: the latency and the ranking quality of each, measured on the same passages."""

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
from d2llm.errors import DataError, OutputExistsError, import_extra
from d2llm.evaluate import MAIN_MEASURE, encode_passages, recall_and_rescore
from d2llm.metrics import evaluate, paired_test, per_query
from d2llm.model import Model, TextEncoder, load
from d2llm.student import Student
from d2llm.types import Task

from .onnx import Precision, add_query_encoder, export, load_query_encoder

FULL = "full"
"""Name and kind of the student's own encoder in the rows."""
BLOCK = 8
"""Number of queries that an encoder reads before the next encoder's turn. As in serving, its weights stay in the CPU
caches."""


@dataclass(frozen=True, slots=True)
class Row:
    """The measurements of one query encoder in one precision."""

    name: str
    """Name of the encoder's folder; `full` for the student's own encoder."""
    kind: str
    precision: str
    parameters: int
    p50: float
    p95: float
    """Latency of tokenizing and encoding one query, in milliseconds (median, 95th percentile)."""
    graph_p50: float
    graph_p95: float
    """Latency of encoding alone, in onnxruntime, in milliseconds."""
    recall_100: float
    ndcg_10: float
    """Recall@100 and nDCG@10 after the IEM has rescored the candidates."""
    difference: float
    low: float
    high: float
    """nDCG@10 minus the nDCG@10 of the full encoder in fp32, and the 95 % confidence interval of the difference."""
    speedup: float
    graph_speedup: float
    """p50 and graph_p50 of the full encoder in fp32, divided by this encoder's."""
    retention: float | None
    """nDCG@10 in percent of the full encoder's in fp32. None if the full encoder's is 0."""


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
    """Export the student's own encoder and each small query encoder in each precision, and measure them on `data`.

    `student` and `encoders` are folders. The full encoder in fp32 encodes the passages once, so all encoders rank the
    same vectors and features. Each encoder encodes the first `timed` queries one at a time; the encoders take turns in
    blocks of a few queries.

    Raises:
        ModelError: a folder is not a student or not a small query encoder.
        MismatchError: an encoder was aligned to another student.
        DataError: two encoder folders have the same name, or `data` has fewer than two queries.
        MissingExtraError: ir_measures is not installed.
    """
    names = [folder.name for folder in encoders]
    if len({FULL, *names}) <= len(names):
        raise DataError(
            f"folder names are row names: {', '.join(names)} are not all different, or one is {FULL!r}. Rename a folder"
        )
    if len(data.queries) < 2:
        raise DataError(f"a comparison needs two or more queries, found {len(data.queries)}")
    import_extra("ir_measures", "eval")  # report a missing package before minutes of encoding
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
    """Export each encoder in each precision to a model folder in `folder`, and open it. The full encoder in fp32 comes
    first."""
    contestants, loaded = list[_Contestant](), Student.load(student)
    for encoder in encoders:  # refuse an encoder of another student before minutes of exporting
        load_query_encoder(encoder, loaded, student)
    parameters = sum(parameter.numel() for parameter in loaded.query_parameters())
    base, small_variants = folder / "fp32", list(product(encoders, dict.fromkeys(precisions)))
    bar = tqdm(total=len({"fp32", *precisions}) + len(small_variants), desc="exporting", disable=not progress)
    with bar:
        for precision in dict.fromkeys(("fp32", *precisions)):
            export(student, folder / precision, precision=precision)
            model = load(folder / precision, threads=threads)
            contestants.append(_Contestant(FULL, FULL, precision, parameters, model))
            bar.update()
        for encoder, precision in small_variants:
            model_folder = folder / f"{encoder.name}-{precision}"
            shutil.copytree(base, model_folder)
            small = add_query_encoder(student, model_folder, encoder, precision=precision).query_encoder
            assert small is not None, "it was just added"
            layers = small.provenance["layers"]
            kind = f"layers {','.join(map(str, layers))}" if layers else small.kind
            model = load(model_folder, threads=threads)
            contestants.append(_Contestant(encoder.name, kind, precision, small.parameters, model))
            bar.update()
    return contestants


def _measure(
    contestants: Sequence[_Contestant], data: RetrievalData, candidates: int, task: Task, timed: int, progress: bool
) -> list[Row]:
    """Measure the latency and the ranking of each contestant. The first one is the reference of the others."""
    full = contestants[0].model
    queries = list(data.queries.values())
    passages = encode_passages(full, data.documents.values(), progress=progress)
    times = _latencies([contestant.model.query for contestant in contestants], queries[:timed])
    rows, ndcg = list[Row](), list[list[float]]()
    for contestant, (total, graph) in zip(contestants, times, strict=True):
        embeddings = contestant.model.encode_query(queries)
        _, rescored = recall_and_rescore(full, data, passages, embeddings, candidates, task)
        run = rescored.run(data.queries)
        ndcg.append(list(per_query(run, data.qrels, MAIN_MEASURE).values()))
        difference = paired_test(ndcg[-1], ndcg[0])
        rows.append(
            Row(
                contestant.name,
                contestant.kind,
                contestant.precision,
                contestant.parameters,
                *(_percentile(total, 50), _percentile(total, 95), _percentile(graph, 50), _percentile(graph, 95)),
                recall_100=evaluate(run, data.qrels)["Recall@100"],
                ndcg_10=sum(ndcg[-1]) / len(queries),
                difference=difference["difference"],
                low=difference["low"],
                high=difference["high"],
                speedup=_percentile(times[0][0], 50) / _percentile(total, 50),
                graph_speedup=_percentile(times[0][1], 50) / _percentile(graph, 50),
                retention=100 * (sum(ndcg[-1]) / sum(ndcg[0])) if any(ndcg[0]) else None,
            )
        )
    return rows


def _latencies(encoders: Sequence[TextEncoder], queries: Sequence[str]) -> list[tuple[list[float], list[float]]]:
    """Return the seconds that each encoder takes for each query: for tokenizing and encoding, and for encoding alone.

    The encoders take turns, a block of queries each, in an order that rotates with each block. The first query of a
    block runs once more before the block, to warm up.
    """
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in encoders]
    for turn, first_query in enumerate(range(0, len(queries), BLOCK)):
        for offset in range(len(encoders)):
            number = (offset + turn) % len(encoders)
            encoder, (total, graph) = encoders[number], times[number]
            block = queries[first_query : first_query + BLOCK]
            for query in (block[0], *block):
                start = time.perf_counter()
                tokens = encoder.tokenize([query])
                tokenized = time.perf_counter()
                encoder.run(tokens, keep_features=True)
                end = time.perf_counter()
                total.append(end - start)
                graph.append(end - tokenized)
            del total[-len(block) - 1], graph[-len(block) - 1]
    return times


def _percentile(seconds: Sequence[float], percent: float) -> float:
    """Return a percentile in milliseconds."""
    return float(np.percentile(seconds, percent)) * 1e3


MADE_BY = "d2llm compare"
"""Is in the metadata of each plot."""


def require_plot(path: Path) -> None:
    """Refuse a file that `draw` has not drawn.

    Raises:
        OutputExistsError: there is such a file.
    """
    if path.exists():
        with open(path, "rb") as file:
            if MADE_BY.encode() not in file.read(1000):
                raise OutputExistsError(f"{path} exists already and --plot has not drawn it. Choose another name.")


def draw(rows: Sequence[Row], target: Path, title: str = "") -> None:
    """Draw the rows to the PNG file `target`: latency against nDCG@10, with their frontier.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    import_extra("matplotlib", "eval")
    from matplotlib.figure import Figure  # pyplot would change global state and may need a display

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for precision, marker in zip(dict.fromkeys(row.precision for row in rows), "os^", strict=False):
        group = [row for row in rows if row.precision == precision]
        times, ndcg = [row.p50 for row in group], [row.ndcg_10 for row in group]
        axes.scatter(times, ndcg, marker=marker, label=precision, zorder=3)
    best = frontier(rows)
    axes.step([row.p50 for row in best], [row.ndcg_10 for row in best], where="post", color="0.6", label="frontier")
    for row in rows:
        axes.annotate(row.name, (row.p50, row.ndcg_10), xytext=(5, -10), textcoords="offset points", fontsize=8)
    axes.axhline(0.98 * rows[0].ndcg_10, color="0.8", linestyle=":", label="98 % of the full encoder")
    axes.set(
        xscale="log",
        xlabel="ms per query (p50, tokenizing and encoding one query at a time)",
        ylabel=MAIN_MEASURE,
        title=title,
    )
    axes.legend(loc="lower right")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, format="png", metadata={"Software": MADE_BY})


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Return the Pareto frontier, fastest first: the rows that no other row beats in both latency and nDCG@10."""
    best = list[Row]()
    for row in sorted(rows, key=lambda row: (row.p50, -row.ndcg_10)):
        if not best or row.ndcg_10 > best[-1].ndcg_10:
            best.append(row)
    return best
