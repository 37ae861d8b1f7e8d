"""The commands `d2llm train`, `d2llm mine` and `d2llm teach`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import click

from d2llm.beir import RetrievalData
from d2llm.bm25 import Bm25, Engine
from d2llm.cli_options import echo_json, echo_measures, finite, json_option
from d2llm.errors import DataError
from d2llm.evaluate import MAIN_MEASURE
from d2llm.files import require_new

from .cli_keys import RECIPE_HEADING, recipe_tables
from .cli_options import (
    PrintingOption,
    best_device,
    duration,
    keys_option,
    load_recipe,
    recipe_argument,
    set_option,
    show_recipes,
)
from .examples import examples_of, write_examples
from .finetune import with_negatives
from .hub_loading import load_hub_teacher
from .mining import BiEncoderRanker, FalseNegativeFilter, Ranker, load_bi_encoder, mine
from .precision import compute_dtype
from .teach import Teaching
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
    click.echo(f"Next: d2llm-export onnx {student} MODEL")


@click.command("mine")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--split", default="train", show_default=True, help="Mine for the queries that qrels/SPLIT.tsv judges.")
@click.option("--with", "names", multiple=True, default=["bm25"], show_default=True, metavar="RANKER",
              help="Ranker of the candidates: bm25, a student's folder, or a backbone (hub id, folder or GGUF file; "
                   "mean pooling). Repeatable: rankings are interleaved.")  # fmt: skip
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
    require_new(out)  # before the work, not after it
    data = RetrievalData.load(dataset, split)
    examples, corpus = examples_of(data), [document.content for document in data.documents.values()]
    if not examples:
        raise DataError(f"{dataset}: split {split!r} has no query with a positive passage")
    false_negatives = None
    if teacher is not None:
        recipe = load_recipe(teacher)
        judge = load_hub_teacher(recipe.teacher, best_device(), compute_dtype(recipe.precision, best_device()))
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
        click.echo(f"{mined.short} queries have fewer than {negatives} negatives: raise --depth for more")
    click.echo(f"Next: d2llm train RECIPE STUDENT --set data.folder={dataset} --set data.examples={out}")


def _ranker(name: str, corpus: Sequence[str], engine: Engine, *, progress: bool) -> Ranker:
    if name == "bm25":
        return Bm25(corpus, engine).rank
    return BiEncoderRanker(load_bi_encoder(name).to(best_device()), corpus, progress=progress).rank


@click.command("teach")
@recipe_argument
@set_option
@click.option("--finetune", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Fine-tune the teacher on the training labels first (LoRA), and save it to this new "
                   "folder.")  # fmt: skip
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1), help="Steps of --finetune.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1),
              help="Queries in one step of --finetune.")  # fmt: skip
@click.option("--negatives", default=7, show_default=True, type=click.IntRange(1),
              help="Hard negatives of each query in one step of --finetune.")  # fmt: skip
@click.option("--lr", default=1e-4, show_default=True, type=click.FloatRange(0, min_open=True), callback=finite,
              help="Learning rate of --finetune.")  # fmt: skip
@click.option("--checkpointing", is_flag=True,
              help="In --finetune, recompute activations: less memory, a third more time.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N",
              help="Take only N training queries, for example to learn what all of them would cost.")  # fmt: skip
@click.option("--anyway", is_flag=True, help="Fill the cache even if the teacher ranks no better than the cosine.")
@json_option
def teach_command(
    recipe: Path,
    overrides: tuple[str, ...],
    finetune: Path | None,
    steps: int,
    batch: int,
    negatives: int,
    lr: float,
    checkpointing: bool,
    limit: int | None,
    anyway: bool,
    as_json: bool,
) -> None:
    """Measure the LLM or reranker of RECIPE as a teacher, and cache its scores of the training data.

    RECIPE is a TOML file, or the name of a recipe that comes with d2llm (d2llm train --list). Its [teacher] needs `llm`
    or `reranker` among the members, a model, and a cache.

    First the teacher reranks, on dev, the 100 best passages by the untrained backbone's cosine. If its nDCG@10 is no
    higher, the student has nothing to learn from it: the command stops there with exit status 1 (see --anyway).
    Otherwise the teacher scores the pairs that training is sure to need, and the scores go into the cache. You may
    interrupt this and run it again: no pair is scored twice.

    With distil.mining = "student", the default, these pairs are the positives alone: the negatives come from the
    student's own recall, which exists only after its first stage. With distil.mining = "given" the negatives are those
    of data.examples, else BM25's, and they are scored here too.

    \b
    Is it a good teacher, and what would all of it cost?
      d2llm teach RECIPE --set teacher.cache=CACHE --limit 100
    Fine-tune the teacher on the labels, then train with it:
      d2llm teach RECIPE --finetune TUNED --steps 500
      d2llm train RECIPE STUDENT --set teacher.model=TUNED
    Score all pairs now:
      d2llm teach RECIPE --set data.examples=MINED.jsonl --set distil.mining=given
    """
    settings = load_recipe(recipe, overrides)
    settings.check_files()
    if finetune is not None:
        require_new(finetune)  # before the work, not after it
    teaching = Teaching(settings, limit=limit, progress=not as_json)
    if finetune is not None:
        with_negatives(teaching.examples, negatives)  # too few are an error: before the teacher is measured
    cosine, candidates = teaching.zero_shot()
    dev = {"backbone's cosine, untrained": cosine, "teacher": teaching.measure(candidates)}
    if finetune is not None:
        teaching.finetune(finetune, steps=steps, batch=batch, negatives=negatives, lr=lr, checkpointing=checkpointing)
        dev["teacher, fine-tuned"] = teaching.measure(candidates)
    cosine, *_, teacher = dev.values()
    better = teacher > cosine
    if not as_json:
        click.echo(f"nDCG@10 on {len(teaching.dev.queries)} dev queries:")
        echo_measures({name: {MAIN_MEASURE: value} for name, value in dev.items()})
        if not better:
            click.echo("The teacher ranks no better than the untrained cosine: there is nothing to learn from it.")
    filled = _fill(teaching, quiet=as_json) if better or anyway else None
    if as_json:
        echo_json({"dev_ndcg@10": dev, "better": better, "filled": filled})
    elif filled is not None:
        typed = [*overrides, *([f"teacher.model={finetune}"] if finetune is not None else [])]
        options = shlex.join(chain.from_iterable(("--set", setting) for setting in typed))
        click.echo(f"Next: d2llm train {shlex.quote(str(recipe))} STUDENT {options}".rstrip())
    if not better and not anyway:
        raise click.exceptions.Exit(1)


def _fill(teaching: Teaching, *, quiet: bool) -> dict[str, float]:
    """Fill the cache; what it costs is printed before and after, unless `quiet`."""
    todo = teaching.todo()
    if not quiet:
        kind = "positives and negatives" if teaching.recipe.distil.mining == "given" else "positives alone"
        click.echo(
            f"{len(teaching.asked):,} of {teaching.available:,} queries to learn from, {kind}: "
            f"{todo.judgements:,} pairs, {todo.cached:,} of them cached"
        )
        if todo.pace is not None:
            seconds = (todo.judgements - todo.cached) * todo.pace
            whole = todo.judgements * todo.pace * teaching.available / len(teaching.asked)
            click.echo(f"About {duration(seconds)}; for all {teaching.available:,} queries {duration(whole)}")
        if todo.left:
            about = "" if todo.pace is None else f", about {duration(todo.left * todo.pace)}"
            click.echo(
                f"Training scores the negatives itself, after its first stage: up to {todo.left:,} pairs{about}. "
                'To score negatives here, set data.examples and distil.mining = "given".'
            )
    spent = teaching.fill_cache()
    if not quiet and spent.judged:
        speed = f"{spent.judged / spent.seconds:,.1f} pairs/s, {spent.tokens / spent.seconds:,.0f} tokens/s"
        click.echo(f"Judged {spent.judged:,} pairs in {duration(spent.seconds)}: {speed}")
    return {"pairs": todo.judgements, "cached": todo.cached, "left": todo.left, "judged": spent.judged,
            "tokens": spent.tokens, "seconds": spent.seconds}  # fmt: skip
