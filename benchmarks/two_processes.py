"""Check that two processes on one folder do not damage each other's collections.

    python benchmarks/two_processes.py runs/demo/model

Each round runs two random d2llm commands at about the same time on one folder of embedded collections. A command either
does its work or is refused with one line: because the collection is in use, or for a reason that also holds when it
runs alone. Afterwards the folder must contain what the commands that were not refused leave when they run one after the
other, in one of the two orders. In every fourth round one command runs alone and is killed (SIGKILL); it must do its
work when it runs again. Stops at the first fault.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import click

from d2llm.cli_options import echo_table
from d2llm.connectors import Qdrant, QdrantIndex

World: TypeAlias = dict[str, dict[str, str]]
"""`{name: {id: text}}` of collections, aliases (the same object as their collection) and snapshots."""
Outcome: TypeAlias = tuple[World, str]
"""The world after a command, and part of the message if the command is refused (else empty)."""

# The threshold is low, so that the engine builds graphs of these small collections.
D2LLM = [sys.executable, "-c", "from d2llm.connectors import edge; edge.INDEXING_THRESHOLD_KB = 10; "
                               "from d2llm.cli import main; main(prog_name='d2llm')"]  # fmt: skip
IN_USE = "is in use by another process"
MISSING, EXISTS, OTHERS = "no collection", "exists already", "nothing was copied"


@dataclass(frozen=True)
class Job:
    """A command, and its effect on a world."""

    name: str
    arguments: Sequence[str | Path]
    effect: Callable[[World], Outcome] = lambda world: (world, "")

    def start(self) -> subprocess.Popen[str]:
        """Start the command in its own process."""
        command = [*D2LLM, *map(str, self.arguments)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run(self, delay: float = 0.0) -> tuple[str, float]:
        """Run the command after `delay` seconds. Returns its error line (empty if it works), and its seconds."""
        time.sleep(delay)
        begin, process = time.perf_counter(), self.start()
        _, stderr = process.communicate(timeout=300)
        errors = [line for line in stderr.splitlines() if line.startswith("Error: ")]
        assert "Traceback" not in stderr and len(errors) == (process.returncode != 0), f"{self.name}: {stderr}"
        return "".join(errors), time.perf_counter() - begin


@dataclass(frozen=True)
class Jobs:
    """The commands to choose from, all in one folder. `far` has the documents of a folder that never changes."""

    folder: Path
    model: Path
    corpora: dict[Path, dict[str, str]]
    far: dict[str, str]

    def draw(self, rng: random.Random, number: int, world: World, *, among: int | None = None) -> Job:
        """Draw a job at random, or one of the first `among` jobs, for the current `world`."""
        place: list[str | Path] = ["--qdrant", self.folder / "qdrant"]
        corpus, documents = rng.choice(list(self.corpora.items()))
        id_, name = rng.choice(list(documents)), rng.choice(["kb", "kb", "kb", "copy"])
        saved, new = rng.choice([*filter(_is_snapshot, world)]), f"{number}.snapshot"
        look = _with(name, lambda world: (world, ""))
        index, collection = ["index", self.model, corpus, *place], ["collection"]
        jobs = [
            Job("index", [*index, "--collection", name], lambda world: (_merged(world, name, documents), "")),
            Job("index --prune", [*index, "--collection", name, "--prune"],
                lambda world: (_replaced(world, name, documents), "")),
            Job("index --alias", [*index, "--alias", "news"], lambda world: ({**world, "news": documents}, "")),
            Job("search", ["search", self.model, "word", *place, "--collection", name], look),
            Job("tune", ["tune", self.model, "--queries", self.folder / "queries", *place, "--collection", name], look),
            Job("info", [*collection, "info", name, *place], look),
            Job("snapshot", [*collection, "snapshot", name, self.folder / new, *place],
                _with(name, lambda world: ({**world, new: world[name]}, EXISTS if new in world else ""))),
            Job("restore", [*collection, "restore", name, self.folder / saved, *place],
                lambda world: (world, EXISTS) if name in world else ({**world, name: dict(world[saved])}, "")),
            Job("migrate from", [*collection, "migrate", "kb", *place, "--to", place[1], "--as", "copy"],
                _with("kb", lambda world: _copied(world, "copy", world["kb"]))),
            Job("migrate into", [*collection, "migrate", "kb", "--qdrant", self.folder / "far", "--to", place[1],
                                 "--as", name], lambda world: _copied(world, name, self.far)),
            Job("alias", [*collection, "alias", name, "live", *place],
                _with(name, lambda world: ({**world, "live": world[name]}, ""))),
            Job("delete", [*collection, "delete", name, "--id", id_, *place],
                _with(name, lambda world: (_replaced(world, name, _without(world[name], id_)), ""))),
            Job("drop", [*collection, "drop", name, "--yes", *place],
                _with(name, lambda world: ({key: texts for key, texts in world.items()
                                            if texts is not world[name] or _is_snapshot(key)}, ""))),
        ]  # fmt: skip
        return rng.choice(jobs[:among])


def _is_snapshot(name: str) -> bool:
    return name.endswith(".snapshot")


def _with(name: str, effect: Callable[[World], Outcome]) -> Callable[[World], Outcome]:
    return lambda world: effect(world) if name in world else (world, MISSING)


def _without(documents: dict[str, str], id_: str) -> dict[str, str]:
    return {key: text for key, text in documents.items() if key != id_}


def _replaced(world: World, name: str, documents: dict[str, str]) -> World:
    """Replace the documents of a collection, and so of its aliases. Snapshots do not change."""
    new, old = dict(documents), world.get(name)
    changed = {key: new if texts is old and not _is_snapshot(key) else texts for key, texts in world.items()}
    return {**changed, name: new}


def _merged(world: World, name: str, documents: dict[str, str]) -> World:
    return _replaced(world, name, {**world.get(name, {}), **documents})


def _copied(world: World, name: str, documents: dict[str, str]) -> Outcome:
    kept = all(documents.get(id_) == text for id_, text in world.get(name, {}).items())
    return (_replaced(world, name, documents), "") if kept else (world, OTHERS)


def in_order(jobs: Sequence[Job], world: World) -> tuple[World, list[str]]:
    """The world after the jobs run one after the other, and the message of each."""
    messages = []
    for job in jobs:
        world, message = job.effect(world)
        messages.append(message)
    return world, messages


def held(folder: Path, known: World) -> World:
    """The world as a new process sees it. A snapshot is restored to read it, unless it is in `known`."""
    place, restored = Qdrant(folder / "qdrant"), Qdrant(folder / "restored")
    names, aliases = place.collections()
    world = {name: _contents(place.index(name)) for name in names}
    world |= {alias: world[name] for alias, name in aliases.items()}
    world = {name: world[name] for name in ("kb", "copy", "live", "news") if name in world}
    for file in folder.glob("*.snapshot"):
        if file.name not in known:
            restored.restore("restored", file)
            known[file.name] = _contents(restored.index("restored"))
            restored.drop("restored")
        world[file.name] = known[file.name]
    return world


def _contents(collection: QdrantIndex) -> dict[str, str]:
    with collection as index:
        documents = {id_: payload["text"] for id_, payload in index.get(list(index.ids())).items()}
        assert len(documents) == index.count() == index.info().passages, f"{index.where} is incomplete"
        return documents


def rounds(jobs: Jobs, number: int, rng: random.Random) -> Iterator[tuple[str, list[Job]]]:
    """Run the rounds, and yield the kind of each round and its commands."""
    world, took = held(jobs.folder, {}), defaultdict[str, float](lambda: 1.0)
    for i in range(number):
        # In every other round the first job writes for long, so that the second job starts in the middle of it.
        drawn = [jobs.draw(rng, 2 * i, world, among=None if i % 2 else 2), jobs.draw(rng, 2 * i + 1, world)]
        if i % 4 == 1:
            ran = drawn[:1]
            kind, reasons = "killed, and run again", [_killed_and_run_again(ran[0], rng.uniform(0, took[ran[0].name]))]
            after, _ = in_order(ran, world)
            expected = [(after, in_order(ran, seen)[1]) for seen in (world, after)]
        else:
            # Most jobs use the collection in the second half of their time.
            lead = rng.uniform(0.5, 1) * took[drawn[0].name] - rng.uniform(0.5, 1) * took[drawn[1].name]
            with ThreadPoolExecutor() as pool:
                done = list(zip(drawn, pool.map(Job.run, drawn, [max(0.0, -lead), max(0.0, lead)]), strict=True))
            took.update({job.name: seconds for job, (_, seconds) in done})
            ran = [job for job, (reason, _) in done if IN_USE not in reason]
            kind, reasons = KINDS[len(ran)], [reason for _, (reason, _) in done if IN_USE not in reason]
            expected = _in_either_order(ran, world)
        now = held(jobs.folder, {name: documents for name, documents in world.items() if _is_snapshot(name)})
        fits = [after for after, messages in expected if after == now and all(map(_agree, messages, reasons))]
        assert ran and fits, f"{[job.name for job in drawn]}: {reasons}, left {_sizes(now)} of {_sizes(world)}"
        world = fits[0]
        yield kind, ran


KINDS = ["both refused", "one refused: in use", "one after the other"]


def _killed_and_run_again(job: Job, seconds: float) -> str:
    process = job.start()
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return job.run()[0]


def _in_either_order(jobs: Sequence[Job], world: World) -> list[tuple[World, list[str]]]:
    outcomes = []
    for order in itertools.permutations(range(len(jobs))):
        after, messages = in_order([jobs[i] for i in order], world)
        outcomes.append((after, [messages[order.index(i)] for i in range(len(jobs))]))
    return outcomes


def _agree(expected: str, message: str) -> bool:
    return expected in message and bool(expected) == bool(message)


def _sizes(world: World) -> dict[str, int]:
    return {name: len(documents) for name, documents in world.items()}


def _run(*arguments: str | Path) -> None:
    reason, _ = Job(str(arguments[0]), arguments).run()
    assert not reason, reason


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", "number", default=100, show_default=True, help="Number of rounds.")
@click.option("--documents", "size", default=4000, show_default=True, help="Documents of a corpus.")
@click.option("--seed", default=0, show_default=True)
def main(model: Path, number: int, size: int, seed: int) -> None:
    """Run pairs of commands with MODEL on one folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = {}
        for version, start in enumerate([0, size // 2, 0]):
            path = folder / f"{version}.jsonl"
            corpora[path] = {str(i): f"word {i} of version {version}" for i in range(start, start + size)}
            rows = [json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in corpora[path].items()]
            path.write_text("".join(rows), encoding="utf-8")
            (folder / "queries").write_text("".join(rows[:20]), encoding="utf-8")
        first, documents = next(iter(corpora.items()))
        for place in ("qdrant", "far"):
            _run("index", model, first, "--qdrant", folder / place, "--collection", "kb")
        _run("collection", "snapshot", "kb", folder / "far.snapshot", "--qdrant", folder / "far")
        kinds, commands = Counter[str](), Counter[str]()
        for kind, ran in rounds(Jobs(folder, model, corpora, documents), number, random.Random(seed)):
            kinds[kind] += 1
            commands.update(job.name for job in ran)
    echo_table([[name, str(count)] for name, count in sorted(commands.items())], header=["not refused", "times"])
    print(json.dumps({"rounds": number, "lost": 0, "tracebacks": 0, **kinds}))


if __name__ == "__main__":
    main()
