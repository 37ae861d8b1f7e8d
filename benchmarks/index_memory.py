"""Measure the peak memory of `d2llm index` for corpora of several sizes.

    python benchmarks/index_memory.py runs/demo/model

Each size runs in its own process, on short generated documents, because memory depends on their number. Prints three
peaks: the anonymous memory of the process; the part of it that is the embedded engine's own, measured by storing the
same number of points without a model; and the resident set, which also contains the engine's memory-mapped files (the
system may evict them).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from d2llm.cli_options import echo_table

WORDS = "query passage index vector recall score engine token segment filter payload batch graph memory search".split()


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.option("--sizes", default="20000,200000", show_default=True, help="Documents, comma-separated.")
def main(model_folder: Path, sizes: str) -> None:
    """Measure indexing with MODEL_FOLDER."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, sizes.split(",")):
            corpus = Path(folder) / f"{size}.jsonl"
            rng = random.Random(0)
            with open(corpus, "w", encoding="utf-8") as file:
                for i in range(size):
                    file.write(json.dumps({"_id": str(i), "text": " ".join(rng.choices(WORDS, k=6)) + f" {i}"}) + "\n")
            job = [model_folder, corpus, Path(folder) / "qdrant"]
            engine = run("--engine", model_folder, size, Path(folder) / "alone")
            rows.append(run("--child", *job) | {"engine_mib": engine["anonymous_mib"]})
    echo_table(
        [
            [f"{r['documents']:,}", *(f"{r[key]:.0f}" for key in
                                      ("anonymous_mib", "engine_mib", "resident_mib", "seconds"))]
            for r in rows
        ],
        header=["documents", "anonymous MiB", "the engine's own", "resident MiB", "s"],
    )  # fmt: skip
    print(json.dumps(rows))


def run(*arguments: object) -> dict[str, float]:
    """Run this file in its own process with `arguments`, and return the JSON that it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    peaks: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peaks


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Record the peak `anonymous_mib` and `resident_mib` of this process during the block."""
    peak, kinds = {"anonymous_mib": 0.0, "resident_mib": 0.0}, {"RssAnon": "anonymous_mib", "VmRSS": "resident_mib"}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in kinds:
                    peak[kinds[name]] = max(peak[kinds[name]], int(rest.split()[0]) / 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    yield peak
    done.set()
    thread.join()


def engine(model_folder: str, size: str, folder: str) -> None:
    """Store random points in a new collection, as `d2llm index` does, without a model."""
    from d2llm.connectors import QdrantIndex
    from d2llm.folder import read_config
    from d2llm.indexing import BATCH
    from d2llm.types import Point

    config, rng = read_config(Path(model_folder)), np.random.default_rng(0)
    with QdrantIndex("kb", folder) as index:
        index.open_for(config)
        with watched() as before:
            time.sleep(0.1)
        with watched() as peak:
            for start in range(0, int(size), BATCH):
                vectors = rng.standard_normal((BATCH, config.embedding_dim), np.float32)
                features = rng.integers(256, size=(BATCH, config.feature_bytes), dtype=np.uint8)
                index.upsert([
                    Point(str(start + i), vectors[i], features[i], {"text": f"{WORDS} {start + i}"[-60:]}, "0" * 32)
                    for i in range(BATCH)
                ])  # fmt: skip
            index.optimize()
    print(json.dumps({"anonymous_mib": peak["anonymous_mib"] - before["anonymous_mib"]}))


def child(model_folder: str, corpus: str, qdrant: str) -> None:
    """Index one corpus with `d2llm index`."""
    from d2llm.cli import main as d2llm

    arguments = ["index", model_folder, corpus, "--qdrant", qdrant, "--collection", Path(corpus).stem, "--json"]
    real, sys.stdout = sys.stdout, sys.stderr
    start = time.perf_counter()
    with watched() as peak:
        d2llm.main(arguments, standalone_mode=False)
    sys.stdout = real
    documents = sum(1 for _ in open(corpus, encoding="utf-8"))
    print(json.dumps({"documents": documents, "seconds": time.perf_counter() - start, **peak}))


if __name__ == "__main__":
    if sys.argv[1:2] in (["--child"], ["--engine"]):
        {"--child": child, "--engine": engine}[sys.argv[1]](*sys.argv[2:])
    else:
        main()
