"""What the teacher says of each candidate: who teaches, its log-odds as lessons, and the scales that fit them best.

N lessons, K candidates of a query, T width of a teacher's features.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from d2llm.calibration import FEWEST, Evidence, calibrate
from d2llm.errors import DataError
from d2llm.iem import COSINE_SCALE, SCALED, UNTRAINED
from d2llm.pairs import Pair
from d2llm.student import Student
from d2llm.types import task_id

from . import losses
from .config import Recipe
from .data import RetrievalSplits
from .dev import encode_pairs, gold_scores, symmetric_inputs
from .examples import Example
from .hub_loading import load_hub_teacher
from .mining import load_bi_encoder
from .ranking import CERTAIN
from .teacher import BackboneCrossEncoder, BiEncoderTeacher, Bm25Teacher, Cosine, LateInteraction, Stack, Teacher
from .token_states import TokenStates

logger = logging.getLogger(__name__)

MULTIPLES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
"""The multiples of an untrained student's scales that `choose_scales` tries for words and vectors."""
LABELLED = 2000
"""At most this many labelled pairs decide the scales before the first step."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A query's candidates, the positive first, and what the teacher says of them."""

    example: Example
    candidates: list[str]
    log_odds_K: Tensor
    features_KT: Tensor | None
    """None where the teacher has none."""
    ranked: bool
    """Whether the order of the negatives means anything. Labels do not order them."""


def make_teacher(
    recipe: Recipe, student: Student, states: TokenStates, splits: RetrievalSplits, *, progress: bool = False
) -> Teacher:
    """The teacher of a recipe: a `Stack` of its members, or the member itself if it is a single cross-encoder.

    Raises:
        DataError: no calibration queries are left to weigh the members of a stack with.
        ModelError: a model cannot be loaded.
    """
    config = recipe.teacher
    members: dict[str, Teacher] = {}
    for name in config.members:
        if name == "cosine":
            members[name] = Cosine(student, states)
        elif name == "late-interaction":
            members[name] = LateInteraction(states)
        elif name == "bm25":
            members[name] = Bm25Teacher(splits.bm25, splits.corpus)
        elif name == "bi-encoder":
            for source in config.bi_encoders:
                members[f"{name} {source}"] = BiEncoderTeacher(load_bi_encoder(source).to(student.device), states.dtype)
        elif name == "cross-encoder":
            members[name] = _fitted_cross_encoder(recipe, student, states, splits.first_stage, progress=progress)
        else:
            words = Bm25Teacher(splits.bm25, splits.corpus)
            members[name] = load_hub_teacher(config, student.device, states.dtype, words)
    if len(members) == 1 and members.keys() & {"cross-encoder", "llm", "reranker"}:
        return next(iter(members.values()))  # it is calibrated by itself, and keeps its features
    if not splits.calibration:
        raise DataError(
            "no query is left to weigh the teacher's members with (each needs its positives within the student's "
            f"first {recipe.distil.candidates}): raise teacher.calibration_queries or distil.candidates"
        )
    stack = Stack(members)
    stack.fit(splits.calibration)
    return stack


def _fitted_cross_encoder(
    recipe: Recipe, student: Student, states: TokenStates, seen: Sequence[Example], *, progress: bool
) -> BackboneCrossEncoder:
    """The student's backbone over both texts, fine-tuned on the queries of the first stage."""
    encoder = BackboneCrossEncoder(student, recipe.teacher.max_length, states.dtype)
    negatives = min(7, recipe.data.negatives)
    encoder.fit(
        [example for example in seen if len(example.negatives) >= negatives],
        steps=recipe.teacher.cross_encoder_steps,
        batch=recipe.teacher.cross_encoder_batch,
        negatives=negatives,
        seed=recipe.seed,
        progress=progress,
    )
    return encoder


def lessons_of(
    teacher: Teacher | None, queries: Sequence[tuple[Example, str]], *, progress: bool = False
) -> list[Lesson]:
    """The teacher's judgement of each query's positive and negatives; without a teacher, the labels in its place.

    `queries` are examples, each with the positive that it is judged with.
    """
    lessons = list[Lesson]()
    for example, positive in tqdm(queries, desc="teacher", unit="query", disable=not progress or teacher is None):
        candidates = [positive, *example.negatives]
        if teacher is None:
            labels_K = torch.full((len(candidates),), -CERTAIN)
            labels_K[0] = CERTAIN
            lessons.append(Lesson(example, candidates, labels_K, None, ranked=False))
        else:
            judgement = teacher.judge(example.query, candidates, example.task)
            lessons.append(Lesson(example, candidates, *judgement, ranked=True))
    return lessons


def calibrate_scales(student: Student, states: TokenStates, lessons: Sequence[Lesson]) -> None:
    """Set the IEM's scales of cosine, words and vectors to the values that imitate the teacher best over all lessons.

    They are fitted by L-BFGS, for each task. Gradient descent would need hundreds of steps to reach them. A student
    without scales, or with `interaction="cosine"`, is not changed.
    """
    iem = student.iem
    names = [name for name in iem.part_names if name in SCALED]
    if not names or student.config.interaction == "cosine":
        return
    columns = [SCALED.index(name) for name in names]
    for task in sorted({lesson.example.task for lesson in lessons}):
        of_task = [lesson for lesson in lessons if lesson.example.task == task]
        width = min(len(lesson.candidates) for lesson in of_task)
        with torch.inference_mode():
            parts = [_parts(student, states, of_task[i : i + 32], width) for i in range(0, len(of_task), 32)]
        parts_NKC = torch.cat(parts)[..., : len(names)].clone()  # a clone can take gradients
        teacher_NK = torch.stack([lesson.log_odds_K[:width] for lesson in of_task]).to(student.device)
        imitation = partial(losses.listwise_imitation, teacher_BK=teacher_NK)
        scales_C = _fit_scales(iem.scales.detach()[task_id(task), columns], parts_NKC, imitation)
        with torch.no_grad():
            iem.scales[task_id(task), columns] = scales_C
        logger.info("%s: the scales are %s", task, dict(zip(names, scales_C.tolist(), strict=True)))


def choose_scales(student: Student, states: TokenStates, lessons: Sequence[Lesson]) -> None:
    """Set the scales of words and vectors to those that rank the positives of asymmetric lessons highest.

    Half of the lessons choose among multiples of the scales of an untrained student, and half test the choice: it stays
    only if its gain is sure (see `calibrate`). The teacher's distribution, which `calibrate_scales` imitates, says
    little of a part that matters to few candidates.
    """
    iem = student.iem
    names = [name for name in iem.part_names if name in SCALED]
    of_task = [lesson for lesson in lessons if lesson.example.task == "asymmetric"]
    if len(names) < 2 or len(of_task) < 2 * FEWEST or student.config.interaction == "cosine":
        return
    width = min(len(lesson.candidates) for lesson in of_task)
    with torch.inference_mode():
        parts = [_parts(student, states, of_task[i : i + 32], width) for i in range(0, len(of_task), 32)]
    grades_K = np.zeros(width, np.float32)
    grades_K[0] = 1.0  # the positive comes first
    evidence = [Evidence(parts_KC, grades_K, ideal=1.0) for parts_KC in torch.cat(parts).cpu().numpy()]
    current = iem.scales_of("asymmetric")
    unit = {name: UNTRAINED[name] * current["cosine"] / COSINE_SCALE for name in names[1:]}
    grid = [dict(zip(unit, factors, strict=True)) for factors in product(MULTIPLES, repeat=len(unit))]
    choices = [{**current, **{name: factor * unit[name] for name, factor in factors.items()}} for factors in grid]
    found = calibrate({"held apart": evidence}, current, choices)
    iem.set_scales("asymmetric", found.scales)
    logger.info("asymmetric: the scales are %s (%s)", found.scales, found.gains)


def _parts(student: Student, states: TokenStates, lessons: Sequence[Lesson], width: int) -> Tensor:
    """The parts [N, K, C] of the scores of the first `width` candidates of each lesson."""
    queries = states.encode([lesson.example.query for lesson in lessons], "query")
    passages = states.encode([text for lesson in lessons for text in lesson.candidates[:width]], "document")
    shape = (len(lessons), width, -1)
    cosine_NK = torch.einsum("be,bke->bk", queries.vectors_BE, passages.vectors_BE.view(shape))
    task_N = torch.tensor([task_id(lesson.example.task) for lesson in lessons], device=cosine_NK.device)
    return student.iem.parts(queries.query_features_BH, passages.passage_features_BH.view(shape), cosine_NK, task_N)


def calibrate_labels(student: Student, states: TokenStates, pairs: Sequence[Pair]) -> None:
    """Set the IEM's scales of symmetric pairs, and the bias of the MLP, by logistic regression on labelled pairs.

    The score then starts as log-odds. From a scaled cosine, the first steps of the cross-entropy would spoil the MLP
    with a bias that gradient descent reaches slowly. A student without MLP or without scales is not changed.
    """
    iem = student.iem
    names = [name for name in iem.part_names if name in SCALED]
    if not pairs or not names or "mlp" not in iem.part_names:
        return
    pairs = random.Random(0).sample(pairs, min(LABELLED, len(pairs)))
    with torch.inference_mode():
        parts_NC = iem.parts(*symmetric_inputs(*encode_pairs(states, pairs))).squeeze(1)
    columns, row = [SCALED.index(name) for name in names], task_id("symmetric")
    parts_NC = torch.cat([parts_NC[:, : len(names)], torch.ones_like(parts_NC[:, :1])], dim=1)
    labels_N = gold_scores(pairs).to(student.device)
    start_C = torch.cat([iem.scales.detach()[row, columns], iem.out.bias.detach()])
    scales_C = _fit_scales(start_C, parts_NC, lambda scores_N: losses.cross_entropy(scores_N, labels_N))
    with torch.no_grad():
        iem.scales[row, columns] = scales_C[:-1]
        iem.out.bias.copy_(scales_C[-1:])


def _fit_scales(start_C: Tensor, parts_XC: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The scales of the parts [..., C] with the lowest loss of their weighted sum [...]."""
    spread_C = parts_XC.flatten(0, -2).std(0)  # parts of one spread make the fit easy
    spread_C = torch.where(spread_C > 1e-6, spread_C, 1.0)
    scales_C = (start_C * spread_C).requires_grad_()
    optimizer = torch.optim.LBFGS([scales_C], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of((parts_XC / spread_C) @ scales_C)
        loss.backward()
        return loss

    optimizer.step(closure)
    return scales_C.detach() / spread_C
