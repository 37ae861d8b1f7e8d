"""Training of cross-encoders: lists of a query's candidates, what is to be learned of them, and the stage of `Loop`.

K candidates of a query; their number may differ from query to query.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from d2llm.types import Task

from . import losses
from .checkpoint import Checkpoint
from .examples import Example
from .loop import Loop, Losses, make_optimizer
from .run_log import RunLog
from .schedule import Batches

RankingLoss: TypeAlias = Literal["listwise", "ranknet", "pointwise"]
RANKING_LOSSES: tuple[RankingLoss, ...] = get_args(RankingLoss)
FINE_TUNING = "fine-tuning"
"""The name of the stage in log and checkpoint."""
CERTAIN = 20.0
"""Log-odds of a label."""


class Drawn(NamedTuple):
    """A list for one step: a query with some of its candidates."""

    query: str
    texts: list[str]
    task: Task
    target_K: Tensor
    base_K: Tensor


@dataclass(frozen=True, slots=True)
class CandidateList:
    """A query with its candidates, the positives first.

    A labelled pair of texts is such a list too: one candidate, which is a positive or a negative.
    """

    example: Example
    target_K: Tensor
    """Log-odds to learn: those of the labels, or those of a teacher."""
    base_K: Tensor
    """Log-odds that the model's own are added to."""

    @classmethod
    def labelled(cls, example: Example) -> CandidateList:
        """What the labels say: the positives yes, the negatives no."""
        target_K = torch.tensor([CERTAIN] * len(example.positives) + [-CERTAIN] * len(example.negatives))
        return cls(example, target_K, torch.zeros_like(target_K))

    @property
    def texts(self) -> list[str]:
        """The candidates."""
        return [*self.example.positives, *self.example.negatives]

    def draw(self, negatives: int) -> Drawn:
        """One of the positives, if there are any, and at most `negatives` negatives, at random."""
        example, texts = self.example, self.texts
        first = len(example.positives)
        places = random.sample(range(first), min(1, first))
        places += random.sample(range(first, len(texts)), min(negatives, len(example.negatives)))
        return Drawn(
            example.query, [texts[i] for i in places], example.task, self.target_K[places], self.base_K[places]
        )


@dataclass(slots=True)
class Pace:
    """Tokens that were read in training without padding, and the seconds that it took."""

    tokens: int = 0
    seconds: float = 0.0


Passes: TypeAlias = Callable[[Sequence[Drawn]], Iterator[tuple[list[int], Sequence[Tensor]]]]
"""Runs a model over lists, in one or more passes. Each pass gives the indices of its lists and the model's log-odds [K]
of each."""

_LOSSES: Mapping[RankingLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "listwise": losses.listwise_imitation,
    "ranknet": losses.ranknet,
    "pointwise": lambda scores_1K, target_1K: losses.cross_entropy(scores_1K, target_1K.sigmoid()),
}


@dataclass(frozen=True, slots=True)
class RankingStage:
    """A cross-encoder learns the order of each list of candidates."""

    lists: Sequence[CandidateList]
    passes: Passes
    steps: int
    batch: int
    """Lists in one step."""
    negatives: int
    """At most this many negatives of a list are in one step."""
    loss: RankingLoss
    batches: Batches
    run_log: RunLog
    name: str = FINE_TUNING
    evaluate: Callable[[], float] | None = None
    """Measures the model on dev. None keeps the last state, not the best."""
    measure_name: str = "nDCG@10"
    before: float | None = None
    """What `evaluate` would give before the first step, if it is known."""
    eval_every: int = 100
    pace: Pace = field(default_factory=Pace)
    values: list[float] = field(default_factory=list)
    """The loss of each step that was done."""

    def losses(self, step: int) -> Losses:
        """The mean loss of a batch of lists. Its gradients are added here, pass by pass, to save memory."""
        began = time.perf_counter()
        drawn = [candidates.draw(self.negatives) for candidates in self.batches.at(self.lists, self.batch, step)]
        total = torch.zeros(())
        for indices, scores in self.passes(drawn):
            parts = [self._loss_of(drawn[index], scores_K) for index, scores_K in zip(indices, scores, strict=True)]
            loss = torch.stack(parts).sum() / len(drawn)
            loss.backward()
            total = total.to(loss.device) + loss.detach()
        self.values.append(total.item())  # waits for the GPU, so the seconds are true
        self.pace.seconds += time.perf_counter() - began
        return {self.loss: total}

    def _loss_of(self, drawn: Drawn, scores_K: Tensor) -> Tensor:
        scores_K = scores_K + drawn.base_K.to(scores_K.device)
        return _LOSSES[self.loss](scores_K.unsqueeze(0), drawn.target_K.to(scores_K.device).unsqueeze(0))

    def measure(self, done: int) -> float | None:
        """Measure on dev at the start, every `eval_every` steps, and at the end."""
        if self.evaluate is None or (done % self.eval_every and done != self.steps):
            return None
        value = self.before if not done and self.before is not None else self.evaluate()
        speed = {"tokens/s": self.pace.tokens / self.pace.seconds} if self.pace.tokens else {}
        self.pace.tokens, self.pace.seconds = 0, 0.0
        self.run_log.write(self.name, done, {f"dev {self.measure_name}": value, **speed})
        return value


def learn(
    model: nn.Module,
    stage: RankingStage,
    lr: float,
    *,
    scale_lr: float | None = None,
    checkpoint: Checkpoint | None = None,
    save_every: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Take `model` through `stage` to its best state on dev, or to its last one where dev is not measured.

    Raises:
        DivergedError: a loss is not finite.
    """
    checkpoint = checkpoint or Checkpoint(None, {})
    loop = Loop(model, Accelerator(), checkpoint, stage.run_log, seed, save_every, progress=progress)
    model.load_state_dict(loop.run(stage, make_optimizer(model, {"": lr}, scale_lr)), strict=False)
    model.eval()
