"""Peak memory of `d2llm index` against the size of the corpus.

    python benchmarks/index_memory.py runs/demo/model

Each size runs in a process of its own, on short generated documents (what memory depends on is their number). Prints
the highest anonymous memory (what the process itself holds) and the highest resident set (memory-mapped files of the
engine included, which the system may evict), without and with the documents' vectors.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click

from d2llm.cli import echo_table

WORDS = "query passage index vector recall score engine token segment filter payload batch graph memory search".split()


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.option("--sizes", default="10000,100000", show_default=True)
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
            command = [
                sys.executable,
                __file__,
                "--child",
                str(model_folder),
                str(corpus),
                str(Path(folder) / "qdrant"),
            ]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    echo_table(
        [
            [f"{r['documents']:,}", f"{r['anonymous_mib']:.0f}", f"{r['resident_mib']:.0f}", f"{r['seconds']:.0f}"]
            for r in rows
        ],
        header=["documents", "anonymous MiB", "resident MiB", "s"],
    )
    print(json.dumps(rows))


def child(model_folder: str, corpus: str, qdrant: str) -> None:
    """Index one corpus as the command does, watched by a thread."""
    peak = {"RssAnon": 0, "VmRSS": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in peak:
                    peak[name] = max(peak[name], int(rest.split()[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    from d2llm.cli import main as d2llm

    arguments = ["index", model_folder, corpus, "--qdrant", qdrant, "--collection", Path(corpus).stem, "--json"]
    real, sys.stdout = sys.stdout, sys.stderr
    d2llm.main(arguments, standalone_mode=False)
    sys.stdout = real
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    print(json.dumps({
        "documents": sum(1 for _ in open(corpus, encoding="utf-8")), "seconds": seconds,
        "anonymous_mib": peak["RssAnon"] / 1024, "resident_mib": peak["VmRSS"] / 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
