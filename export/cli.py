"""The commands `d2llm-export onnx` and `d2llm compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from d2llm.beir import RetrievalData
from d2llm.cli_options import (
    RenamedOptions,
    candidates_option,
    echo_json,
    echo_next,
    echo_table,
    json_option,
    max_length_option,
    task_option,
    threads_option,
    typed_options,
    words_option,
)
from d2llm.corpus import read_contents
from d2llm.embedder import create_student, is_embedder
from d2llm.errors import import_extra
from d2llm.files import require_new, require_writable
from d2llm.folder import CONFIG
from d2llm.student import STUDENT, Student
from d2llm.types import Task

from .compare import Row, compare, draw, require_plot
from .onnx import DEFAULT_OPSET, Precision, add_query_encoder, export
from .verify import FLOORS, TOLERANCE


@click.command("onnx")
@click.argument("student")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--precision", type=click.Choice(get_args(Precision)), default="fp32", show_default=True,
              help="Precision of the encoder's weights. Use int8 on CPUs and fp16 on GPUs.")  # fmt: skip
@click.option("--query-encoder", metavar="KALE", type=click.Path(path_type=Path),
              help="Folder of a small query encoder (made by d2llm kale) to add to MODEL. MODEL may exist: then "
                   "everything else in it stays the same, and its collections stay valid.")  # fmt: skip
@click.option("--query-precision", type=click.Choice(get_args(Precision)),
              help="Precision of the small query encoder's weights. [default: --precision]")  # fmt: skip
@words_option
@max_length_option
@click.option("--opset", default=DEFAULT_OPSET, show_default=True, type=click.IntRange(18),
              help="ONNX opset of the graphs.")  # fmt: skip
@json_option
def onnx_command(
    student: str,
    model: Path,
    precision: Precision,
    query_encoder: Path | None,
    query_precision: Precision | None,
    corpus: Path | None,
    max_length: int | None,
    opset: int,
    as_json: bool,
) -> None:
    """Export STUDENT to the new MODEL folder, which d2llm runs without torch.

    STUDENT is a student folder, or a published embedder as d2llm init takes it: a hub id or a folder. Do this once
    after training: indexing and searching need a model folder. It holds the encoder and the IEM as ONNX
    graphs, and the tokenizer. LoRA adapters are merged. With --corpus, the score of an embedder counts the words and
    vectors of both texts too, and no label is needed.

    The export verifies the graphs against torch on real text, in batches of 1 to 33 texts of 1 token up to the limit.
    fp32 must agree within 1e-4. fp16 and int8 must stay above floors of cosine and score correlation. In every
    precision the vector of a text must not depend on its batch. MODEL/d2llm.json stores the measured values. An export
    that fails leaves no MODEL.

    \b
    Examples:
      d2llm-export onnx STUDENT MODEL                        make a model folder
      d2llm-export onnx STUDENT MODEL --precision int8       make a model folder for CPUs
      d2llm-export onnx STUDENT MODEL --query-encoder KALE   make MODEL with a small query encoder, or add one to it
      d2llm-export onnx EMBEDDER MODEL --corpus FILE         make MODEL of a published embedder, fitted to a corpus
    """
    if query_precision is not None and query_encoder is None:
        raise click.UsageError("--query-precision needs --query-encoder: give the folder of a small query encoder too")
    added = query_encoder is not None and (model / CONFIG).is_file()
    if query_encoder is not None and added:
        if typed_options(["precision"]):
            raise click.UsageError(
                f"{model} exists, and --precision would change its encoder: give --query-precision, or another MODEL"
            )
        source = _student(student, corpus, max_length)
        config = add_query_encoder(source, model, query_encoder, precision=query_precision or precision, opset=opset)
    else:
        require_new(model)  # before an embedder is downloaded
        config = export(
            _student(student, corpus, max_length), model, precision=precision, opset=opset, query_encoder=query_encoder,
            query_precision=query_precision,
        )  # fmt: skip
    if as_json:
        echo_json(asdict(config))
        return
    size = sum(file.stat().st_size for file in model.iterdir()) / 2**20
    click.echo(f"{model}: {size:.0f} MiB, {config.precision}, passage encoder {config.fingerprint}")
    click.echo(f"  recall vectors have {config.embedding_dim} numbers, features {config.feature_bytes} bytes")
    click.echo(_agreement("encoder", config.precision, config.agreement))
    if (small := config.query_encoder) is not None:
        click.echo(_agreement(f"small query encoder ({small.kind})", small.precision, small.agreement))
    place = "--qdrant", "./qdrant", "--collection", "docs"
    if added:
        click.echo("The passage encoder is unchanged: collections made with this model stay valid.")
        echo_next("d2llm", "search", model, "your question", *place)
    else:
        echo_next("d2llm", "index", model, "CORPUS.jsonl", *place)


def _student(name: str, corpus: Path | None, max_length: int | None) -> Path | Student:
    """Return a student folder, or the student of a published embedder. The options are for an embedder alone."""
    given = [option for option, value in (("--corpus", corpus), ("--max-length", max_length)) if value is not None]
    if given and (Path(name) / STUDENT).is_file():
        raise click.UsageError(f"{name} is a student folder, and {given[0]} is for a published embedder: leave it out")
    if not is_embedder(name):
        return Path(name)
    return create_student(name, max_length=max_length, corpus=read_contents(corpus))


def _agreement(encoder: str, precision: str, measured: Mapping[str, float]) -> str:
    """Return the line that shows how well an encoder's graph agrees with torch."""
    bound = f"at most {TOLERANCE:.0e}" if precision == "fp32" else f"floors {FLOORS[precision]}"
    return (
        f"  {encoder} ({precision}) against torch: largest difference {measured['max_abs_difference']:.1e}, worst "
        f"cosine {measured['min_cosine']:.5f}, worst score correlation {measured['score_correlation']:.5f} ({bound})"
    )


@click.command("compare", cls=RenamedOptions, renamed={"--recall": "--candidates"})
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("dataset", type=click.Path(path_type=Path))
@click.argument("encoders", metavar="KALE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--split", default="dev", show_default=True,
              help="Split of DATASET to measure: the queries in qrels/SPLIT.tsv.")  # fmt: skip
@click.option("--precision", "precisions", multiple=True, type=click.Choice(get_args(Precision)),
              default=["fp32", "int8"], show_default=True,
              help="Precision of the query encoders' weights. Repeat it to measure several.")  # fmt: skip
@candidates_option
@task_option
@click.option("--timed", default=200, show_default=True, type=click.IntRange(1),
              help="Number of queries to measure the latency with.")  # fmt: skip
@threads_option
@click.option("--plot", metavar="PNG", type=click.Path(path_type=Path, dir_okay=False),
              help="File for a plot of latency against nDCG@10.")  # fmt: skip
@json_option
def compare_command(
    student: Path,
    dataset: Path,
    encoders: tuple[Path, ...],
    split: str,
    precisions: tuple[Precision, ...],
    candidates: int,
    task: Task,
    timed: int,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare small query encoders with STUDENT's own encoder on DATASET: their latency and their ranking quality.

    Use this to choose the query encoder to serve. STUDENT is a student folder, DATASET a BEIR folder, and each KALE a
    small query encoder of STUDENT (made by d2llm kale).

    The full encoder in fp32 encodes the passages once, and all query encoders rank the same passage vectors. Latency is
    measured with one query at a time on the CPU; the encoders take turns. "faster" and "kept" compare with the full
    encoder in fp32.

    \b
    Example:
      d2llm compare STUDENT my-beir-folder KALE-2-LAYERS KALE-STATIC --plot frontier.png
    """
    if plot is not None:
        import_extra("matplotlib", "eval")  # report a missing package before the measurement
        require_writable(plot, file=True)
        require_plot(plot)
    data = RetrievalData.load(dataset, split)
    rows = compare(student, data, encoders, precisions=precisions, candidates=candidates, task=task, timed=timed,
                   threads=threads, progress=not as_json)  # fmt: skip
    measured_on = f"{len(data.queries)} queries ({split}), {len(data.documents)} documents"
    if as_json:
        echo_json([asdict(row) for row in rows])
    else:
        _show(rows, measured_on)
    if plot is not None:
        draw(rows, plot, f"{dataset.name}: {measured_on}")
        if not as_json:
            click.echo(f"\nThe plot is in {plot}")


def _show(rows: Sequence[Row], measured_on: str) -> None:
    """Print the rows as a table, under a line that says what they were measured on."""
    click.echo(f"{measured_on}; ms per query: p50 / p95\n")
    echo_table(
        [
            [
                row.name,
                row.kind,
                row.precision,
                f"{row.parameters / 1e6:.1f} M",
                f"{row.p50:.3f} / {row.p95:.3f}",
                f"{row.graph_p50:.3f} / {row.graph_p95:.3f}",
                f"{row.speedup:.1f}x",
                f"{row.graph_speedup:.1f}x",
                f"{row.recall_100:.4f}",
                f"{row.ndcg_10:.4f}",
                "-" if row.retention is None else f"{row.retention:.1f} %",
                f"{row.low:+.4f} to {row.high:+.4f}",
            ]
            for row in rows
        ],
        header=["", "kind", "weights", "size", "tokenise + encode", "encode", "faster", "encode faster", "Recall@100",
                "nDCG@10", "kept", "95 % of the difference"],
    )  # fmt: skip
