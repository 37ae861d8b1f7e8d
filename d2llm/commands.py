"""The commands of the core: `d2llm eval` and `d2llm doctor`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import click

from d2llm.cli import echo_json, echo_measures
from d2llm.data import RetrievalData, read_pairs
from d2llm.errors import D2LLMError, import_extra
from d2llm.evaluate import evaluate_pairs, evaluate_retrieval
from d2llm.model import load
from d2llm.sessions import installed_runtimes, why_no_cuda
from d2llm.types import TASKS, Task


@click.command("eval")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True, help="Which qrels/SPLIT.tsv of a BEIR folder.")
@click.option("--recall", default=100, show_default=True, type=click.IntRange(1), help="Candidates the IEM rescores.")
@click.option("--task", type=click.Choice(TASKS), help="IEM branch. [default: asymmetric; symmetric for pairs]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: one a core]")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of a table.")
def eval_command(
    model: Path,
    dataset: Path,
    split: str,
    recall: int,
    task: Task | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure MODEL on DATASET: a BEIR folder, or a JSONL file of pairs.

    A BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv) gives a row for each stage: BM25, recall alone, recall
    and IEM, the IEM over everything; overlap@10 says how much of the last one's top ten each stage keeps. Pairs
    (text_a, text_b, score) give Pearson and Spearman of cosine and IEM.
    """
    loaded = load(model, device, threads=threads)  # type: ignore[arg-type]  # click's choice
    if dataset.is_dir():
        data = RetrievalData.load(dataset, split)
        table = evaluate_retrieval(loaded, data, recall=recall, task=task or "asymmetric", progress=not as_json).table
        about = f"{len(data.queries)} queries, {len(data.documents)} passages, recall={recall}"
    else:
        pairs = read_pairs(dataset)
        table = evaluate_pairs(loaded, pairs, task or "symmetric")
        about = f"{len(pairs)} pairs"
    if as_json:
        echo_json({"model": str(model), "dataset": str(dataset), "rows": table})
    else:
        click.echo(about)
        echo_measures(table)


EXTRAS = {
    "cpu or gpu": ["onnxruntime"],
    "qdrant": ["qdrant_client", "qdrant_edge"],
    "eval": ["ir_measures", "bm25s"],
    "train": ["torch", "transformers", "peft", "rank_bm25"],
    "export": ["onnx", "onnxscript", "optimum"],
}
DISTRIBUTIONS = {"qdrant_client": "qdrant-client", "qdrant_edge": "qdrant-edge-py", "rank_bm25": "rank-bm25",
                 "ir_measures": "ir-measures"}  # fmt: skip


@click.command("doctor")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def doctor_command(model: Path | None, device: str) -> None:
    """Show what is installed, what works, and what to do about the rest.

    With MODEL, open it on --device and encode a sentence: the only real proof. Exits with 1 if something that was
    asked for does not work.
    """
    click.echo(f"d2llm {metadata.version('d2llm')}, Python {sys.version.split()[0]}")
    for extra, modules in EXTRAS.items():
        for module in modules:
            try:
                import_extra(module, extra.split()[0])
                found = _version(module)
            except ImportError as error:
                found = f"missing: {error}"
            click.echo(f"  {extra:<12}{module:<16}{found}")
    runtimes = installed_runtimes()
    if len(runtimes) == 2:
        click.echo(f"PROBLEM: {why_no_cuda(runtimes)}")
    problem = _cuda_problem()
    click.echo(f"CUDA: {problem or 'compiled in; only opening a model proves it: d2llm doctor MODEL --device cuda'}")
    if model is not None:
        try:
            loaded = load(model, device)  # type: ignore[arg-type]  # click's choice
            vectors = loaded.encode_query(["does it work?"]).vectors
        except D2LLMError as error:
            raise click.ClickException(f"{model} on {device}: {error}") from error
        click.echo(f"{model} on {device}: works ({vectors.shape[1]} dimensions, {loaded.config.precision})")


def _version(module: str) -> str:
    if module == "onnxruntime":
        return ", ".join(f"{name} {version}" for name, version in installed_runtimes().items())
    return metadata.version(DISTRIBUTIONS.get(module, module))


def _cuda_problem() -> str | None:
    try:
        ort = import_extra("onnxruntime", "gpu")
    except ImportError as error:
        return str(error)
    available = "CUDAExecutionProvider" in ort.get_available_providers()
    return None if available else f"not available. {why_no_cuda(installed_runtimes())}"
