"""The commands `d2llm generate` and `d2llm adapt`."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click

from d2llm.beir import RetrievalData
from d2llm.cli_options import echo_json, echo_next, echo_table, json_option, max_length_option, shorten
from d2llm.corpus import read_corpus, read_query_log
from d2llm.errors import DataError
from d2llm.files import require_new
from d2llm.types import Document

from .adapt import adapt
from .adaptation import Adaptation, Report
from .cli_keys import ADAPT_HEADING, tables_of
from .cli_options import best_device, duration, keys_option, parse_overrides
from .config import read_settings
from .examples import examples_of
from .generator import load_generator, write_queries
from .generator_tuning import GeneratorTuning, finetune_generator
from .styles import STYLES, Style

EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
GENERATOR = "Any causal or encoder-decoder language model: hub id, folder, or GGUF file (d2llm[gguf])."


@click.command("generate")
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--generator", required=True, metavar="MODEL", help=f"The language model that writes. {GENERATOR}")
@click.option("--passages", default=3000, show_default=True, type=click.IntRange(1), metavar="N",
              help="Write for N documents, drawn from the corpus at random.")  # fmt: skip
@click.option("--style", "styles", multiple=True, type=click.Choice(STYLES), default=STYLES, show_default=True,
              help="Style of the queries, one query of each for every document. Repeatable. A generator that was "
                   "fine-tuned, or an encoder-decoder, writes one style alone: the number of styles is then the number "
                   "of queries.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of what is drawn.")
@click.option("--finetune", nargs=2, type=click.Path(path_type=Path), metavar="DATASET FOLDER",
              help="First fine-tune the generator (LoRA) on the training queries of DATASET, a BEIR folder of another "
                   "corpus, and save it to the new FOLDER. Later, name FOLDER as --generator.")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Set a key of --finetune: steps, batch, lr, rank, style, seed. Repeatable.")  # fmt: skip
@json_option
def generate_command(
    corpus: Path,
    out: Path,
    generator: str,
    passages: int,
    styles: tuple[Style, ...],
    seed: int,
    finetune: tuple[Path, Path] | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write queries for documents of CORPUS with a language model, into the new file OUT.jsonl.

    CORPUS is a corpus as for d2llm index. A row of OUT has _id, text, style, and passage: the id of the document.

    The model is shown a few passages with queries, and continues with yours. It needs no training; a small model writes
    some queries that miss their passage. d2llm adapt drops these by the scores of a teacher. Read the file before you
    use it. After a kill, type the same command again: it continues.

    \b
    Read first, then adapt:
      d2llm generate CORPUS.jsonl QUERIES.jsonl --generator HuggingFaceTB/SmolLM2-135M-Instruct
      d2llm adapt CORPUS.jsonl STUDENT --generated QUERIES.jsonl
    With a generator that has learned from real queries for another corpus:
      d2llm generate CORPUS.jsonl QUERIES.jsonl --generator MODEL --finetune my-beir-folder TUNED
    """
    if overrides and finetune is None:
        raise click.UsageError("--set sets keys of --finetune, which is missing")
    require_new(out, file=True)  # before the work, not after it
    documents = _read(corpus)
    chosen = random.Random(f"{seed}/generate").sample(sorted(documents), min(passages, len(documents)))
    settings = read_settings(GeneratorTuning, parse_overrides(overrides))
    dataset, tuned = finetune or (None, None)
    if tuned is not None and tuned.absolute() == out.absolute():
        raise click.UsageError(f"{out} cannot be both the queries and the folder of --finetune: choose two names")
    examples = [] if dataset is None else examples_of(RetrievalData.load(dataset, "train"))
    model = load_generator(generator, best_device())
    if tuned is not None:
        model = finetune_generator(model, examples, tuned, settings=settings, progress=not as_json)
    contents = {id_: documents[id_].content for id_ in chosen}
    written = write_queries(model, contents, out, styles=styles, seed=seed, progress=not as_json)
    counts = Counter(query.style for query in written if query.text.strip())
    if as_json:
        echo_json({"queries": str(out), "written": counts, "empty": len(written) - counts.total()})
        return
    click.echo(f"{out}: {len(written):,} queries for {len(chosen):,} documents")
    for style in dict.fromkeys(query.style for query in written):
        example = next((query.text for query in written if query.style == style and query.text.strip()), "")
        click.echo(f"  {style:9} {counts[style]:6,}  {shorten(example, 80)}")
    click.echo(f"Now read {out}. If many queries miss their passage, remove their lines or take a larger generator.")
    echo_next("d2llm", "adapt", corpus, "STUDENT", "--generated", out)


@click.command("adapt")
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("student", type=click.Path(path_type=Path))
@click.option("--from", "embedder", default=EMBEDDER, show_default=True, metavar="EMBEDDER",
              help="The embedder to start from: a sentence-transformers model or a plain transformer, hub id or "
                   "folder.")  # fmt: skip
@click.option("--generator", metavar="MODEL", help=f"The language model that writes queries. {GENERATOR}")
@click.option("--generated", type=click.Path(path_type=Path), metavar="FILE",
              help="Queries that d2llm generate wrote, in place of --generator.")  # fmt: skip
@click.option("--queries", type=click.Path(path_type=Path), metavar="PATH",
              help="Real queries to learn from too, such as a query log: JSONL with `text` or `query`, a text file "
                   "with one query a line, or a BEIR folder. Nobody needs to judge them. They need queries beside them "
                   "that were written for a passage, which decide.")  # fmt: skip
@click.option("--reranker", metavar="MODEL",
              help="A reranker (hub id, folder, or what d2llm teach --finetune made) as the teacher. "
                   "[default: the embedder's cosine with words and vectors]")  # fmt: skip
@click.option("--teacher", metavar="EMBEDDER",
              help="A larger embedder (hub id or folder) as a second teacher: its cosine is added to the score of the "
                   "first. It reads the passages once, here. A search does not need it.")  # fmt: skip
@max_length_option
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Set a key of the adaptation, for example --set steps=300. Repeatable. `d2llm adapt --keys` prints "
                   "all keys.")  # fmt: skip
@keys_option(lambda: tables_of(Adaptation), ADAPT_HEADING)
@json_option
def adapt_command(
    corpus: Path,
    student: Path,
    embedder: str,
    generator: str | None,
    generated: Path | None,
    queries: Path | None,
    reranker: str | None,
    teacher: str | None,
    max_length: int | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Adapt an embedder to CORPUS without labels, and write it to the new folder STUDENT.

    CORPUS is a corpus as for d2llm index. A language model writes queries for a sample of its passages. A teacher
    scores the candidates of each query, and the embedder's cosine learns from these scores. Titles and headings
    are queries too. Documents that are held out decide: if no gain on their queries is sure, STUDENT is the
    embedder as it was. Its score has words and vectors of your corpus in either case. A corpus of fewer than 3,000
    documents is not trained on.

    If it is killed, type the same command again: it continues with the queries that are written, with the teacher's
    scores once they are there, and with the training.

    \b
    From a bare corpus to a search:
      d2llm adapt CORPUS.jsonl STUDENT --generator HuggingFaceTB/SmolLM2-135M-Instruct
      d2llm-export onnx STUDENT MODEL
      d2llm index MODEL CORPUS.jsonl --qdrant ./qdrant --collection docs
    """
    if generator is not None and generated is not None:
        raise click.UsageError("--generator writes queries, --generated reads them: choose one")
    if reranker is not None and teacher is not None:
        raise click.UsageError("--reranker scores alone, --teacher scores with the embedder: choose one")
    require_new(student)  # before the work, not after it
    settings = read_settings(Adaptation, parse_overrides(overrides))
    documents = _read(corpus)
    device = best_device()
    report = adapt(
        documents,
        embedder,
        student,
        generator=None if generator is None else load_generator(generator, device),
        written=generated,
        log=[] if queries is None else read_query_log(queries),
        reranker=reranker,
        teacher=teacher,
        max_length=max_length,
        settings=settings,
        progress=not as_json,
    )
    if as_json:
        echo_json({"student": str(student), **asdict(report)})
        return
    _show(report)
    echo_next("d2llm-export", "onnx", student, "MODEL")


def _show(report: Report) -> None:
    """Print what was written and kept, the times, and the verdict."""
    if report.kept:
        rows = []
        for style, count in report.written.items():
            example = next(iter(report.examples.get(style, [])), "")
            rows.append([style, f"{count:,}", f"{report.kept.get(style, 0):,}", shorten(example, 60)])
        echo_table(rows, header=["queries", "written", "kept", "for example"])
        teacher, cosine = report.teacher["teacher"], report.teacher["cosine"]
        click.echo(
            f"Teacher: mean reciprocal rank {teacher:.3f} of the passage that a query was written for, among the "
            f"candidates (1 is always first); the cosine has {cosine:.3f}"
        )
        click.echo("Time: " + ", ".join(f"{part} {duration(seconds)}" for part, seconds in report.seconds.items()))
    click.echo(report.verdict)


def _read(corpus: Path) -> dict[str, Document]:
    documents, _ = read_corpus(corpus)
    if not documents:
        raise DataError(f"{corpus} has no documents: there is nothing to write queries for")
    return documents
