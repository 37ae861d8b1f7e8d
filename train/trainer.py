"""The training run, in order: recall is learned, the teacher is measured, the student learns from it, dev decides."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from d2llm.backbone import check_length
from d2llm.files import require_new
from d2llm.fitting import fit_to_corpus, fit_vectors
from d2llm.student import Student
from d2llm.types import StrPath

from .checkpoint import Checkpoint, with_digests
from .config import OLD_KEYS, Recipe
from .data import TrainingData, with_positive
from .dev import measure_student, measure_teacher
from .distillation import distil
from .lessons import Lesson, calibrate_labels, calibrate_scales, lessons_of, make_teacher
from .loop import Loop
from .mining import TokenStatesRanker
from .on_stack import own_weights
from .precision import compute_dtype
from .recall import learn_recall
from .run_log import TEACHER_RUN, RunLog, write_report
from .teacher import Teacher
from .token_states import TokenStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """A trained student, its teacher, and their figures on dev.

    Example:
        >>> dev = {"before distillation by cosine": 0.64, "student by IEM": 0.68}
        >>> result = Result(student, teacher=None, taught=False, dev=dev)  # train(recipe) gives one
        >>> result.dev["student by IEM"]
        0.68
    """

    student: Student
    teacher: Teacher | None
    """None if there are judged pairs alone."""
    taught: bool
    """Whether the teacher ranked better than the fine-tuned cosine. If not, the student learned from labels alone."""
    dev: dict[str, float]
    """nDCG@10 of the fine-tuned cosine, of the teacher on the same candidates, and of the finished student by cosine
    and by IEM. For pairs it is Spearman, or average precision (AP) if they have labels."""


def train(recipe: Recipe, out: StrPath | None = None, *, progress: bool = False) -> Result:
    """Train a student and, if `out` is given, write it there with log, curves and a model card.

    1. The encoder learns recall from labels on one part of the queries.
    2. The student's own recall gives hard negatives for the other part, and the teacher is measured beside the student.
    3. The student learns to score these as the teacher does, or as the labels say if the teacher ranks no better. The
       best state on dev is kept.
    4. The student is written. Beside it are `teacher.dev.run` and `backbone.dev.run`, the rankings of dev by the
       teacher and by the untrained backbone, for `d2llm eval --run`.

    The run lives in `OUT.run` until it is done. After a kill, the same call continues from the last checkpoint. Under
    `accelerate launch` each process takes a share of every batch, and the first one writes.

    Raises:
        DataError: the data is incomplete or has no training queries, or `OUT.run` belongs to another recipe.
        ModelError: the backbone cannot be loaded.
        OutputExistsError: `out` exists and is not an empty folder.
        ArgumentError: the student's lengths or heads do not suit the backbone.
        DivergedError: a loss is not finite.
    """
    out = None if out is None else Path(out)
    if out is not None:
        require_new(out)
    began, accelerator = time.monotonic(), Accelerator()
    progress = progress and accelerator.is_main_process
    folder = None if out is None else out.with_name(out.name + ".run")
    torch.manual_seed(recipe.seed)
    # In this order: a wrong backbone is reported before a corpus is read, and wrong data before anything is written.
    student = _make_student(recipe).to(accelerator.device)
    checkpoint = Checkpoint(folder, with_digests(recipe, student.backbone), OLD_KEYS)
    data = TrainingData.load(recipe)
    fit_to_corpus(student, data.passages)
    run_log = RunLog(folder if accelerator.is_main_process else None, recipe.recall.steps)
    loop = Loop(student, accelerator, checkpoint, run_log, recipe.seed, recipe.save_every, progress=progress)

    states = TokenStates(student, compute_dtype(recipe.precision, student.device), progress=progress)
    states = learn_recall(recipe, data, loop, states)
    fit_vectors(student, data.passages)

    teacher, taught, lessons = None, False, list[Lesson]()
    if data.retrieval is not None:
        states.compute(data.retrieval.corpus, "document")
        ranker = TokenStatesRanker(states, data.retrieval.corpus)
        splits = data.retrieval.with_mined_negatives(ranker.rank, recipe.distil.candidates, recipe.distil.mining)
        teacher = make_teacher(recipe, student, states, splits, progress=progress)
        checkpoint.add_digest("teacher", own_weights(teacher))
        data = replace(data, retrieval=splits)
    before = measure_student(student, states, data)
    dev = before.table("before distillation")
    if teacher is not None and data.retrieval is not None:
        dev["teacher"], _ = measure_teacher(teacher, data.retrieval.dev, before.candidates)
        taught = dev["teacher"] > before.cosine
        if not taught:
            logger.warning(
                "The teacher ranks no better than the fine-tuned cosine (nDCG@10 %.4f against %.4f): it has "
                "nothing to teach. The student learns from labels alone.", dev["teacher"], before.cosine
            )  # fmt: skip
        queries = with_positive(data.retrieval.second_stage, recipe.distil.negatives, recipe.seed)
        lessons = loop.split_over_processes(
            queries, partial(lessons_of, teacher if taught else None, progress=progress)
        )
        calibrate_scales(student, states, lessons)
    calibrate_labels(student, states, data.labelled)
    logger.info("dev: %s", dev)

    final = distil(recipe, data, lessons, states, loop)
    dev |= final.table("student")
    if teacher is not None and data.retrieval is not None:
        reranked, run = measure_teacher(teacher, data.retrieval.dev, final.candidates)
        dev["teacher on the student's candidates"] = reranked
        run_log.write_run(TEACHER_RUN, run)
    run_log.close()
    student.provenance = {"recipe": asdict(recipe), "dev": dev, "taught": taught}
    if out is not None and folder is not None:
        if accelerator.is_main_process:
            facts = {
                "seed": str(recipe.seed),
                "minutes": f"{(time.monotonic() - began) / 60:.1f}",
                "device": student.device.type,
            }
            student.save(out, beside=write_report(recipe, out.name, dev, facts, folder))
            checkpoint.remove()
        accelerator.wait_for_everyone()
    return Result(student, teacher, taught, dev)


def _make_student(recipe: Recipe) -> Student:
    """The student before training.

    Raises:
        ModelError: the backbone cannot be loaded.
        ArgumentError: the student's lengths or heads, or the length of its cross-encoder, do not suit the backbone.
    """
    student = Student.create(recipe.student)
    if "cross-encoder" in recipe.teacher.members:
        check_length("teacher.max_length", recipe.teacher.max_length, student.tokenizer, "", student.backbone)
    if recipe.gradient_checkpointing:
        student.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return student
