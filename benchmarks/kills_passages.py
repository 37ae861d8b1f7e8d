"""Check that documents of several passages survive kills: a job is killed at random moments while searches go on.

    python benchmarks/kills_passages.py MODEL

A job replaces all documents of an embedded collection by their next version, again and again, in a process that also
searches it all the time, in another thread. Every text tells its document and version. The job is killed (SIGKILL) at a
random moment and started again, which goes on where it stopped, until the number of kills is reached. Then the last
version is loaded without a kill.

Counts: hits whose passage is of another version than an earlier or later part of the same document read meanwhile
(`mixed`), documents that are missing from a search of all (`missing`), texts that are not whole (`torn`); and, in the
end, documents lost or stored twice, and points that belong to no document.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

import d2llm
from d2llm.connectors import QdrantIndex
from d2llm.types import Candidates

WORD = re.compile(r"doc(\d+)v(\d+)")


def text(number: int, version: int) -> str:
    """Return a text of about 1 to 12 passages, every word of which tells document and version."""
    return f"doc{number}v{version} " * (10 + 37 * ((number + version) % 11))


def corpus(documents: int, version: int) -> Iterator[dict[str, object]]:
    """Yield all documents in a version."""
    for number in range(documents):
        yield {"id": str(number), "text": text(number, version), "version": version}


def faults(index: QdrantIndex, found: Candidates, rng: random.Random, documents: int) -> dict[str, int]:
    """Count what is wrong with a search of everything, and with one document."""
    versions: dict[str, set[int]] = {}
    wrong = 0
    for id_, payload in zip(found.ids, found.payloads, strict=True):
        told = {(int(number), int(version)) for number, version in WORD.findall(payload["text"])}
        wrong += told != {(int(id_), payload["version"])}
        versions.setdefault(id_, set()).add(payload["version"])
    id_ = str(rng.randrange(documents))
    payload = index.get([id_])[id_]
    torn = payload["text"] != text(int(id_), payload["version"])
    return {
        "mixed": wrong + sum(len(each) > 1 for each in versions.values()),
        "missing": documents - len(versions),
        "torn": int(torn),
    }


def job(model_folder: Path, folder: Path, documents: int, version: int, log: Path) -> None:
    """Load one version after another, from `version`, and search meanwhile. The first faults go into `log`."""
    model, rng = d2llm.load(model_folder, threads=1), random.Random()
    index = QdrantIndex("kb", folder)
    index.open_for(model.config)
    vector = model.encode_query(["doc"]).vectors[0]
    totals: dict[str, int] = {"searches": 0, "mixed": 0, "missing": 0, "torn": 0}

    def search() -> None:
        while True:
            for name, count in faults(index, index.recall(vector, 30 * documents), rng, documents).items():
                totals[name] += count
            totals["searches"] += 1
            log.write_text(json.dumps(totals))

    if index.count() == documents:
        threading.Thread(target=search, daemon=True).start()
    while True:
        index.add(model, corpus(documents, version))
        version += 1
        if version == 1:  # the searches wait for the first load
            threading.Thread(target=search, daemon=True).start()


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.option("--documents", default=60, show_default=True)
@click.option("--kills", default=30, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--job", "arguments", nargs=3, type=str, hidden=True)
def main(model_folder: Path, documents: int, kills: int, seed: int, arguments: tuple[str, str, str] | None) -> None:
    """Kill jobs with MODEL_FOLDER."""
    if arguments is not None:
        place, first, file = arguments
        return job(model_folder, Path(place), documents, int(first), Path(file))
    rng = random.Random(seed)
    total: dict[str, int] = {"kills": 0}
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "qdrant", Path(temporary) / "log.json"
        model = d2llm.load(model_folder, threads=1)
        with QdrantIndex("kb", folder) as index:
            index.add(model, corpus(documents, 0))
        version = 1
        while total["kills"] < kills:
            log.unlink(missing_ok=True)
            command = [sys.executable, __file__, str(model_folder), "--documents", str(documents)]
            process = subprocess.Popen([*command, "--job", str(folder), str(version), str(log)])
            while not log.exists():
                assert process.poll() is None, "the job failed"
                time.sleep(0.01)
            time.sleep(rng.uniform(0.2, 4))
            process.kill()
            process.wait()
            total["kills"] += 1
            for name, count in json.loads(log.read_text() or "{}").items():
                total[name] = total.get(name, 0) + count
            with QdrantIndex("kb", folder) as index:
                version = 1 + max(payload["version"] for payload in index.get(map(str, range(documents))).values())
                left = index.info()
            print(f"{total}; version {version - 1}; {left.passages} points", file=sys.stderr)
        with QdrantIndex("kb", folder) as index:
            index.add(model, corpus(documents, version))
            ids, got, info = list(index.ids()), index.get(map(str, range(documents))), index.info()
            found = index.recall(np.asarray(model.encode_query(["doc"]).vectors[0]), 10**6)
    total["lost"] = sum(got[str(number)]["text"] != text(number, version) for number in range(documents))
    total["twice"] = len(ids) - len(set(ids))
    total["left over"] = info.passages - len(found)
    print(json.dumps(total))


if __name__ == "__main__":
    main()
