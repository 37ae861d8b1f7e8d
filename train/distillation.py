"""The second stage: the student learns the teacher's scores, and the best state on dev is kept.

B queries, K candidates of a query (the positive first), N passages of a batch, I in-batch negatives, H student feature
width, T teacher feature width, F width of the IEM's interaction.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from d2llm.iem import IEM
from d2llm.student import Encoded, Student
from d2llm.types import task_id

from . import losses
from .config import LossConfig, Recipe
from .data import TrainingData
from .dev import Dev, measure_student
from .lessons import Lesson, choose_scales
from .loop import Loop, Losses, make_optimizer
from .recall import pairs_at, pairs_losses, positives_among
from .run_log import RunLog
from .schedule import Batches
from .token_states import Encode, TokenStates, encode_live

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DistillationStage:
    """The student's scores of a query's candidates learn to imitate the teacher's (paper section 3.4)."""

    recipe: Recipe
    data: TrainingData
    lessons: list[Lesson]
    student: Student
    states: TokenStates
    encode: Encode
    batches: Batches
    run_log: RunLog

    name: ClassVar[str] = "distillation"

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.recipe.distil.steps

    def losses(self, step: int) -> Losses:
        """The imitation losses of a batch of lessons, and one term for judged pairs, by cosine and by IEM."""
        recipe, terms = self.recipe, Losses()
        if self.lessons:
            batch = self.batches.at(self.lessons, recipe.distil.batch, step)
            terms = imitation_losses(self.encode, self.student.iem, batch, recipe.distil.negatives, recipe.loss)
        if self.data.pairs:
            pairs = pairs_at(self.data.pairs, recipe.data.pairs_batch, step, self.batches)
            by_cosine, by_iem = pairs_losses(self.encode, self.student.iem, pairs)
            terms["pairs"] = recipe.loss.pairs * (recipe.loss.recall * by_cosine + by_iem)
        return terms

    def measure(self, done: int) -> float | None:
        """Measure on dev at the start, every `eval_every` steps, and at the end."""
        if done % self.recipe.distil.eval_every and done != self.steps:
            return None
        states = self.states
        if done and self.recipe.distil.backbone == "live":  # the backbone has changed since
            states = TokenStates(self.student, states.dtype)
        dev = measure_student(self.student, states, self.data)
        table = dev.table("student")
        self.run_log.write(self.name, done, {f"dev {name}": value for name, value in table.items()})
        logger.info("step %d: %s", done, table)
        return dev.search_score


def distil(recipe: Recipe, data: TrainingData, lessons: list[Lesson], states: TokenStates, loop: Loop) -> Dev:
    """Take the student through the second stage to its best state on dev. Gives that state's figures.

    If the IEM's gain over the cosine on dev is within noise, its correction of the cosine is set to zero. Then the
    scales are chosen by labels (`choose_scales`).
    """
    student, live = states.student, recipe.distil.backbone == "live"
    if not live:
        for pairs in data.pairs:
            states.compute([pair.text_a for pair in pairs], "query")
            states.compute([pair.text_b for pair in pairs], "document")
    encode = partial(encode_live, student, states.dtype) if live else states.encode
    stage = DistillationStage(recipe, data, lessons, student, states, encode, loop.batches, loop.run_log)
    rates = {
        **({"backbone.": recipe.lr.backbone} if live else {}),
        # In the paper's form the pooling starts from nothing, as the IEM does.
        "pma.": recipe.lr.pooling if recipe.student.start == "mean" else recipe.lr.iem,
        "recall_head.": recipe.lr.pooling,
        "token_vectors.": recipe.lr.pooling,
        "iem.": recipe.lr.iem,
    }
    best = loop.run(stage, make_optimizer(student, rates, recipe.lr.scale))
    student.load_state_dict(best, strict=False)
    if live:
        states = TokenStates(student, states.dtype)
    dev = measure_student(student, states, data)
    if not dev.correction_helps:
        logger.warning(
            "On dev what the IEM adds to the cosine is within its noise (nDCG@10 %.4f against %.4f): it becomes "
            "zero. Words and vectors stay only if they gain on the training queries held apart.", dev.iem, dev.cosine
        )  # fmt: skip
        student.iem.reset()
    choose_scales(student, states, lessons)
    dev = measure_student(student, states, data)
    student.eval()
    return dev


def imitation_losses(encode: Encode, iem: IEM, batch: Sequence[Lesson], negatives: int, weights: LossConfig) -> Losses:
    """The losses of a batch of lessons, each with its weight; a loss of weight 0 is neither computed nor returned.

    Each query takes its positive and `negatives` of its negatives, drawn at random.
    """
    size, count = len(batch), negatives + 1
    draws = [[0, *random.sample(range(1, len(lesson.candidates)), negatives)] for lesson in batch]
    texts = [lesson.candidates[i] for lesson, draw in zip(batch, draws, strict=True) for i in draw]
    queries = encode([lesson.example.query for lesson in batch], "query")
    passages = encode(texts, "document")
    device = queries.vectors_BE.device
    log_odds_BK = torch.stack([lesson.log_odds_K[draw] for lesson, draw in zip(batch, draws, strict=True)]).to(device)
    teacher_BK = log_odds_BK.sigmoid()
    cosine_BN = queries.vectors_BE @ passages.vectors_BE.T
    positive_BN = positives_among(texts, [lesson.example for lesson in batch]).to(device)
    task_B = torch.tensor([task_id(lesson.example.task) for lesson in batch], device=device)

    own_BK = torch.arange(size * count, device=device).view(size, count)
    passage_BKH = passages.passage_features_BH.view(size, count, -1)
    cosine_BK = cosine_BN.gather(1, own_BK)
    scores_BK = iem(queries.query_features_BH, passage_BKH, cosine_BK, task_B)
    first_BK = torch.zeros_like(scores_BK, dtype=torch.bool)
    first_BK[:, 0] = True
    first_BB = torch.arange(size, device=device).expand(size, size) == 0
    scale = iem.scales[task_B, :1] if "cosine" in iem.part_names else 1 / weights.temperature
    easy_BI = cache(lambda: _in_batch_scores(iem, queries, passages, cosine_BN, task_B, own_BK[:, 0]))
    # Functions, so that only losses of some weight are computed: some cost as much as the rest of the step.
    terms: dict[str, Callable[[], Tensor]] = {
        "recall": lambda: losses.recall_contrastive(cosine_BN, positive_BN, temperature=weights.temperature),
        "margin_mse": lambda: losses.margin_mse(scale * cosine_BK, log_odds_BK),
        "listwise_imitation": lambda: losses.listwise_imitation(scores_BK, log_odds_BK),
        "contrastive": lambda: losses.recall_contrastive(scores_BK, first_BK, temperature=1.0),
        "in_batch": lambda: losses.recall_contrastive(
            torch.cat([scores_BK[:, :1], easy_BI()], dim=1), first_BB, temperature=1.0
        ),
        "contrastive_imitation": lambda: losses.contrastive_imitation(
            scores_BK, teacher_BK, first_BK, positive_in_denominator=weights.ci_positive_in_denominator
        ),
    }
    if batch[0].ranked:
        imitated_BK = teacher_BK if weights.ph_on_probabilities else log_odds_BK
        terms["rank_imitation_ph"] = lambda: losses.rank_imitation_ph(scores_BK, imitated_BK)
        # The teacher would say no to another query's positive: probability 0.
        terms["rank_imitation_hi"] = lambda: losses.rank_imitation_hi(
            scores_BK[:, 1:], easy_BI(), teacher_BK[:, 1:], torch.zeros_like(easy_BI()), weight=weights.hi_weight
        )
    if batch[0].features_KT is not None:
        teacher_BKT = _teacher_features(batch, draws).to(device, torch.float32)
        terms["feature_imitation"] = lambda: losses.feature_imitation(
            iem.interact(queries.query_features_BH, passage_BKH, task_B), teacher_BKT, squared=weights.fi_squared
        )
    return {name: getattr(weights, name) * loss() for name, loss in terms.items() if getattr(weights, name)}


def _teacher_features(batch: Sequence[Lesson], draws: Sequence[list[int]]) -> Tensor:
    """Features [B, K, T] of the drawn candidates."""
    features = ((lesson.features_KT, draw) for lesson, draw in zip(batch, draws, strict=True))
    return torch.stack([features_KT[draw] for features_KT, draw in features if features_KT is not None])


def _in_batch_scores(
    iem: IEM, queries: Encoded, passages: Encoded, cosine_BN: Tensor, task_B: Tensor, positive_B: Tensor
) -> Tensor:
    """IEM scores [B, B - 1] of each query with the positives of the others; `positive_B` are indices of passages."""
    size = len(positive_B)
    others_BB = ~torch.eye(size, dtype=torch.bool, device=positive_B.device)
    others_BI = positive_B.expand(size, size)[others_BB].view(size, size - 1)
    features = queries.query_features_BH, passages.passage_features_BH[others_BI]
    scores_BI: Tensor = iem(*features, cosine_BN.gather(1, others_BI), task_B)
    return scores_BI
