"""Whether `d2llm index` survives being killed: a load is killed at random moments and run again until it is complete.

    python benchmarks/kills.py runs/demo/model

A load of generated documents into an embedded collection is killed (SIGKILL) at a random moment, started again, killed
again, and so on, until one run comes to its end; then its contents are compared with those of a load that nobody
disturbed, and the next load begins, until there were as many kills as asked for. Prints where the kills fell and what
was lost, twice there, or different.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from d2llm.cli import echo_table
from d2llm.connectors import QdrantIndex
from d2llm.connectors.engine import Found
from d2llm.connectors.points import candidates_of
from d2llm.folder import read_config
from d2llm.types import RESERVED

WORDS = "query passage index vector recall score engine token segment filter payload batch graph memory search".split()


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.option("--documents", default=20_000, show_default=True)
@click.option("--kills", default=30, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(model_folder: Path, documents: int, kills: int, seed: int) -> None:
    """Kill loads with MODEL_FOLDER."""
    rng = random.Random(seed)
    feature_dim = read_config(model_folder).feature_dim
    with tempfile.TemporaryDirectory() as folder:
        corpus, log = Path(folder) / "corpus.jsonl", Path(folder) / "log"
        with open(corpus, "w", encoding="utf-8") as file:
            for i in range(documents):
                file.write(json.dumps({"_id": str(i), "text": " ".join(rng.choices(WORDS, k=6)) + f" {i}"}) + "\n")

        def start(place: Path) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "d2llm", "index", str(model_folder), str(corpus)]
            command += ["--qdrant", str(place), "--collection", "kb"]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(log, "wb"))

        began = time.perf_counter()
        undisturbed = Path(folder) / "undisturbed"
        assert start(undisturbed).wait() == 0, log.read_text()
        whole = time.perf_counter() - began
        truth = contents(undisturbed, feature_dim)
        assert len(truth["ids"]) == len(set(truth["ids"])) == documents
        struck: Counter[str] = Counter()
        loads: list[dict[str, int]] = []
        while struck.total() < kills:
            place = Path(folder) / f"load-{len(loads)}"
            while True:
                process = start(place)
                if struck.total() < kills:
                    try:
                        process.wait(rng.uniform(0.1, 1.1) * whole)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        struck[moment(log.read_text(errors="replace"), documents)] += 1
                if (status := process.wait()) == 0:
                    break
                assert status == -9, log.read_text()
            loads.append(compared(contents(place, feature_dim), truth))
            print(f"{struck.total()} kills, {len(loads)} loads: {loads[-1]}", file=sys.stderr)
    echo_table([[name, str(count)] for name, count in struck.most_common()], header=["killed while", "times"])
    total = {name: sum(load[name] for load in loads) for name in loads[0]}
    print(
        json.dumps({"kills": kills, "loads": len(loads), "documents": documents, "seconds_undisturbed": whole, **total})
    )


def moment(log: str, documents: int) -> str:
    """What a run that was killed was doing, by its progress bar."""
    done = re.findall(rf"(\d+)/{documents} ", log)
    if not done:
        return "starting (reading the corpus, loading the model)"
    return "building the graph" if int(done[-1]) == documents else "encoding and storing"


def contents(place: Path, feature_dim: int) -> dict[str, Any]:
    """All that a collection holds, in the order of the ids."""
    with QdrantIndex("kb", place) as index:
        ids = sorted(index.ids(), key=int)
        points = [point for page in index._engine.scroll(1000, vectors=True) for point in page]
    points.sort(key=lambda point: int(point.payload[RESERVED]["id"]))
    digests = [point.payload[RESERVED]["digest"] for point in points]
    vectors = np.array([point.vector for point in points], np.float32)
    features = candidates_of(Found([0.0] * len(points), [point.payload for point in points]), feature_dim)
    return {
        "ids": ids, "digests": digests, "vectors": vectors, "features": features.features, "payloads": features.payloads
    }  # fmt: skip


def compared(found: dict[str, Any], truth: dict[str, Any]) -> dict[str, int]:
    """What is lost, twice there, or different. (The last bits of a vector depend on those that it was batched with.)"""
    same = found["ids"] == truth["ids"]
    close = same and np.isclose(found["vectors"], truth["vectors"], atol=1e-5).all(1)
    near = same and np.isclose(found["features"], truth["features"], rtol=2e-3, atol=1e-3).all(1)
    return {
        "lost": len(set(truth["ids"]) - set(found["ids"])),
        "twice": len(found["ids"]) - len(set(found["ids"])),
        "other_content": sum(a != b for a, b in zip(found["digests"], truth["digests"], strict=False))
        + sum(a != b for a, b in zip(found["payloads"], truth["payloads"], strict=False)),
        "other_vectors": int(np.sum(~np.asarray(close))) + int(np.sum(~np.asarray(near))),
    }


if __name__ == "__main__":
    main()
