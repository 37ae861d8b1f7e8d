"""Measure how indexing and searching grow with the corpus, and predict larger ones.

    python benchmarks/growth.py runs/demo/model --sizes 10000,100000,1000000

Each size runs in its own process, embedded, with random unit vectors and features: an embedding would take hours and
would not change the engine's work. Encoding is a constant time a passage, which `d2llm doctor` and
`benchmarks/encoding.py` measure. Prints the measures, then a model of cost: storing, graph, disk and memory are linear
in the number of passages; the time of a search is linear in its logarithm, since the graph is searched. The last lines
predict what was not measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from index_memory import watched

import d2llm
from d2llm.cli_options import echo_table
from d2llm.connectors import QdrantIndex
from d2llm.folder import read_config
from d2llm.indexing import BATCH
from d2llm.types import Point

TEXT = "A passage of the length of two sentences, as many corpora have them. It stands for about thirty words of text. "


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.option("--sizes", default="10000,100000,1000000", show_default=True, help="Passages, comma-separated.")
@click.option("--predict", default="10000000,100000000", show_default=True, help="Passages to predict.")
@click.option("--queries", default=200, show_default=True, help="Searches at each size.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the collections are made. [default: temporary]")
def main(model_folder: Path, sizes: str, predict: str, queries: int, folder: Path | None) -> None:
    """Measure collections for MODEL_FOLDER."""
    rows: dict[int, dict[str, float]] = {}
    for size in map(int, sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            rows[size] = {}
            for step in ("store", "search"):  # apart, since the memory of one is not that of the other
                command = [sys.executable, __file__, "--child", step, str(model_folder), str(size), place, str(queries)]
                rows[size] |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        click.echo(f"{size:,}: {rows[size]}", err=True)
    predicted = {size: predictions(rows, size) for size in map(int, predict.split(","))}
    names = list(next(iter(rows.values())))
    echo_table(
        [[name, *(f"{row[name]:,.1f}" for row in [*rows.values(), *predicted.values()])] for name in names],
        header=["", *(f"{size:,}" for size in rows), *(f"{size:,} (predicted)" for size in predicted)],
    )
    print(json.dumps({"measured": rows, "predicted": predicted}))


def predictions(rows: dict[int, dict[str, float]], size: int) -> dict[str, float]:
    """The cost at `size` passages: what is linear grows as between the two largest sizes; searches with the logarithm
    of the size."""
    (small, first), (large, last) = sorted(rows.items())[-2:]
    found = {}
    for name, value in last.items():
        slope = value - first[name]
        share = np.log(size / large) / np.log(large / small) if "ms" in name else (size - large) / (large - small)
        found[name] = float(value if "a second" in name else value + max(slope, 0.0) * share)
    return found


def store(model_folder: str, size: int, folder: str) -> dict[str, float]:
    """Store random points, and build the graph."""
    config, rng = read_config(Path(model_folder)), np.random.default_rng(0)
    with QdrantIndex("growth", folder) as index:
        index.open_for(config)
        with watched() as peak:
            began = time.perf_counter()
            for start in range(0, size, BATCH):
                count = min(BATCH, size - start)
                vectors = rng.standard_normal((count, config.embedding_dim), np.float32)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                features = rng.integers(256, size=(count, config.feature_bytes), dtype=np.uint8)
                index.upsert([Point(str(start + i), vectors[i], features[i], {"text": TEXT * 2}, "0" * 32)
                              for i in range(count)])  # fmt: skip
            stored = time.perf_counter()
            index.optimize()
            done = time.perf_counter()
    disk = sum(file.stat().st_blocks * 512 for file in Path(folder).rglob("*") if file.is_file())
    return {
        "store s": stored - began,
        "passages stored a second": size / (stored - began),
        "graph s": done - stored,
        "disk MB": disk / 1e6,
        "peak memory of indexing MB": peak["anonymous_mib"] * 1.048576,
    }


def search(model_folder: str, size: int, folder: str, queries: int) -> dict[str, float]:
    """Search with random unit vectors, and with texts."""
    model = d2llm.load(model_folder)
    rng, recall, whole = np.random.default_rng(1), [], []
    with watched() as before:
        time.sleep(0.1)
    with QdrantIndex("growth", folder) as index, watched() as peak:
        searcher = d2llm.Searcher(model, index)
        for number in range(queries + 20):
            vector = rng.standard_normal(model.config.embedding_dim, np.float32)
            began = time.perf_counter()
            index.recall(vector / np.linalg.norm(vector), 100)
            recall.append(time.perf_counter() - began)
            explained = searcher.explain(f"a passage about the number {number}")
            whole.append(explained.seconds["recall"] + explained.seconds["rescore"])
    return {
        "recall of 100, ms": float(np.median(recall[20:]) * 1e3),
        "recall and rescoring, ms": float(np.median(whole[20:]) * 1e3),
        "memory of searching MB": (peak["anonymous_mib"] - before["anonymous_mib"]) * 1.048576,
        "resident MB": peak["resident_mib"] * 1.048576,
    }


def child(step: str, model_folder: str, size: str, folder: str, queries: str) -> None:
    """One step of one size, in its own process. Prints JSON."""
    measured: dict[str, Any] = (
        store(model_folder, int(size), folder)
        if step == "store"
        else search(model_folder, int(size), folder, int(queries))
    )
    print(json.dumps(measured))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
