"""Load a `d2llm serve` on this machine, and compare it with the library called in a loop.

    python benchmarks/serve_load.py MODEL --folder runs/serve_load             # p50, p99 and searches a second
    python benchmarks/serve_load.py MODEL --folder runs/serve_load --soak 60   # an hour at half of the load

The collection has real passages (Python's documentation), and around them drawn ones up to `--passages`. It is built
once, in `--folder`. Clients search one after another over connections that stay open; together they are one process,
which shares the cores with the service. The library searches the same queries one by one, in a process of its own, with
a copy of the collection. They are measured in turns. Prints a table for people, and one line of JSON for machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np

import d2llm
from d2llm.cli_options import echo_table
from d2llm.connectors import QdrantIndex

COLLECTION = "load"
REAL = 2000
"""Passages that are real, whose first lines are the queries."""


def build(model: d2llm.Model, folder: Path, passages: int) -> list[str]:
    """Make the collection, unless it is there, and return the queries."""
    queries = folder / "queries.json"
    if not queries.exists():
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        from python_docs import collect, public_modules  # these import torch
        from search_latency import fill

        click.echo(f"indexing {passages} passages ...", err=True)
        with warnings.catch_warnings(), contextlib.redirect_stderr(None):
            warnings.simplefilter("ignore")
            entries = collect(public_modules())[:REAL]
        texts = [entry["text"] for entry in entries]
        with QdrantIndex(COLLECTION, folder / "qdrant") as index:
            fill(index, model, model.encode_document(texts), texts, passages)
        queries.write_text(json.dumps([entry["summary"] for entry in entries]), encoding="utf-8")
    found: list[str] = json.loads(queries.read_text(encoding="utf-8"))
    return found


@contextlib.contextmanager
def service(model: Path, folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Run `d2llm serve`; yields its address and the id of its process."""
    command = [sys.executable, "-m", "d2llm", "serve", str(model), "--qdrant", str(folder / "qdrant"), "--port", "0"]
    log = (folder / "serve.log").open("w", encoding="utf-8")
    process = subprocess.Popen([*command, "--collection", COLLECTION, *options], stderr=log)
    try:
        yield _address(process, folder / "serve.log"), process.pid
    finally:
        process.terminate()
        process.wait()
        log.close()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the service is ready, and return its address."""
    while process.poll() is None:
        messages = [json.loads(line).get("message", "") for line in log.read_text(encoding="utf-8").splitlines()]
        if any(message.startswith("ready") for message in messages):
            return str(next(message for message in messages if message.startswith("listening")).split()[-1])
        time.sleep(0.1)
    raise click.ClickException(log.read_text(encoding="utf-8"))


class Client:
    """Sends searches over one connection, one after another. Notes the seconds that each took, and what was refused."""

    def __init__(self, address: str, queries: Sequence[str]) -> None:
        place = urlsplit(address)
        self._place = place.hostname, place.port
        self._requests = itertools.cycle([_request(query) for query in queries])
        self.seconds, self.failed = list[float](), list[bytes]()

    async def run(self, end: float, every: float = 0.0) -> None:
        """Search until the time `end`; with `every`, one search in as many seconds."""
        reader, writer = await asyncio.open_connection(*self._place, limit=2**24)
        due = time.perf_counter()
        while (start := time.perf_counter()) < end:
            writer.write(next(self._requests))
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            answer = await reader.readexactly(length)
            self.seconds.append(time.perf_counter() - start)
            if not head.startswith(b"HTTP/1.1 200") or len(json.loads(answer)["hits"]) != 10:
                self.failed.append(answer)
            due = max(due + every, time.perf_counter() - every)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        writer.close()


def _request(query: str) -> bytes:
    body = json.dumps({"query": query}).encode()
    head = (
        f"POST /search HTTP/1.1\r\nHost: d2llm\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def drawn(queries: Sequence[str], seed: int) -> list[str]:
    """The queries in an order of their own, so that every measurement has long and short ones."""
    return random.Random(seed).sample(queries, len(queries))


def load(address: str, queries: list[str], clients: int, seconds: float, rate: float = 0.0) -> dict[str, float]:
    """Search by so many clients for so long, with `rate` at so many searches a second."""

    async def run() -> list[Client]:
        all_clients = [Client(address, drawn(queries, number)) for number in range(clients)]
        end = time.perf_counter() + seconds
        await asyncio.gather(*(client.run(end, clients / rate if rate else 0.0) for client in all_clients))
        return all_clients

    start = time.perf_counter()
    done = asyncio.run(run())
    times = np.array([each for client in done for each in client.seconds])
    failed = [answer for client in done for answer in client.failed]
    if failed:
        click.echo(f"{len(failed)} failed: {failed[0]!r}", err=True)
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    rate = len(times) / (time.perf_counter() - start)
    return {"searches_a_second": rate, "p50_ms": float(p50), "p99_ms": float(p99), "failed": len(failed)}


class Library:
    """The library in a process of its own, on a copy of the collection. It searches when it is told to."""

    def __init__(self, model: Path, folder: Path, threads: int | None) -> None:
        if not (folder / "copy").exists():
            shutil.copytree(folder / "qdrant", folder / "copy")
        arguments = json.dumps({"model": str(model), "folder": str(folder), "threads": threads})
        command = [sys.executable, __file__, "--loop", arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def search(self, seconds: float) -> dict[str, float]:
        """Search for so long, one query after another."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(seconds, file=self._process.stdin, flush=True)
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _loop(model: str, folder: str, threads: int | None) -> None:
    """Be the process of `Library`."""
    queries = itertools.cycle(drawn(json.loads((Path(folder) / "queries.json").read_text(encoding="utf-8")), -1))
    with QdrantIndex(COLLECTION, Path(folder) / "copy") as index:
        searcher = d2llm.Searcher(d2llm.load(model, threads=threads), index)
        for line in sys.stdin:
            times, end = list[float](), time.perf_counter() + float(line)
            while (start := time.perf_counter()) < end:
                searcher.search(next(queries))
                times.append(time.perf_counter() - start)
            p50, p99 = np.percentile(times, [50, 99]) * 1e3
            row = {"searches_a_second": len(times) / sum(times), "p50_ms": p50, "p99_ms": p99, "failed": 0}
            print(json.dumps(row), flush=True)


def in_turns(measures: Mapping[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Measure in turns, so that what else the machine does meets all of them. Returns the medians of the rounds."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return {
        name: {key: float(np.median([row[key] for row in rows])) for key in rows[0]} for name, rows in found.items()
    }


def of_process(pid: int) -> dict[str, float]:
    """What a process holds (on Linux): memory in MB, open files, threads."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "memory_mb": int(fields["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


def soak(address: str, pid: int, queries: list[str], rate: float, minutes: float) -> list[dict[str, Any]]:
    """Search at `rate` searches a second, and look at the process of the service after each quarter."""
    quarters = []
    for number in range(1, 5):
        row: dict[str, Any] = {"quarter": number, **load(address, queries, 8, minutes * 15, rate)}
        time.sleep(3)  # the service sees that the connections are closed
        row |= of_process(pid)
        click.echo(json.dumps(row), err=True)
        quarters.append(row)
    return quarters


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the collection is. [default: a temporary one]")
@click.option("--passages", default=100_000, show_default=True, help="Passages of the collection.")
@click.option("--clients", default="1,8,32", show_default=True, help="Numbers of clients, comma-separated.")
@click.option("--seconds", default=6.0, show_default=True, help="Length of each measurement.")
@click.option("--rounds", default=5, show_default=True, help="Times that everything is measured, in turns.")
@click.option("--threads", type=int, help="CPU threads of the model. [default: one a core]")
@click.option("--soak", "minutes", type=float, help="Search for so many minutes, at half of what 8 clients reach.")
@click.option("--loop", hidden=True, help="Arguments of the library's process.")
def main(
    model: Path | None, folder: Path | None, passages: int, clients: str, seconds: float, rounds: int,
    threads: int | None, minutes: float | None, loop: str | None,
) -> None:  # fmt: skip
    """Measure a service of MODEL."""
    if loop is not None:
        _loop(**json.loads(loop))
        return
    if model is None:
        raise click.UsageError("name the model folder")
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        queries = build(d2llm.load(model, threads=threads), place, passages)
        options = [] if threads is None else ["--threads", str(threads)]
        address, pid = stack.enter_context(service(model, place, *options))
        load(address, queries, 8, 3)  # warm up
        if minutes:
            rows: dict[str, dict[str, Any]] = {"8 clients": load(address, queries, 8, seconds * rounds)}
            quarters = soak(address, pid, queries, rows["8 clients"]["searches_a_second"] / 2, minutes)
            rows |= {f"quarter {row['quarter']}": row for row in quarters}
        else:
            library = stack.enter_context(contextlib.closing(Library(model, place, threads)))
            library.search(1)
            measures: dict[str, Callable[[], dict[str, float]]] = {
                "library in a loop": functools.partial(library.search, seconds)
            }
            for number in map(int, clients.split(",")):
                measures[f"{number} clients"] = functools.partial(load, address, queries, number, seconds)
            rows = dict(in_turns(measures, rounds))
    names = ["searches_a_second", "p50_ms", "p99_ms", "failed", *(["memory_mb", "files", "threads"] if minutes else [])]
    echo_table(
        [[name, *(f"{row[each]:.1f}" if each in row else "-" for each in names)] for name, row in rows.items()],
        header=["", *names],
    )
    print(json.dumps({"passages": passages, "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
