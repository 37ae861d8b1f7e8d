"""The command `d2llm teach`."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import click

from d2llm.cli_options import echo_json, echo_measures, echo_next, finite, json_option, typed_options
from d2llm.evaluate import MAIN_MEASURE
from d2llm.files import require_new

from .checkpoint import with_digests
from .cli_options import duration, load_recipe, recipe_argument, set_option
from .dev import RERANKED
from .finetune import is_result_of, with_negatives
from .ranking import RANKING_LOSSES
from .teach import COSINE, FINE_TUNED, STACK, TEACHER, Start, Teaching
from .teach_pairs import AP, PairTeaching


@click.command("teach")
@recipe_argument
@set_option
@click.option("--finetune", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Fine-tune the teacher first, and save it to this new folder. The options from --steps to "
                   "--checkpointing belong to it.")  # fmt: skip
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1), help="Training steps.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1),
              help="Queries in one step; for labelled pairs, pairs.")  # fmt: skip
@click.option("--negatives", default=7, show_default=True, type=click.IntRange(1),
              help="Passages of each query's list that stand against a positive in one step, drawn anew each time. A "
                   "shorter list gives all it has.")  # fmt: skip
@click.option("--lr", default=1e-4, show_default=True, type=click.FloatRange(0, min_open=True), callback=finite,
              help="Peak learning rate. 1e-4 suits LoRA; take 2e-5 to 5e-5 for --tuning full.")  # fmt: skip
@click.option("--tuning", type=click.Choice(["lora", "full"]), default="lora", show_default=True,
              help="Train LoRA adapters on all linear layers, or all weights. `full` needs 16 bytes of memory for each "
                   "weight and suits small models.")  # fmt: skip
@click.option("--loss", type=click.Choice(RANKING_LOSSES),
              help="listwise: the positive is the best of its list. ranknet: each pair of passages in the right order. "
                   "pointwise: each passage is an answer or not, which makes the scores log-odds.  [default: "
                   "listwise; for labelled pairs pointwise]")  # fmt: skip
@click.option("--imitate", type=click.Path(path_type=Path), metavar="RECIPE",
              help="Learn the scores of the `llm` or `reranker` of this recipe in place of the labels: a stronger "
                   "teacher. With --loss ranknet only its order counts.")  # fmt: skip
@click.option("--head", type=click.Choice(["own", "new"]), default="own", show_default=True,
              help="own: the model's answer (yes or no, or a reranker's score). new: a new last layer that is zero, so "
                   "that any encoder can become a reranker. It starts at chance, or with --on-stack as the "
                   "stack.")  # fmt: skip
@click.option("--on-stack", is_flag=True,
              help="Add the teacher's log-odds to those of a stack: cosine, late interaction and BM25, weighed on "
                   "queries set aside (teacher.calibration_queries). It then starts where the stack stands. Negatives "
                   "come from the stack's recall, unless distil.mining is given.")  # fmt: skip
@click.option("--encoder", metavar="EMBEDDER",
              help="Encoder of the stack: a student's folder, or the hub id or folder of an embedder.  [default: the "
                   "recipe's backbone, untrained]")  # fmt: skip
@click.option("--eval-every", default=100, show_default=True, type=click.IntRange(1), metavar="STEPS",
              help="Steps between two measurements on dev. The state that is best on dev is kept.")  # fmt: skip
@click.option("--save-every", default=100, show_default=True, type=click.IntRange(1), metavar="STEPS",
              help="Steps between two checkpoints. A killed run goes on from the last one.")  # fmt: skip
@click.option("--checkpointing", is_flag=True,
              help="Recompute activations: less memory, a third more time.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N",
              help="Take only N training queries, for example to learn what all of them would cost.")  # fmt: skip
@click.option("--rerank", default=RERANKED, show_default=True, type=click.IntRange(1), metavar="N",
              help="On dev, rerank each query's N best passages by cosine. A large teacher spends most of its time "
                   "there: 20 show which state is best.")  # fmt: skip
@click.option("--anyway", is_flag=True, help="Fill the cache even if the teacher ranks no better than the cosine.")
@json_option
def teach_command(
    recipe: Path,
    overrides: tuple[str, ...],
    finetune: Path | None,
    limit: int | None,
    rerank: int,
    anyway: bool,
    as_json: bool,
    head: Any,
    on_stack: bool,
    encoder: str | None,
    tuning: Any,
    imitate: Path | None,
    **settings: Any,
) -> None:
    """Measure the LLM or reranker of RECIPE as a teacher, and cache its scores of the training data.

    RECIPE is a TOML file, or the name of a recipe that comes with d2llm (d2llm train --list). Its [teacher] needs `llm`
    or `reranker` among the members, a model, and a cache.

    First the teacher reranks, on dev, the 100 best passages by the untrained backbone's cosine (see --rerank). If its
    nDCG@10 is no higher, the student has nothing to learn from it: the command stops there with exit status 1 (see
    --anyway). Otherwise the teacher scores the pairs that training is sure to need, and the scores go into the cache.
    You may interrupt this and run it again: no pair is scored twice.

    With distil.mining = "student", the default, these pairs are the positives alone: the negatives come from the
    student's own recall, which exists only after its first stage. With distil.mining = "given" the negatives are those
    of data.examples, else BM25's, and they are scored here too.

    With --finetune the teacher learns first. The run lives in FOLDER.run until it is done: a checkpoint, the log, and
    TensorBoard's files. If it is killed, type the same command again: it continues from the last checkpoint. FOLDER
    gets the state that is best on dev, with log and curves. Name it as teacher.model.

    Where the recipe has labelled pairs alone (data.pairs, data.dev_pairs), the teacher is measured and fine-tuned on
    them, by average precision (AP). Nothing is cached then.

    \b
    Is it a good teacher, and what would all of it cost?
      d2llm teach RECIPE --set teacher.cache=CACHE --limit 100
    Fine-tune the teacher on the labels, then train with it:
      d2llm teach RECIPE --finetune TUNED --steps 500 --set teacher.cache=CACHE
      d2llm train RECIPE STUDENT --set teacher.model=TUNED
    Make a reranker of an embedder, which starts as good as the stack:
      d2llm teach RECIPE --set teacher.cache=CACHE --finetune TUNED --on-stack --head new --tuning full --lr 3e-5 \\
        --set 'teacher.members=["reranker"]' --set teacher.model=sentence-transformers/all-MiniLM-L6-v2
    Score all pairs now:
      d2llm teach RECIPE --set data.examples=MINED.jsonl --set distil.mining=given
    """
    of_finetuning = typed_options([*settings, "head", "on_stack", "encoder", "tuning", "imitate"])
    if finetune is None and of_finetuning:
        raise click.UsageError(f"{of_finetuning[0]} belongs to --finetune: name a new FOLDER there, or leave it out")
    chosen = load_recipe(recipe, overrides)
    chosen.check_files()
    pairs_alone = chosen.data.folder is None
    settings["loss"] = settings["loss"] or ("pointwise" if pairs_alone else "listwise")
    settings["seed"] = chosen.seed
    start = Start(head=head, on_stack=on_stack, encoder=encoder, tuning=tuning)
    imitated = None if imitate is None else load_recipe(imitate)
    about = {
        **with_digests(chosen),
        "finetuning": {
            **settings,
            **asdict(start),
            "limit": limit,
            "rerank": rerank,
            "imitate": None if imitated is None else asdict(imitated.teacher),
        },
    }
    tuned = finetune
    if finetune is None:
        start = Start()
    elif is_result_of(finetune, about):  # the command was killed after it
        click.echo(f"{finetune} is fine-tuned already, by this very command: going on with it", err=True)
        chosen = replace(chosen, teacher=replace(chosen.teacher, model=str(finetune)))
        start, finetune = Start(), None
    else:
        require_new(finetune)  # before the work, not after it
    options = {"about": about, **settings, "imitate": imitated}
    if pairs_alone:
        _teach_pairs(PairTeaching(chosen, limit=limit, start=start, progress=not as_json), finetune, options, as_json)
        return
    teaching = Teaching(chosen, limit=limit, start=start, reranked=rerank, progress=not as_json)
    dev = _measure(teaching, finetune, options)
    better = [*dev.values()][-1] > dev[COSINE]
    if not as_json:
        _report(teaching, dev, better)
    filled = _fill(teaching, quiet=as_json) if better or anyway else None
    if as_json:
        echo_json({"dev_ndcg@10": dev, "better": better, "filled": filled})
    elif filled is not None:
        typed = list(overrides)
        if tuned is not None:
            typed = [setting for setting in typed if setting.partition("=")[0].strip() != "teacher.model"]
            typed.append(f"teacher.model={tuned}")
        echo_next("d2llm", "train", recipe, "STUDENT", *chain.from_iterable(("--set", setting) for setting in typed))
    if not better and not anyway:
        raise click.exceptions.Exit(1)


def _measure(teaching: Teaching, finetune: Path | None, options: dict[str, Any]) -> dict[str, float]:
    """The rows of figures on dev. With `finetune`, the teacher is fine-tuned in between."""
    if finetune is not None and not teaching.start.on_stack:
        with_negatives(teaching.examples, options["negatives"])  # too few are an error: before the teacher is measured
    cosine, candidates = teaching.zero_shot()
    dev = {COSINE: cosine}
    if teaching.on_stack is not None:
        dev[STACK] = teaching.measure(candidates, STACK)
    if not teaching.start.on_stack:  # else the teacher starts as the stack
        dev[TEACHER] = teaching.measure(candidates)
    if finetune is not None:
        teaching.finetune(finetune, candidates, dev, **options)
        dev[FINE_TUNED] = teaching.measure(candidates, FINE_TUNED)
    return dev


def _report(teaching: Teaching, dev: dict[str, float], better: bool) -> None:
    """Print the rows, and what fine-tuning or the teacher gains over the best that is free."""
    click.echo(f"nDCG@10 on {len(teaching.dev.queries)} dev queries:")
    echo_measures({name: {MAIN_MEASURE: value} for name, value in dev.items()})
    row, over = [*dev][-1], STACK if STACK in dev else COSINE
    found = teaching.gain(row, over)
    if found is not None:
        click.echo(
            f"The {row} against the {over}: {found['difference']:+.4f} "
            f"(95 % interval {found['low']:+.4f} to {found['high']:+.4f}, p {found['p']:.3g})"
        )
    if not better:
        click.echo("The teacher ranks no better than the untrained cosine: there is nothing to learn from it.")
    elif over == STACK and dev[row] <= dev[STACK]:
        click.echo("The teacher ranks no better than its stack, which costs nothing: train with the stack alone.")


def _teach_pairs(teaching: PairTeaching, finetune: Path | None, options: dict[str, Any], as_json: bool) -> None:
    dev = {COSINE: teaching.zero_shot(), TEACHER: teaching.measure()}
    if finetune is not None:
        teaching.finetune(finetune, dev, **options)
        dev[FINE_TUNED] = teaching.measure()
    better = [*dev.values()][-1] > dev[COSINE]
    if as_json:
        echo_json({"dev_ap": dev, "better": better})
    else:
        click.echo(f"AP on {len(teaching.dev)} dev pairs:")
        echo_measures({name: {AP: value} for name, value in dev.items()})
    if not better:
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
