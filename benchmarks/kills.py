"""Whether `d2llm index` survives being killed: a load is killed at random moments and run again until it is complete.

    python benchmarks/kills.py runs/demo/model

Four jobs take turns, in embedded collections of generated documents: a plain load; a changed corpus with --prune (a
tenth of the documents gone, a tenth changed, a tenth new); a first collection under an alias; and the changed corpus
under that alias, beside the collection that is searched. Each is killed (SIGKILL) at a random moment of the whole run,
or of what follows the last document (pruning, the graph, the alias), started again, killed again, and so on, until it
was killed three times or comes to its end; then its contents are compared with those of a load that nobody disturbed,
and the next job begins, until there were as many kills as asked for.

After each kill, the alias must name a collection that holds all of one corpus and can be searched, or never have named
any. Prints where the kills fell and what was lost, twice there, or different.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from d2llm.cli_options import echo_table
from d2llm.connectors import Qdrant, QdrantIndex
from d2llm.connectors.engine import SearchResult
from d2llm.connectors.points import candidates_of
from d2llm.folder import read_config
from d2llm.types import RESERVED

KILLS_A_LOAD = 3
WORDS = "query passage index vector recall score engine token segment filter payload batch graph memory search".split()


@dataclass(frozen=True)
class Job:
    """What is typed, and what it makes of what."""

    name: str
    arguments: tuple[str, ...]
    corpus: Path
    documents: int
    before: Path | None
    """The collections that it finds."""
    after: Path
    """Those that it leaves, if nobody disturbs it."""

    @property
    def collection(self) -> str:
        """Or the alias."""
        return self.arguments[1]


class Loads:
    """Runs jobs, and kills them."""

    def __init__(self, model: Path, folder: Path, rng: random.Random) -> None:
        self.model, self.folder, self.rng = model, folder, rng
        self.log = folder / "log"
        self.struck: Counter[str] = Counter()
        self.alias_broken = 0
        self._seconds: dict[str, tuple[float, float]] = {}  # of a whole run, and from its last document on

    def undisturbed(self, job: Job) -> dict[str, Any]:
        """Run a job to its end, and return what it stored."""
        self._prepare(job, job.after)
        process, began = self._start(job, job.after), time.perf_counter()
        self._await_last_document(process, job)
        loaded = time.perf_counter()
        assert process.wait() == 0, self.log.read_text()
        ended = time.perf_counter()
        self._seconds[job.name] = ended - began, ended - loaded
        found = contents(job.after, job.collection, read_config(self.model).feature_dim)
        assert len(found["ids"]) == len(set(found["ids"])) == job.documents
        return found

    def killed(self, job: Job, kills: int, corpora: Sequence[list[str]]) -> dict[str, Any]:
        """Run a job until it comes to its end, killed so many times at most, and return what it stored."""
        place = self.folder / "killed"
        self._prepare(job, place)
        named, kills = job.before is not None, kills + self.struck.total()
        while True:
            process = self._start(job, place)
            if self.struck.total() < kills:
                self._kill(process, job)
            if (status := process.wait()) == 0:
                return contents(place, job.collection, read_config(self.model).feature_dim)
            assert status == -9, self.log.read_text()
            if "--alias" in job.arguments:
                found = searched(place, job.collection)
                self.alias_broken += named if found is None else found not in corpora
                named = found is not None

    def _prepare(self, job: Job, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        if job.before is not None:
            shutil.copytree(job.before, place)

    def _start(self, job: Job, place: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "d2llm", "index", str(self.model), str(job.corpus)]
        command += ["--qdrant", str(place), *job.arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(self.log, "wb"))

    def _kill(self, process: subprocess.Popen[bytes], job: Job) -> None:
        """Unless it is done before."""
        whole, ending = self._seconds[job.name]
        late = self.rng.random() < 0.5
        if late:
            self._await_last_document(process, job)
        try:
            process.wait(self.rng.uniform(0, 1.1) * (ending if late else whole))
        except subprocess.TimeoutExpired:
            process.kill()
            self.struck[f"{job.name}: {moment(self.log.read_text(errors='replace'), job.documents)}"] += 1

    def _await_last_document(self, process: subprocess.Popen[bytes], job: Job) -> None:
        while process.poll() is None and f" {job.documents}/{job.documents} " not in self.log.read_text(
            errors="replace"
        ):
            time.sleep(0.01)


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.option("--documents", default=20_000, show_default=True)
@click.option("--kills", default=30, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(model_folder: Path, documents: int, kills: int, seed: int) -> None:
    """Kill loads with MODEL_FOLDER."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = {str(i): " ".join(rng.choices(WORDS, k=6)) + f" {i}" for i in range(documents + documents // 10)}
        old = {id_: texts[id_] for id_ in list(texts)[:documents]}
        new = {id_: text + " anew" * (int(id_) % 10 == 1) for id_, text in texts.items() if int(id_) % 10}
        loads = Loads(model_folder, folder, rng)
        a, b = (write(folder / name, corpus) for name, corpus in (("a.jsonl", old), ("b.jsonl", new)))
        plain, aliased = folder / "plain", folder / "aliased"
        jobs = [
            Job("index", ("--collection", "kb"), a, len(old), None, plain),
            Job("index --prune", ("--collection", "kb", "--prune"), b, len(new), plain, folder / "pruned"),
            Job("index --alias, the first", ("--alias", "live"), a, len(old), None, aliased),
            Job("index --alias, the next", ("--alias", "live"), b, len(new), aliased, folder / "next"),
        ]
        truths = [loads.undisturbed(job) for job in jobs]
        done: list[dict[str, int]] = []
        while loads.struck.total() < kills:
            job, truth = jobs[len(done) % len(jobs)], truths[len(done) % len(jobs)]
            left = min(KILLS_A_LOAD, kills - loads.struck.total())
            done.append(compared(loads.killed(job, left, [sorted(old, key=int), sorted(new, key=int)]), truth))
            print(f"{loads.struck.total()} kills, {len(done)} loads: {job.name}: {done[-1]}", file=sys.stderr)
    echo_table([[name, str(count)] for name, count in sorted(loads.struck.items())], header=["killed while", "times"])
    total = {name: sum(load[name] for load in done) for name in done[0]}
    print(json.dumps({"kills": kills, "loads": len(done), "documents": documents, **total,
                      "alias_broken": loads.alias_broken}))  # fmt: skip


def write(file: Path, corpus: dict[str, str]) -> Path:
    """A corpus as JSON lines."""
    file.write_text("".join(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in corpus.items()))
    return file


def moment(log: str, documents: int) -> str:
    """What a run that was killed was doing, by its progress bar."""
    done = re.findall(rf" (\d+)/{documents} ", log)
    if not done:
        return "starting (reading the corpus, loading the model)"
    return "pruning, building, pointing the alias" if int(done[-1]) == documents else "encoding and storing"


def searched(place: Path, alias: str) -> list[str] | None:
    """The ids of all that a search through the alias finds; None if nothing has the alias."""
    if alias not in Qdrant(place).collections()[1]:
        return None
    with QdrantIndex(alias, place) as index:
        vector = np.ones(index.info().metadata.embedding_dim, np.float32)
        assert len(index.recall(vector / np.linalg.norm(vector), 10)) == 10
        return sorted(index.ids(), key=int)


def contents(place: Path, name: str, feature_dim: int) -> dict[str, Any]:
    """All that a collection holds, in the order of the ids."""
    with QdrantIndex(name, place) as index:
        ids = sorted(index.ids(), key=int)
        points = [point for page in index._engine.scroll(1000, vectors=True) for point in page]
        collections = len(Qdrant(place).collections()[0])
    points.sort(key=lambda point: int(point.payload[RESERVED]["id"]))
    digests = [point.payload[RESERVED]["digest"] for point in points]
    vectors = np.array([point.vector for point in points], np.float32)
    features = candidates_of(SearchResult([0.0] * len(points), [point.payload for point in points]), feature_dim)
    return {
        "ids": ids, "digests": digests, "vectors": vectors, "features": features.features,
        "payloads": features.payloads, "collections": collections,
    }  # fmt: skip


def compared(found: dict[str, Any], truth: dict[str, Any]) -> dict[str, int]:
    """What is lost, twice there, or different. (The last bits of a vector depend on those that it was batched with.)"""
    same = found["ids"] == truth["ids"]
    close = same and np.isclose(found["vectors"], truth["vectors"], atol=1e-5).all(1)
    near = same and np.isclose(found["features"], truth["features"], rtol=2e-3, atol=1e-3).all(1)
    return {
        "lost": len(set(truth["ids"]) - set(found["ids"])),
        "twice": len(found["ids"]) - len(set(found["ids"])),
        "not_pruned": len(set(found["ids"]) - set(truth["ids"])),
        "other_content": sum(a != b for a, b in zip(found["digests"], truth["digests"], strict=False))
        + sum(a != b for a, b in zip(found["payloads"], truth["payloads"], strict=False)),
        "other_vectors": int(np.sum(~np.asarray(close))) + int(np.sum(~np.asarray(near))),
        "collections_left_over": found["collections"] - truth["collections"],
    }


if __name__ == "__main__":
    main()
