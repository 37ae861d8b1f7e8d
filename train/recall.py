"""The first stage: the backbone learns recall, from labels alone.

B queries, N passages of a batch or judged pairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from d2llm.evaluate import Ranking
from d2llm.iem import IEM
from d2llm.pairs import Pair
from d2llm.student import Student

from . import losses
from .checkpoint import ENCODER
from .config import Recipe
from .data import TrainingData
from .dev import gold_scores, measure_student, score_pairs
from .examples import Example
from .loop import Loop, Losses, make_optimizer
from .run_log import BACKBONE_RUN, RunLog
from .schedule import Batches
from .token_states import Encode, TokenStates, encode_live


@dataclass(frozen=True, slots=True)
class RecallStage:
    """InfoNCE: each query must rank its own positive above all other passages of the batch.

    The batch holds a positive and a hard negative of each of its queries.

    Pooling that starts as the mean stays the mean: it measured better to let it learn in the second stage alone.
    """

    recipe: Recipe
    data: TrainingData
    student: Student
    encode: Encode
    batches: Batches
    run_log: RunLog
    states: TokenStates
    """Token states of the untrained backbone."""

    name: ClassVar[str] = "encoder"

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.recipe.recall.steps

    def losses(self, step: int) -> Losses:
        """The recall loss, and that of judged pairs by cosine."""
        recipe, terms = self.recipe, Losses()
        if self.data.retrieval is not None:
            batch = self.batches.at(self.data.retrieval.first_stage, recipe.recall.batch, step)
            terms["recall"] = recall_loss(self.encode, batch, recipe.loss.temperature)
        if self.data.pairs:
            pairs = pairs_at(self.data.pairs, recipe.data.pairs_batch, step, self.batches)
            terms["pairs"] = recipe.loss.pairs * pairs_losses(self.encode, self.student.iem, pairs)[0]
        return terms

    def measure(self, done: int) -> None:
        """Before the first step, measure the untrained backbone on dev and keep its ranking."""
        if done:
            return
        dev = measure_student(self.student, self.states, self.data)
        self.run_log.write(self.name, 0, {f"dev {name}": value for name, value in dev.table("backbone").items()})
        self.run_log.write_run(BACKBONE_RUN, Ranking(list(dev.candidates.values())).run(dev.candidates))


def learn_recall(recipe: Recipe, data: TrainingData, loop: Loop, states: TokenStates) -> TokenStates:
    """Take the student through the first stage, or load its weights if the run is past it.

    Without steps the backbone is measured all the same. `states` are those of the untrained backbone. The result are
    those of the backbone after this stage.
    """
    student = states.student
    after = TokenStates(student, states.dtype, progress=loop.progress) if recipe.recall.steps else states
    if (weights := loop.checkpoint.load(ENCODER)) is not None:
        student.load_state_dict(weights, strict=False)
        return after
    encode = partial(encode_live, student, states.dtype)
    stage = RecallStage(recipe, data, student, encode, loop.batches, loop.run_log, states)
    if recipe.recall.steps:
        pooling = {"pma.": recipe.lr.iem} if recipe.student.start == "paper" else {}
        rates = {"backbone.": recipe.lr.backbone, **pooling, "recall_head.": recipe.lr.pooling}
        loop.run(stage, make_optimizer(student, rates))
    else:
        loop.measure_before(stage)
    loop.save_weights(ENCODER)
    return after


def recall_loss(encode: Encode, batch: Sequence[Example], temperature: float) -> Tensor:
    """InfoNCE on the cosines of each query with a positive and a hard negative of every query of the batch."""
    texts = [
        text
        for example in batch
        for text in (
            random.choice(example.positives),
            *random.sample(example.negatives, min(1, len(example.negatives))),
        )
    ]
    queries = encode([example.query for example in batch], "query")
    passages = encode(texts, "document")
    cosine_BN = queries.vectors_BE @ passages.vectors_BE.T
    positive_BN = positives_among(texts, batch).to(cosine_BN.device)
    return losses.recall_contrastive(cosine_BN, positive_BN, temperature=temperature)


def positives_among(texts: Sequence[str], batch: Sequence[Example]) -> Tensor:
    """Boolean [B, N]: which of the texts are positives of which query."""
    return torch.tensor([[text in positives for text in texts] for positives in (set(e.positives) for e in batch)])


def pairs_at(files: Sequence[Sequence[Pair]], size: int, step: int, batches: Batches) -> list[Pair]:
    """The judged pairs of a step. The files take turns: judgements of different files have different scales."""
    turn, file = divmod(step, len(files))
    return batches.at(files[file], size, turn)


def pairs_losses(encode: Encode, iem: IEM, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """The losses of a batch of judged pairs, by cosine and by IEM.

    By cosine it is RI_PH with the judgements in the teacher's place. By IEM it is RI_PH for scores, and the binary
    cross-entropy for labels.
    """
    labelled = pairs[0].label is not None
    # Similarity has no direction, and the IEM has to learn that. Entailment has one: the second text follows from the
    # first.
    swapped = [not labelled and random.random() < 0.5 for _ in pairs]
    texts = [(p.text_b, p.text_a) if swap else (p.text_a, p.text_b) for p, swap in zip(pairs, swapped, strict=True)]
    first = encode([text for text, _ in texts], "query")
    second = encode([text for _, text in texts], "document")
    iem_N, cosine_N = score_pairs(iem, first, second)
    gold_N = gold_scores(pairs).to(cosine_N.device)
    by_cosine = losses.rank_imitation_ph(cosine_N.unsqueeze(0), gold_N.unsqueeze(0))
    if labelled and "mlp" in iem.part_names:  # without the bias of the MLP, the score cannot become log-odds
        return by_cosine, losses.cross_entropy(iem_N, gold_N)
    return by_cosine, losses.rank_imitation_ph(iem_N.unsqueeze(0), gold_N.unsqueeze(0))
