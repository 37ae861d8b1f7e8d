"""Measure which part of an indexing job is encoding, and how long a second run over an unchanged corpus takes.

    python benchmarks/indexing.py runs/demo/model squad-sent

One process takes turns: it encodes the passages of a BEIR folder and stores nothing; it indexes them into a new
embedded collection, without and with BM25 vectors; it indexes the same passages again. Prints seconds, passages a
second, and ratios of the medians.
"""

from __future__ import annotations

import json
import tempfile
import time
from itertools import islice
from pathlib import Path

import click
import numpy as np

import d2llm
from d2llm.cli_options import echo_table
from d2llm.connectors import Bm25Options, QdrantIndex
from d2llm.corpus import read_documents
from d2llm.readers import corpus_file


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.argument("dataset", type=click.Path(path_type=Path, exists=True))
@click.option("--documents", default=4000, show_default=True, help="Passages to index.")
@click.option("--rounds", default=5, show_default=True, help="How often each job runs.")
def main(model_folder: Path, dataset: Path, documents: int, rounds: int) -> None:
    """Index the first passages of DATASET, a BEIR folder, with MODEL_FOLDER."""
    model = d2llm.load(model_folder)
    seconds: dict[str, list[float]] = {"encode alone": [], "index": [], "index --hybrid": [], "index again": []}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        with open(corpus_file(dataset), "rb") as file:
            corpus.write_bytes(b"".join(islice(file, documents)))
        texts = [document.content for document in read_documents(corpus)]
        model.encode_document(texts[:500])
        for turn in range(rounds):
            begin = time.perf_counter()
            model.encode_document(texts)
            seconds["encode alone"].append(time.perf_counter() - begin)
            for name, bm25 in (("index", None), ("index --hybrid", Bm25Options())):
                with QdrantIndex(f"{name.replace(' ', '')}-{turn}", folder, options={"bm25": bm25}) as index:
                    for run in (name, "index again"):
                        begin = time.perf_counter()
                        report = index.add(model, read_documents(corpus))
                        seconds[run].append(time.perf_counter() - begin)
                        assert report.added == (0 if run == "index again" else len(texts))
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    echo_table(
        [
            [name, f"{value:.2f}", f"{len(texts) / value:,.0f}", f"{100 * median['encode alone'] / value:.1f} %"]
            for name, value in median.items()
        ],
        header=[f"{len(texts):,} passages", "s", "passages/s", "speed of encoding alone"],
    )
    print(
        f"A second run takes {100 * median['index again'] / median['index']:.1f} % of the first, and encodes nothing."
    )
    print(json.dumps({"documents": len(texts), "rounds": rounds, "seconds": seconds}))


if __name__ == "__main__":
    main()
