"""Measure searches a second from several threads and from an event loop, and what holds the interpreter lock.

    python benchmarks/throughput.py MODEL --folder runs/serve_load

The collection is that of serve_load.py, in `--folder`. Every encoder of queries that MODEL has is measured. The numbers
of threads, and of searches in flight on an event loop, take turns.

Only one thread at a time can hold the interpreter lock. So the time that a search holds it bounds searches a second,
however many cores there are. Each stage of a search is called by one thread and by two, in turns: two do twice as much
if the stage releases the lock, and no more than one if it holds the lock. Run it on an idle machine with two cores or
more. Prints tables for people, and one line of JSON for machines.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
from serve_load import COLLECTION, build

import d2llm
from d2llm.cli_options import echo_table
from d2llm.connectors import Effort, QdrantIndex
from d2llm.connectors.edge_requests import nearest
from d2llm.connectors.engine import Search
from d2llm.model import ENCODER_SIZES

ASKED = 200
"""The number of queries that each stage is measured with."""
WHOLE = "whole search"


@click.command()
@click.argument("model_folder", metavar="MODEL", type=click.Path(path_type=Path, exists=True))
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/serve_load"), show_default=True)
@click.option("--passages", default=100_000, show_default=True)
@click.option("--at-once", default="1,4,16", show_default=True, help="Threads or searches in flight, comma-separated.")
@click.option("--seconds", default=2.0, show_default=True, help="Duration of a measurement.")
@click.option("--rounds", default=3, show_default=True, help="The medians of so many rounds are shown.")
def main(model_folder: Path, folder: Path, passages: int, at_once: str, seconds: float, rounds: int) -> None:
    """Measure searches with MODEL."""
    sizes = ENCODER_SIZES if d2llm.load(model_folder).query_encoder == "small" else ENCODER_SIZES[:1]
    folder.mkdir(parents=True, exist_ok=True)
    queries = build(d2llm.load(model_folder, query_encoder="full"), folder, passages)
    counts, results = [int(count) for count in at_once.split(",")], dict[str, Any]()
    with QdrantIndex(COLLECTION, folder / "qdrant") as index:
        for size in sizes:
            searcher = d2llm.Searcher(d2llm.load(model_folder, query_encoder=size), index)
            index.warm()
            rates = throughput(searcher, queries, counts, seconds, rounds)
            found = {}
            for name, stage in stages(searcher, queries[:ASKED]).items():
                pairs = [
                    [from_threads(stage, queries[:ASKED], count, seconds / 2) for count in (1, 2)]
                    for _ in range(rounds)
                ]
                one, two = (median(column) for column in zip(*pairs, strict=True))
                found[name] = {"ms": 1e3 / one, "two_threads": two / one}
            results[size] = {"searches_a_second": rates, "stages": found}
            show(size, counts, rates, found)
    print(json.dumps({"passages": passages, "at_once": counts, **results}))


def show(size: str, counts: list[int], rates: dict[str, list[float]], found: dict[str, dict[str, float]]) -> None:
    """Print the two tables of an encoder."""
    click.echo(f"\n{size} query encoder, searches a second")
    rows = [[kind, *(f"{rate:.0f}" for rate in row)] for kind, row in rates.items()]
    echo_table(rows, header=["", *map(str, counts)])
    click.echo(f"\n{size} query encoder, stages")
    rows = [[name, f"{stage['ms']:.3f}", f"{stage['two_threads']:.2f}x"] for name, stage in found.items()]
    echo_table(rows, header=["stage", "ms", "two threads"])


def throughput(
    searcher: d2llm.Searcher, queries: Sequence[str], counts: Sequence[int], seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Return the searches a second of so many threads, and of so many searches in flight on an event loop."""
    kinds: dict[str, Callable[[int], float]] = {
        "threads": lambda count: from_threads(searcher.search, queries, count, seconds),
        "in flight": lambda count: asyncio.run(from_event_loop(searcher, queries, count, seconds)),
    }
    found: dict[str, list[list[float]]] = {kind: [[] for _ in counts] for kind in kinds}
    for _ in range(rounds):
        for (kind, measure), (row, count) in itertools.product(kinds.items(), enumerate(counts)):
            found[kind][row].append(measure(count))
    return {kind: [median(rates) for rates in rows] for kind, rows in found.items()}


def from_threads(stage: Callable[[str], Any], queries: Sequence[str], count: int, seconds: float) -> float:
    """Return the calls of a stage a second, by `count` threads."""
    done, start = [0] * count, time.perf_counter()

    def work(number: int) -> None:
        for query in itertools.cycle(queries[number::count]):
            if time.perf_counter() > start + seconds:
                return
            stage(query)
            done[number] += 1

    threads = [threading.Thread(target=work, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start)


async def from_event_loop(searcher: d2llm.Searcher, queries: Sequence[str], count: int, seconds: float) -> float:
    """Return the searches a second of `count` tasks."""
    done, start = [0] * count, time.perf_counter()

    async def work(number: int) -> None:
        for query in itertools.cycle(queries[number::count]):
            if time.perf_counter() > start + seconds:
                return
            await searcher.asearch(query)
            done[number] += 1

    await asyncio.gather(*map(work, range(count)))
    return sum(done) / (time.perf_counter() - start)


def stages(searcher: d2llm.Searcher, queries: Sequence[str]) -> dict[str, Callable[[str], Any]]:
    """Return the stages of a search that are not python, and the whole. Each takes one of the queries."""
    model, index, limit = searcher.model, searcher.index, searcher.options.candidates
    assert isinstance(index, QdrantIndex)
    engine: Any = index._engine
    params = Effort().compile(limit, engine.models)
    vectors = dict(zip(queries, model.encode_query(queries).vectors.tolist(), strict=True))
    tokens = model.query.tokenize(queries[:1])
    vectors_1E, features_1H = model.query.run(tokens)
    candidates = index.recall(vectors_1E[0], limit)

    def search(query: str) -> list[Any]:
        request = nearest(Search(vectors[query], limit, None, params), engine.models, payloads=False)
        hits: list[Any] = engine._shard.query(request)
        return hits

    hits = search(queries[0])
    ids = [hit.id for hit in hits[: searcher.options.k]]
    return {
        "tokenizers": lambda query: model.query.tokenize([query]),
        "onnxruntime: encoder": lambda _: model.query.run(tokens),
        "engine: search": search,
        "engine: ids of the candidates": lambda _: [hit.id for hit in hits],
        "onnxruntime: IEM": lambda _: model.score(features_1H, candidates.features[None], candidates.scores[None]),
        "engine: payloads of the hits": lambda _: [
            record.payload for record in engine._shard.retrieve(ids, with_payload=True, with_vector=False)
        ],
        WHOLE: searcher.search,
    }


if __name__ == "__main__":
    main()
