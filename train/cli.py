"""The commands `d2llm train`, `d2llm mine`, `d2llm teach` and `d2llm kale`."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch

from d2llm.beir import RetrievalData
from d2llm.bm25 import Bm25, Engine
from d2llm.cli_options import RenamedOptions, echo_json, echo_measures, finite, json_option
from d2llm.corpus import read_corpus
from d2llm.errors import ArgumentError, DataError
from d2llm.evaluate import MAIN_MEASURE
from d2llm.files import require_new
from d2llm.small_encoder import BIGRAMS, SmallEncoder, from_layers, from_model, from_tokens, layer_count, spread
from d2llm.student import Student

from .config import Recipe, read_recipe, read_settings, shipped_recipes
from .examples import examples_of, write_examples
from .finetune import with_negatives
from .hub_loading import load_hub_teacher
from .kale import Alignment, align
from .keys import KALE_HEADING, RECIPE_HEADING, Table, as_rows, as_toml, recipe_tables, tables_of
from .mining import BiEncoderRanker, FalseNegativeFilter, Ranker, load_bi_encoder, mine
from .precision import compute_dtype
from .targets import read_query_texts
from .teach import Teaching
from .trainer import train


class _Printing(click.Option):
    """A flag that prints something and ends the command, whatever else is given. `show` is told whether --json is."""

    def __init__(self, *arguments: Any, show: Callable[[bool], None], **attributes: Any) -> None:
        attributes |= {"is_flag": True, "is_eager": True, "expose_value": False}
        super().__init__(*arguments, **attributes)
        self.show = show

    def handle_parse_result(self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]) -> Any:
        """Print and exit, before anything is missed that the command itself would need."""
        if opts.get(self.name or "") and not ctx.resilient_parsing:
            self.show(bool(opts.get("as_json")))
            ctx.exit()
        return super().handle_parse_result(ctx, opts, args)


def _show_recipes(as_json: bool) -> None:
    recipes = shipped_recipes()
    if as_json:
        echo_json(recipes)
        return
    width = max(map(len, recipes))
    for name, purpose in recipes.items():
        click.echo(f"{name:{width}}  {purpose}")


def _show_keys(tables: Sequence[Table], heading: str, as_json: bool) -> None:
    if as_json:
        echo_json(as_rows(tables))
    else:
        click.echo(as_toml(tables, heading))


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key of the recipe, e.g. --set data.folder=my-beir-folder. It wins over the file. Repeatable. "
    "All keys: d2llm train --keys.",
)


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("student", type=click.Path(path_type=Path))
@set_option
@click.option("--list", "list_", cls=_Printing, show=_show_recipes, help="List the recipes that come with d2llm.")
@click.option("--keys", cls=_Printing, show=lambda as_json: _show_keys(recipe_tables(), RECIPE_HEADING, as_json),
              help="Print all keys of a recipe with type, default and meaning, as TOML to start from.")  # fmt: skip
@json_option
def train_command(recipe: Path, student: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train by RECIPE into the new folder STUDENT. RECIPE is a TOML file, or the name of one that comes with d2llm
    (see --list), such as minilm.

    The encoder learns recall first. Then the teacher is measured on dev beside it: one that ranks no better has
    nothing to teach, and the student learns from labels alone. The best state on dev is kept.

    The run lives in STUDENT.run until it is done. Killed at any moment and typed again, it goes on from there. Several
    GPUs: accelerate launch -m d2llm train RECIPE STUDENT.
    """
    settings = _read(recipe, overrides)
    settings.check_files()
    require_new(student)  # before the work, not after it
    result = train(settings, student, progress=not as_json)
    if as_json:
        echo_json({"student": str(student), "taught": result.taught, "dev": result.dev})
        return
    click.echo("On dev, nDCG@10 (Spearman for pairs):")
    echo_measures({name: {"dev": value} for name, value in result.dev.items()})
    if result.teacher is not None and not result.taught:
        click.echo("The teacher ranked no better than the cosine: the student learned from labels alone.")
    click.echo(f"Next: d2llm-export onnx {student} MODEL")


@click.command("mine")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--split", default="train", show_default=True, help="Which qrels/SPLIT.tsv.")
@click.option("--with", "names", multiple=True, default=["bm25"], show_default=True, metavar="RANKER",
              help="`bm25`, a student's folder, or a backbone (hub id or folder; mean pooling). Repeatable: "
                   "rankings are interleaved.")  # fmt: skip
@click.option("--engine", type=click.Choice(["bm25s", "rank-bm25"]), default="bm25s", show_default=True,
              help="Who computes BM25. The scores are the same; rank-bm25 takes a hundred times as long.")  # fmt: skip
@click.option("--depth", default=100, show_default=True, type=click.IntRange(1), help="How far down to look.")
@click.option("--negatives", default=15, show_default=True, type=click.IntRange(1), help="How many for each query.")
@click.option("--skip", default=0, show_default=True, type=click.IntRange(0),
              help="Pass over the first N candidates: the likeliest to be answers that nobody labelled.")  # fmt: skip
@click.option("--teacher", type=click.Path(path_type=Path), metavar="RECIPE",
              help="Let the `llm` or `reranker` of RECIPE's [teacher] judge every candidate.")  # fmt: skip
@click.option("--max-probability", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="P",
              callback=finite,
              help="Drop a candidate to which the teacher says yes with a probability above P.")  # fmt: skip
@click.option("--margin", type=float, metavar="M", callback=finite,
              help="Drop a candidate whose log-odds are above the positive's minus M.")  # fmt: skip
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
    """Mine hard negatives for the queries of DATASET (a BEIR folder) into the new file OUT.jsonl.

    A hard negative is a passage that a ranker takes for an answer and that is none: the best passages of each ranker,
    without the query's positives. What nobody labelled may be an answer all the same; a teacher can find those.

    \b
    d2llm mine DATASET OUT.jsonl --with bm25 --with STUDENT
    d2llm mine DATASET OUT.jsonl --depth 30 --teacher RECIPE.toml --max-probability 0.5 --margin 1
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
        recipe = _read(teacher)
        judge = load_hub_teacher(recipe.teacher, _device(), compute_dtype(recipe.precision, _device()))
        false_negatives = FalseNegativeFilter(teacher=judge, max_probability=max_probability, margin=margin)
    rankers = [_ranker(name, corpus, engine, progress=not as_json) for name in names]
    found = mine(
        examples,
        corpus,
        rankers,
        negatives=negatives,
        depth=depth,
        skip=skip,
        false_negatives=false_negatives,
        progress=not as_json,
    )
    write_examples(out, found.examples)
    written = sum(len(example.negatives) for example in found.examples)
    if as_json:
        counts = {"positives": found.positives, "probable": found.probable, "within_margin": found.within_margin}
        echo_json({"queries": len(found.examples), "negatives": written, "dropped": counts, "short": found.short})
        return
    click.echo(f"{len(found.examples)} queries, {written} negatives in {out}")
    click.echo(f"Left out: {found.positives} candidates that are known positives")
    if teacher is not None:
        click.echo(f"By the teacher: {found.probable} too probable, {found.within_margin} within the positive's margin")
    if found.short:
        click.echo(f"{found.short} queries have fewer than {negatives} negatives: raise --depth for more")
    click.echo(f"Next: d2llm train RECIPE STUDENT --set data.folder={dataset} --set data.examples={out}")


def _ranker(name: str, corpus: Sequence[str], engine: Engine, *, progress: bool) -> Ranker:
    if name == "bm25":
        return Bm25(corpus, engine).rank
    return BiEncoderRanker(load_bi_encoder(name).to(_device()), corpus, progress=progress).rank


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@click.command("teach")
@click.argument("recipe", type=click.Path(path_type=Path))
@set_option
@click.option("--finetune", type=click.Path(path_type=Path), metavar="FOLDER",
              help="First fine-tune the teacher on the training labels (LoRA), and save it there.")  # fmt: skip
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1), help="Of fine-tuning.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Queries in one step.")
@click.option("--negatives", default=7, show_default=True, type=click.IntRange(1),
              help="Negatives against which a step sets the positive of each query.")  # fmt: skip
@click.option("--lr", default=1e-4, show_default=True, type=click.FloatRange(0, min_open=True), callback=finite,
              help="Learning rate.")  # fmt: skip
@click.option("--checkpointing", is_flag=True, help="Recompute activations: less memory, a third more time.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only N of the training queries.")
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
    """Measure the LLM or reranker of RECIPE, and keep what it says of the training data. RECIPE is a TOML file, or the
    name of one that comes with d2llm (d2llm train --list).

    Its [teacher] names `llm` or `reranker` among the members, a model, and a cache. On dev the teacher reranks the 100
    best passages by the untrained backbone's cosine. If that is no gain there is nothing to learn from it: the command
    says so, judges no training data and exits with 1 (unless --anyway). Otherwise it judges the pairs that training
    is sure to ask, and training finds them in the cache. Interrupt it, and run it again: nothing is asked twice.

    By default (distil.mining = "student") these are the positives alone: the negatives are the student's own recall
    after its first stage, and training asks for them itself. With distil.mining = "given" they are those of
    data.examples (else BM25's), and all of them are judged here.

    \b
    d2llm teach RECIPE.toml --set teacher.cache=JUDGED --limit 100      what would it cost, is it worth it?
    d2llm teach RECIPE.toml --finetune TUNED --steps 500                a teacher that knows the data
    d2llm teach RECIPE.toml --set data.examples=MINED.jsonl --set distil.mining=given    judge all of it now
    d2llm train RECIPE STUDENT --set teacher.model=TUNED
    """
    settings = _read(recipe, overrides)
    settings.check_files()
    if finetune is not None:
        require_new(finetune)  # before the work, not after it
    teaching = Teaching(settings, limit=limit, progress=not as_json)
    if finetune is not None:
        with_negatives(teaching.examples, negatives)  # said before the teacher is measured
    cosine, candidates = teaching.zero_shot()
    dev = {"backbone's cosine, untrained": cosine, "teacher": teaching.measure(candidates)}
    if finetune is not None:
        teaching.finetune(finetune, steps=steps, batch=batch, negatives=negatives, lr=lr, checkpointing=checkpointing)
        dev["teacher, fine-tuned"] = teaching.measure(candidates)
    better = list(dev.values())[-1] > cosine
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
            click.echo(f"About {_hours(seconds)}; for all {teaching.available:,} queries {_hours(whole)}")
        if todo.left:
            about = "" if todo.pace is None else f", about {_hours(todo.left * todo.pace)}"
            click.echo(
                f"Training asks for the negatives itself, after its first stage: up to {todo.left:,} pairs{about}. "
                'To have negatives judged here, set data.examples and distil.mining = "given".'
            )
    spent = teaching.fill()
    if not quiet and spent.judged:
        speed = f"{spent.judged / spent.seconds:,.1f} pairs/s, {spent.tokens / spent.seconds:,.0f} tokens/s"
        click.echo(f"Judged {spent.judged:,} pairs in {_hours(spent.seconds)}: {speed}")
    return {"pairs": todo.judgements, "cached": todo.cached, "left": todo.left, "judged": spent.judged,
            "tokens": spent.tokens, "seconds": spent.seconds}  # fmt: skip


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@click.command("kale", cls=RenamedOptions, renamed={"--pairs": "--bigrams"})
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("out", metavar="KALE", type=click.Path(path_type=Path))
@click.option("--queries", multiple=True, required=True, type=click.Path(path_type=Path), metavar="PATH",
              help="A query log: JSONL with `text` (or `query`), a text file with one query a line, or a BEIR folder "
                   "(only the queries of --split). Repeatable.")  # fmt: skip
@click.option("--split", default="train", show_default=True, help="Which queries of a BEIR folder.")
@click.option("--corpus", type=click.Path(path_type=Path), metavar="PATH",
              help="The passages (JSONL or BEIR folder). With them scores are aligned too, and queries are made up "
                   "where there are few.")  # fmt: skip
@click.option("--layers", metavar="N | I,J,..",
              help="Some of the student's own layers: how many (the last, the first, then evenly between), or which "
                   "('0,5'; a single one is '5,').")  # fmt: skip
@click.option("--model", metavar="NAME", help="Another, smaller model of the hub or a folder, with its own tokenizer.")
@click.option("--prompt", default="", help="What --model reads before each query.")
@click.option("--static", is_flag=True, help="A table of tokens and no transformer: tens of microseconds a query.")
@click.option(
    "--bigrams",
    type=click.IntRange(0),
    help=f"Rows of --static for pairs of neighbouring tokens. [default: {BIGRAMS}]",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Set a key of the alignment, e.g. --set steps=3000. Repeatable. All keys: "
                   "d2llm kale --keys.")  # fmt: skip
@click.option("--keys", cls=_Printing, show=lambda as_json: _show_keys(tables_of(Alignment), KALE_HEADING, as_json),
              help="Print all keys of --set with type, default and meaning, as TOML.")  # fmt: skip
@click.option("--targets", type=click.Path(path_type=Path), metavar="DIR",
              help="Where what the student makes of the queries is kept for the next alignment. "
                   "[default: STUDENT.targets]")  # fmt: skip
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

    Passages are encoded once, queries for ever: the query encoder is what a search waits for. This makes a smaller one
    that gives nearly the same vectors and features (KALE), from queries alone, without judgements. The index stays as
    it is. Killed at any moment and typed again, it goes on from KALE.run.

    \b
    d2llm kale STUDENT KALE --queries log.txt --corpus corpus.jsonl --layers 2    a third of the time, most exact
    d2llm kale STUDENT KALE --queries log.txt --corpus corpus.jsonl --static      next to no time
    d2llm kale STUDENT KALE --queries log.txt --corpus corpus.jsonl --model NAME  anything in between
    d2llm-export onnx STUDENT MODEL --query-encoder KALE                          into the model folder
    """
    if sum(1 for choice in (layers, model, static or None) if choice is not None) != 1:
        raise click.UsageError("choose one of --layers, --model and --static")
    if prompt and model is None:
        raise click.UsageError("--prompt is of --model, which is not given: layers and tables read the student's own")
    if bigrams is not None and not static:
        raise click.UsageError("--bigrams is of --static, which is not given")
    require_new(out)  # before the work, not after it
    settings = read_settings(Alignment, _parse_overrides(overrides))
    texts = [text for path in queries for text in read_query_texts(path, split)]
    documents = [] if corpus is None else list(read_corpus(corpus)[0].values())
    teacher = Student.load(student).to(_device()).eval()
    teacher.merge_lora()
    encoder = _small(teacher, layers, model, prompt, BIGRAMS if bigrams is None else bigrams)
    kept = student.with_name(student.name + ".targets") if targets is None else targets
    align(teacher, encoder, texts, documents, settings=settings, out=out, cache=kept, progress=not as_json)
    held_out = encoder.provenance["held_out"]
    if as_json:
        echo_json({"kale": str(out), "parameters": encoder.parameter_count, **encoder.provenance})
        return
    mine = encoder.provenance
    click.echo(
        f"{out}: {encoder.parameter_count:,} parameters, aligned on {mine['queries']:,} queries and "
        f"{mine['made up']:,} made up, against {mine['passages']:,} passages, in {_hours(mine['seconds'])}"
    )
    click.echo(f"On {held_out['queries']:,} queries held out, against the student:")
    echo_measures({"before the first step": held_out["before"], "aligned": held_out["after"]})
    click.echo(f"Next: d2llm-export onnx {student} MODEL --query-encoder {out}")


def _small(student: Student, layers: str | None, model: str | None, prompt: str, bigrams: int) -> SmallEncoder:
    if model is not None:
        return from_model(student, model, prompt=prompt)
    if layers is None:
        return from_tokens(student, bigrams=bigrams)
    try:
        chosen = [int(part) for part in layers.split(",") if part.strip()]
        return from_layers(student, chosen if "," in layers else spread(chosen[0], layer_count(student)))
    except (ValueError, IndexError) as error:
        raise click.BadParameter(f"{layers!r}: {error}", param_hint="--layers") from error


def _parse_overrides(texts: Sequence[str]) -> dict[str, str]:
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ArgumentError(f"--set {text}: expected KEY=VALUE")
        overrides[key] = value
    return overrides


def _read(recipe: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe; each warning about an old key is one line on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = read_recipe(recipe, _parse_overrides(overrides))
    for warning in caught:
        click.echo(f"WARNING: {warning.message}", err=True)
    return settings
