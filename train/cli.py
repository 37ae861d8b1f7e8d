"""The commands `d2llm train` and `d2llm mine`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from d2llm.beir import RetrievalData
from d2llm.bm25 import Bm25, Engine
from d2llm.cli_options import echo_json, echo_measures, echo_next, finite, json_option
from d2llm.errors import DataError
from d2llm.files import require_new
from d2llm.pretrained import check_path

from .cli_keys import RECIPE_HEADING, recipe_tables
from .cli_options import (
    PrintingOption,
    best_device,
    keys_option,
    load_recipe,
    recipe_argument,
    set_option,
    show_recipes,
)
from .examples import examples_of, write_examples
from .hub_loading import load_hub_teacher
from .mining import BiEncoderRanker, FalseNegativeFilter, Ranker, load_bi_encoder, mine
from .precision import compute_dtype
from .teacher import Bm25Teacher
from .trainer import train


@click.command("train")
@recipe_argument
@click.argument("student", type=click.Path(path_type=Path))
@set_option
@click.option("--list", cls=PrintingOption, show=show_recipes,
              help="List the recipes that come with d2llm, and exit.")  # fmt: skip
@keys_option(recipe_tables, RECIPE_HEADING)
@json_option
def train_command(recipe: Path, student: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train a student by RECIPE and write it to the new folder STUDENT.

    RECIPE is a TOML file, or the name of a recipe that comes with d2llm, such as minilm. The training data is a BEIR
    folder with the splits train and dev, judged pairs of texts, or both.

    \b
    List the recipes that come with d2llm, and train by one of them:
      d2llm train --list
      d2llm train minilm STUDENT --set data.folder=my-beir-folder
    Write a recipe of your own, from all keys with their defaults:
      d2llm train --keys > my.toml

    Training has two stages. First the encoder learns recall. Then the teacher is measured on dev. If it ranks better
    than the encoder's cosine, the student learns from the teacher; if not, the student learns from labels alone. The
    state that is best on dev is kept.

    The run lives in STUDENT.run until it is done. If it is killed, type the same command again: it continues from the
    last checkpoint. On several GPUs: accelerate launch -m d2llm train RECIPE STUDENT.
    """
    settings = load_recipe(recipe, overrides)
    settings.check_files()
    require_new(student)  # before the work, not after it
    result = train(settings, student, progress=not as_json)
    if as_json:
        echo_json({"student": str(student), "taught": result.taught, "dev": result.dev})
        return
    click.echo("On dev, nDCG@10 (for pairs Spearman, or AP if they have labels):")
    echo_measures({name: {"dev": value} for name, value in result.dev.items()})
    if result.teacher is not None and not result.taught:
        click.echo("The teacher ranked no better than the cosine: the student learned from labels alone.")
    echo_next("d2llm-export", "onnx", student, "MODEL")


@click.command("mine")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--split", default="train", show_default=True, help="Mine for the queries that qrels/SPLIT.tsv judges.")
@click.option("--with", "names", multiple=True, default=["bm25"], show_default=True, metavar="RANKER",
              help="Ranker of the candidates: bm25, a student's folder, or an embedder (hub id, folder or GGUF file). "
                   "Repeatable: rankings are interleaved.")  # fmt: skip
@click.option("--engine", type=click.Choice(["bm25s", "rank-bm25"]), default="bm25s", show_default=True,
              help="Library that computes BM25. The scores are equal; rank-bm25, the reference, takes a hundred times "
                   "as long.")  # fmt: skip
@click.option("--depth", default=100, show_default=True, type=click.IntRange(1), metavar="N",
              help="Candidates that each ranker gives for each query.")  # fmt: skip
@click.option("--negatives", default=15, show_default=True, type=click.IntRange(1), metavar="N",
              help="Hard negatives to keep for each query.")  # fmt: skip
@click.option("--skip", default=0, show_default=True, type=click.IntRange(0), metavar="N",
              help="Skip the best N candidates of each query: they are the likeliest to be answers that nobody "
                   "labelled.")  # fmt: skip
@click.option("--teacher", type=click.Path(path_type=Path), metavar="RECIPE",
              help="Score every candidate with the `llm` or `reranker` of this recipe, to drop unlabelled answers. "
                   "Needs --max-probability, --margin, or both.")  # fmt: skip
@click.option("--max-probability", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="P",
              callback=finite,
              help="Drop a candidate if the teacher's probability of yes is above P.")  # fmt: skip
@click.option("--margin", type=float, metavar="M", callback=finite,
              help="Drop a candidate if its log-odds are above those of the positive minus M.")  # fmt: skip
@json_option
def mine_command(
    dataset: Path,
    out: Path,
    split: str,
    names: tuple[str, ...],
    engine: Engine,
    depth: int,
    negatives: int,
    skip: int,
    teacher: Path | None,
    max_probability: float | None,
    margin: float | None,
    as_json: bool,
) -> None:
    """Mine hard negatives for the queries of DATASET (a BEIR folder) and write them to the new file OUT.jsonl.

    A hard negative is a passage that ranks high but does not answer the query. This command takes the best passages of
    each ranker and leaves out the query's positives. Some of the rest may be answers that nobody labelled; a teacher
    can find and drop them.

    \b
    By BM25 and by a student's own recall:
      d2llm mine DATASET OUT.jsonl --with bm25 --with STUDENT
    With a teacher's check:
      d2llm mine DATASET OUT.jsonl --depth 30 --teacher RECIPE --max-probability 0.5 --margin 1
    Then train with them:
      d2llm train RECIPE STUDENT --set data.folder=DATASET --set data.examples=OUT.jsonl
    """
    bounded = max_probability is not None or margin is not None
    if bounded != (teacher is not None):
        raise click.UsageError("a filter is --teacher with --max-probability, --margin, or both: one half is missing")
    if skip + negatives > depth * len(names):
        raise click.UsageError(
            f"--skip {skip} and --negatives {negatives} need more than {depth * len(names)} candidates: raise --depth"
        )
    require_new(out, file=True)  # before the work, not after it
    for name in names:
        check_path(name, "--with")
    data = RetrievalData.load(dataset, split)
    examples, corpus = examples_of(data), [document.content for document in data.documents.values()]
    if not examples:
        raise DataError(f"{dataset}: split {split!r} has no query with a positive passage")
    false_negatives = None
    if teacher is not None:
        recipe = load_recipe(teacher)
        dtype = compute_dtype(recipe.precision, best_device())
        judge = load_hub_teacher(recipe.teacher, best_device(), dtype, Bm25Teacher(Bm25(corpus), corpus))
        false_negatives = FalseNegativeFilter(teacher=judge, max_probability=max_probability, margin=margin)
    mined = mine(
        examples,
        corpus,
        [_ranker(name, corpus, engine, progress=not as_json) for name in names],
        negatives=negatives,
        depth=depth,
        skip=skip,
        false_negatives=false_negatives,
        progress=not as_json,
    )
    write_examples(out, mined.examples)
    written = sum(len(example.negatives) for example in mined.examples)
    if as_json:
        dropped = {"positives": mined.positives, "probable": mined.probable, "within_margin": mined.within_margin}
        echo_json({"queries": len(mined.examples), "negatives": written, "dropped": dropped, "short": mined.short})
        return
    click.echo(f"{len(mined.examples)} queries, {written} negatives in {out}")
    click.echo(f"Left out: {mined.positives} candidates that are known positives")
    if teacher is not None:
        click.echo(
            f"Dropped by the teacher: {mined.probable} too probable, {mined.within_margin} within the positive's margin"
        )
    if mined.short:
        way_out = "raise --depth for more" if depth < len(corpus) else f"the {len(corpus)} passages have no more"
        click.echo(f"{mined.short} queries have fewer than {negatives} negatives: {way_out}")
    data_keys = "--set", f"data.folder={dataset}", "--set", f"data.examples={out}"
    echo_next("d2llm", "train", "RECIPE", "STUDENT", *data_keys)


def _ranker(name: str, corpus: Sequence[str], engine: Engine, *, progress: bool) -> Ranker:
    if name == "bm25":
        return Bm25(corpus, engine).rank
    return BiEncoderRanker(load_bi_encoder(name).to(best_device()), corpus, progress=progress).rank
