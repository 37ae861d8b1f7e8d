"""Check that `d2llm index` survives kills: kill it at random moments, and run it again until it completes.

    python benchmarks/kills.py runs/demo/model

Four jobs take turns, in embedded collections of generated documents:

- a plain load;
- a changed corpus with --prune: a tenth of the documents is gone, a tenth is changed, a tenth is new;
- a first collection under an alias;
- the changed corpus under that alias, beside the collection that is searched.

A job is killed (SIGKILL) at a random moment of the whole run, or of the part after the last document (pruning, graph,
alias). It is started again until it was killed three times or completes. Then its contents are compared with those of
an undisturbed load, and the next job begins, until the number of kills is reached.

After each kill, the alias must name a collection that contains all of one corpus and can be searched, or must never
have named any. Prints where the kills struck, and what was lost, stored twice, or different.
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
    """An indexing command, and the collections before and after it."""

    name: str
    arguments: tuple[str, ...]
    corpus: Path
    documents: int
    before: Path | None
    """Folder of the collections that the job starts with; None: it starts with none."""
    after: Path
    """Folder of the collections after an undisturbed run."""

    @property
    def collection(self) -> str:
        """The name or alias of its collection."""
        return self.arguments[1]


class Loads:
    """Runs jobs, and kills them."""

    def __init__(self, model: Path, folder: Path, rng: random.Random) -> None:
        self.model, self.folder, self.rng = model, folder, rng
        self.log = folder / "log"
        self.struck: Counter[str] = Counter()
        self.alias_broken = 0
        self._seconds: dict[str, tuple[float, float]] = {}  # of a whole run, and of its part after the last document

    def undisturbed(self, job: Job) -> dict[str, Any]:
        """Run a job to its end without kills, and return what it stored."""
        self._prepare(job, job.after)
        process, began = self._start(job, job.after), time.perf_counter()
        self._await_last_document(process, job)
        loaded = time.perf_counter()
        assert process.wait() == 0, self.log.read_text()
        ended = time.perf_counter()
        self._seconds[job.name] = ended - began, ended - loaded
        stored = contents(job.after, job.collection, read_config(self.model).feature_bytes)
        assert len(stored["ids"]) == len(set(stored["ids"])) == job.documents
        return stored

    def killed(self, job: Job, kills: int, corpora: Sequence[list[str]]) -> dict[str, Any]:
        """Run a job until it completes, with at most `kills` kills, and return what it stored."""
        place = self.folder / "killed"
        self._prepare(job, place)
        named, kills = job.before is not None, kills + self.struck.total()
        while True:
            process = self._start(job, place)
            if self.struck.total() < kills:
                self._kill(process, job)
            if (status := process.wait()) == 0:
                return contents(place, job.collection, read_config(self.model).feature_bytes)
            assert status == -9, self.log.read_text()
            if "--alias" in job.arguments:
                ids = searched(place, job.collection)
                self.alias_broken += named if ids is None else ids not in corpora
                named = ids is not None

    def _prepare(self, job: Job, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        if job.before is not None:
            shutil.copytree(job.before, place)

    def _start(self, job: Job, place: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "d2llm", "index", str(self.model), str(job.corpus)]
        command += ["--qdrant", str(place), *job.arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(self.log, "wb"))

    def _kill(self, process: subprocess.Popen[bytes], job: Job) -> None:
        """Kill the process at a random moment, unless it completes before."""
        whole, ending = self._seconds[job.name]
        in_ending = self.rng.random() < 0.5
        if in_ending:
            self._await_last_document(process, job)
        try:
            process.wait(self.rng.uniform(0, 1.1) * (ending if in_ending else whole))
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
@click.option("--documents", default=20_000, show_default=True, help="Documents of a corpus.")
@click.option("--kills", default=30, show_default=True, help="Number of kills in total.")
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
    """Write a corpus as JSON lines."""
    file.write_text("".join(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in corpus.items()))
    return file


def moment(log: str, documents: int) -> str:
    """What a killed run was doing, according to its progress bar."""
    done = re.findall(rf" (\d+)/{documents} ", log)
    if not done:
        return "starting (reading the corpus, loading the model)"
    return "pruning, building, pointing the alias" if int(done[-1]) == documents else "encoding and storing"


def searched(place: Path, alias: str) -> list[str] | None:
    """Search under the alias, and return the ids of its collection; None if no collection has the alias."""
    if alias not in Qdrant(place).collections()[1]:
        return None
    with QdrantIndex(alias, place) as index:
        vector = np.ones(index.info().metadata.embedding_dim, np.float32)
        assert len(index.recall(vector / np.linalg.norm(vector), 10)) == 10
        return sorted(index.ids(), key=int)


def contents(place: Path, name: str, feature_bytes: int) -> dict[str, Any]:
    """Everything that a collection contains, in the order of the ids."""
    with QdrantIndex(name, place) as index:
        ids = sorted(index.ids(), key=int)
        points = [point for page in index._engine.scroll(1000, vectors=True) for point in page]
        collections = len(Qdrant(place).collections()[0])
    points.sort(key=lambda point: int(point.payload[RESERVED]["id"]))
    digests = [point.payload[RESERVED]["digest"] for point in points]
    vectors = np.array([point.vector for point in points], np.float32)
    features = candidates_of(SearchResult([0.0] * len(points), [point.payload for point in points]), feature_bytes)
    return {
        "ids": ids, "digests": digests, "vectors": vectors, "features": features.features,
        "payloads": features.payloads, "collections": collections,
    }  # fmt: skip


def compared(stored: dict[str, Any], truth: dict[str, Any]) -> dict[str, int]:
    """Count what is lost, stored twice, or different. (The last bits of a vector depend on
    the rest of its batch, and so do a few bytes of the features.)"""
    same = stored["ids"] == truth["ids"]
    close = same and np.isclose(stored["vectors"], truth["vectors"], atol=1e-5).all(1)
    near = same and ((stored["features"] != truth["features"]).mean(1) < 0.05)
    return {
        "lost": len(set(truth["ids"]) - set(stored["ids"])),
        "twice": len(stored["ids"]) - len(set(stored["ids"])),
        "not_pruned": len(set(stored["ids"]) - set(truth["ids"])),
        "other_content": sum(a != b for a, b in zip(stored["digests"], truth["digests"], strict=False))
        + sum(a != b for a, b in zip(stored["payloads"], truth["payloads"], strict=False)),
        "other_vectors": int(np.sum(~np.asarray(close))) + int(np.sum(~np.asarray(near))),
        "collections_left_over": stored["collections"] - truth["collections"],
    }


if __name__ == "__main__":
    main()
