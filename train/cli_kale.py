"""The command `d2llm kale`."""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch

from d2llm.backbone import spread
from d2llm.cli_options import RenamedOptions, echo_json, echo_measures, echo_next, json_option
from d2llm.corpus import read_corpus
from d2llm.errors import ArgumentError
from d2llm.files import require_new
from d2llm.small_encoder import BIGRAMS, SmallEncoder, from_layers, from_model, from_tokens, layer_count
from d2llm.student import Student

from .cli_keys import KALE_HEADING, tables_of
from .cli_options import best_device, duration, keys_option, parse_overrides
from .config import read_settings
from .kale import Alignment, align
from .targets import read_query_texts


@click.command("kale", cls=RenamedOptions, renamed={"--pairs": "--bigrams"})
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("out", metavar="KALE", type=click.Path(path_type=Path))
@click.option("--queries", multiple=True, required=True, type=click.Path(path_type=Path), metavar="PATH",
              help="Queries to learn from, such as a query log: JSONL with `text` or `query`, a text file with one "
                   "query a line, or a BEIR folder. Repeatable.")  # fmt: skip
@click.option("--split", default="train", show_default=True,
              help="Take the queries of a BEIR folder that qrels/SPLIT.tsv judges.")  # fmt: skip
@click.option("--corpus", type=click.Path(path_type=Path), metavar="PATH",
              help="Passages (JSONL or a BEIR folder). Scores against them are aligned too, and they yield made-up "
                   "queries where real ones are few. Recommended.")  # fmt: skip
@click.option("--layers", metavar="N | I,J,..",
              help="Make the encoder of layers of the student: N layers (the last, the first, then evenly between), or "
                   "the layers of these numbers ('0,5'; for a single one '5,').")  # fmt: skip
@click.option("--model", metavar="NAME",
              help="Make the encoder of another, smaller model (hub id, folder or GGUF file) with its own "
                   "tokenizer.")  # fmt: skip
@click.option("--prompt", default="", help="Text that --model reads before each query.")
@click.option("--static", is_flag=True,
              help="Make the encoder a table of token vectors, without a transformer: tens of microseconds a "
                   "query.")  # fmt: skip
@click.option("--bigrams", type=click.IntRange(0), metavar="N",
              help=f"Rows of the --static table for pairs of neighbouring tokens. [default: {BIGRAMS}]")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Set a key of the alignment, for example --set steps=3000. Repeatable. `d2llm kale --keys` prints "
                   "all keys.")  # fmt: skip
@keys_option(lambda: tables_of(Alignment), KALE_HEADING)
@click.option("--targets", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder that keeps the student's outputs for these queries, so that the next alignment need not "
                   "compute them. [default: STUDENT.targets]")  # fmt: skip
@json_option
def kale_command(
    student: Path,
    out: Path,
    queries: tuple[Path, ...],
    split: str,
    corpus: Path | None,
    layers: str | None,
    model: str | None,
    prompt: str,
    static: bool,
    bigrams: int | None,
    overrides: tuple[str, ...],
    targets: Path | None,
    as_json: bool,
) -> None:
    """Align a small query encoder to STUDENT and write it to the new folder KALE.

    A search waits for the query encoder, which runs for every query; passages are encoded once. This command makes a
    smaller query encoder with nearly the same vectors and features (KALE, arXiv 2304.01016). It learns from queries
    alone, without judgements, and indexed passages stay valid. Choose one of --layers, --model and --static.

    The run lives in KALE.run until it is done. If it is killed, type the same command again: it continues there.

    \b
    Two layers of the student: the most exact, a third of the time.
      d2llm kale STUDENT KALE --queries log.txt --corpus corpus.jsonl --layers 2
    A table: next to no time.
      d2llm kale STUDENT KALE --queries log.txt --corpus corpus.jsonl --static
    Another model: in between.
      d2llm kale STUDENT KALE --queries log.txt --corpus corpus.jsonl --model NAME
    Then put it into a model folder:
      d2llm-export onnx STUDENT MODEL --query-encoder KALE
    """
    if sum(1 for choice in (layers, model, static or None) if choice is not None) != 1:
        raise click.UsageError("choose one of --layers, --model and --static")
    if prompt and model is None:
        raise click.UsageError("--prompt needs --model: layers and tables use the student's own query prompt")
    if bigrams is not None and not static:
        raise click.UsageError("--bigrams needs --static")
    require_new(out)  # before the work, not after it
    settings = read_settings(Alignment, parse_overrides(overrides))
    texts = [text for path in queries for text in read_query_texts(path, split)]
    documents = [] if corpus is None else list(read_corpus(corpus)[0].values())
    teacher = Student.load(student).to(best_device()).eval()
    teacher.merge_lora()
    torch.manual_seed(settings.seed)  # the projections of another model start at random
    encoder = _untrained(teacher, layers, model, prompt, BIGRAMS if bigrams is None else bigrams)
    place = Path(os.path.abspath(student))  # `.` has no name
    cache = place.with_name(place.name + ".targets") if targets is None else targets
    align(teacher, encoder, texts, documents, settings=settings, out=out, cache=cache, progress=not as_json)
    facts = encoder.provenance
    if as_json:
        echo_json({"kale": str(out), "parameters": encoder.parameter_count, **facts})
        return
    held_out = facts["held_out"]
    click.echo(
        f"{out}: {encoder.parameter_count:,} parameters, aligned on {facts['queries']:,} queries and "
        f"{facts['made up']:,} made-up ones, against {facts['passages']:,} passages, in {duration(facts['seconds'])}"
    )
    click.echo(f"On {held_out['queries']:,} queries held out, against the student:")
    echo_measures({"before the first step": held_out["before"], "aligned": held_out["after"]})
    echo_next("d2llm-export", "onnx", student, "MODEL", "--query-encoder", out)


def _untrained(student: Student, layers: str | None, model: str | None, prompt: str, bigrams: int) -> SmallEncoder:
    """The encoder before alignment, of the kind that the options choose."""
    if model is not None:
        return from_model(student, model, prompt=prompt)
    if layers is None:
        return from_tokens(student, bigrams=bigrams)
    numbers = [part.strip() for part in layers.split(",") if part.strip()]
    if not numbers or not all(part.isascii() and part.isdigit() for part in numbers):
        reason = "expected how many layers, such as 2, or which ones, such as 0,5"
        raise click.BadParameter(f"{layers!r}: {reason}", param_hint="--layers")
    chosen = [int(part) for part in numbers]
    try:
        return from_layers(student, chosen if "," in layers else spread(chosen[0], layer_count(student)))
    except ArgumentError as error:
        raise click.BadParameter(f"{layers!r}: {error}", param_hint="--layers") from error
