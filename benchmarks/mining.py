"""Compare the speed and the results of bm25s and rank-bm25.

    python benchmarks/mining.py BEIR_FOLDER

Both engines rank the same sample of queries, one query at a time, in turns. Then bm25s ranks the whole split, as `d2llm
mine` does. The two rankings agree at a rank if their passages there are the same, or have the same score up to float
rounding. Prints a table for people and one line of JSON for machines.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from pathlib import Path

import click
import numpy as np

from d2llm.beir import RetrievalData
from d2llm.bm25 import Bm25, Engine
from d2llm.cli_options import echo_table
from d2llm.types import Floats

ENGINES: tuple[Engine, ...] = ("rank-bm25", "bm25s")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--split", default="train", show_default=True)
@click.option("--sample", default=200, show_default=True, help="Queries that both engines rank.")
@click.option("--depth", default=100, show_default=True, help="Passages to rank for each query.")
@click.option("--k", default=10, show_default=True, help="First ranks that are compared.")
def main(folder: Path, split: str, sample: int, depth: int, k: int) -> None:
    """Measure on FOLDER, a BEIR folder."""
    data = RetrievalData.load(folder, split)
    texts, queries = [document.content for document in data.documents.values()], list(data.queries.values())
    sampled = random.Random(0).sample(queries, min(sample, len(queries)))
    engines, index_seconds = {}, {}
    for name in ENGINES:
        start = time.perf_counter()
        engines[name] = Bm25(texts, name)
        index_seconds[name] = time.perf_counter() - start
    seconds: dict[Engine, list[float]] = {name: [] for name in ENGINES}
    ranked: dict[Engine, list[list[int]]] = {name: [] for name in ENGINES}
    for query in sampled:
        for name, bm25 in engines.items():
            start = time.perf_counter()
            ranked[name] += bm25.rank([query], depth)
            seconds[name].append(time.perf_counter() - start)
    shares = [
        agrees(engines["rank-bm25"].scores(query), reference, fast, k)
        for query, reference, fast in zip(sampled, ranked["rank-bm25"], ranked["bm25s"], strict=True)
    ]
    agreement = float(np.mean(shares))
    start = time.perf_counter()
    engines["bm25s"].rank(queries, depth)
    all_seconds = time.perf_counter() - start

    milliseconds = {name: float(np.median(seconds[name]) * 1e3) for name in ENGINES}
    ratio = milliseconds["rank-bm25"] / milliseconds["bm25s"]
    click.echo(f"{len(texts)} passages, {len(queries)} queries; {len(sampled)} queries by both engines, depth {depth}")
    echo_table(
        [[name, f"{index_seconds[name]:.2f}", f"{milliseconds[name]:.3f}"] for name in ENGINES],
        header=["engine", "index (s)", "query (ms, median)"],
    )
    click.echo(
        f"rank-bm25 / bm25s: {ratio:.0f}x; same top {k}: {agreement:.2%}; all queries by bm25s: {all_seconds:.1f} s"
    )
    print(
        json.dumps(
            {
                "machine": platform.machine(),
                "dataset": folder.name,
                "query_ms": milliseconds,
                "index_s": index_seconds,
                "ratio": ratio,
                f"agreement@{k}": agreement,
                "all_queries_s": all_seconds,
            }
        )
    )


def agrees(scores_N: Floats, reference: list[int], fast: list[int], k: int) -> float:
    """Share of the first k ranks where both rankings have passages of the same score; 1 if both are empty."""
    if len(reference) != len(fast):
        return 0.0
    pairs = zip(scores_N[reference[:k]].tolist(), scores_N[fast[:k]].tolist(), strict=True)
    same = [math.isclose(a, b, rel_tol=1e-6) for a, b in pairs]
    return sum(same) / len(same) if same else 1.0


if __name__ == "__main__":
    main()
