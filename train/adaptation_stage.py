"""What an adaptation trains: a linear map of the recall vectors, or all weights of the backbone.

B queries of a batch, K candidates of a query (its own passage first), N passages of a batch, E recall width.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.backbone import pad
from d2llm.errors import ModelError
from d2llm.heads import RecallHead
from d2llm.student import Student

from . import losses
from .adaptation import Adaptation, Schedule
from .loop import Losses
from .precision import autocast, compute_dtype
from .schedule import Batches
from .token_states import Side
from .written_lessons import Lesson

AT_ONCE = 64
"""Texts of one step that are padded to the same length: the longest of a step would make all of them long."""

Vectors = Callable[[Sequence[Lesson], Sequence[int]], tuple[Tensor, Tensor]]
"""Gives the recall vectors of the queries of lessons [B, E] and of rows of the pool [N, E], with gradients."""


@dataclass(frozen=True, slots=True)
class AdaptationStage:
    """The cosines of a query with its candidates learn the teacher's distribution over them."""

    name: str
    vectors: Vectors
    lessons: list[Lesson]
    settings: Adaptation
    schedule: Schedule
    batches: Batches

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.schedule.steps

    def losses(self, step: int) -> Losses:
        """Listwise imitation, and InfoNCE for the queries that were written for a passage."""
        batch, settings = self.batches.at(self.lessons, self.schedule.batch, step), self.settings
        negatives = min(self.schedule.negatives, *(len(lesson.rows) - 1 for lesson in batch))
        draws = [[0, *random.sample(range(1, len(lesson.rows)), negatives)] for lesson in batch]
        rows = [lesson.rows[place] for lesson, draw in zip(batch, draws, strict=True) for place in draw]
        queries_BE, passages_NE = self.vectors(batch, rows)
        own_BK = torch.arange(len(rows), device=queries_BE.device).view(len(batch), -1)
        cosine_BK = torch.einsum("be,bke->bk", queries_BE, passages_NE.view(*own_BK.shape, -1))
        log_odds_BK = torch.stack([lesson.log_odds_K[draw] for lesson, draw in zip(batch, draws, strict=True)])
        imitation = losses.listwise_imitation(cosine_BK / settings.temperature, log_odds_BK.to(cosine_BK.device))
        terms = {"listwise_imitation": imitation}
        known = [place for place, lesson in enumerate(batch) if lesson.query.own is not None]
        if known and settings.contrastive:
            own_B1 = torch.tensor([[batch[place].query.own] for place in known])
            positive_BN = (torch.tensor(rows) == own_B1).to(queries_BE.device)
            loss = losses.recall_contrastive(
                queries_BE[known] @ passages_NE.T, positive_BN, temperature=settings.temperature
            )
            terms["contrastive"] = settings.contrastive * loss
        return terms

    def measure(self, done: int) -> None:
        """Nothing is measured before the end: the held-out passages decide once."""


class LinearMap(nn.Module):
    """A square matrix over recall vectors of length 1. It starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_EE = nn.Parameter(torch.eye(width))

    def forward(self, vectors_BE: Tensor) -> Tensor:
        """Map vectors [B, E], and give them length 1 again."""
        return F.normalize(vectors_BE @ self.weight_EE.T, dim=-1)

    def over(self, student: Student) -> Student:
        """A copy of the student whose recall head ends with this map: its recall vectors are the mapped ones.

        Raises:
            ModelError: the recall head ends with a tanh.
        """
        mapped, before = copy.deepcopy(student), student.recall_head
        if not isinstance(before, RecallHead):
            mapped.config = replace(student.config, embedding_dim=student.dim)
            mapped.recall_head = RecallHead(student.dim, student.dim).to(student.device)
            mapped.recall_head.load_state_dict({"weight": self.weight_EE})
            return mapped
        if before.kind == "tanh":
            raise ModelError("the embedder ends with a tanh, which no linear map can follow: use --set tuning=full")
        mapped.recall_head.load_state_dict({n: self.weight_EE @ w for n, w in before.state_dict().items()})
        return mapped


def mapped_vectors(linear_map: LinearMap, passages_NE: Tensor) -> Vectors:
    """The vectors that `linear_map` makes of those that the embedder gave once: no text is encoded again."""
    device = linear_map.weight_EE.device

    def vectors(lessons: Sequence[Lesson], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        queries_BE = torch.stack([lesson.vector_E for lesson in lessons])
        return linear_map(queries_BE.to(device)), linear_map(passages_NE[list(rows)].to(device))

    return vectors


def encoded_vectors(student: Student, texts: Sequence[str], length: int) -> Vectors:
    """The vectors that `student` encodes with gradients. Of long texts it reads the first `length` tokens."""

    def encode(texts: Sequence[str], side: Side) -> Tensor:
        """Recall vectors [B, E]. The last token closes a text, so it is read of every text."""
        ids = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in student.encodings(texts, side)]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        parts = [of_ids([ids[place] for place in order[at : at + AT_ONCE]]) for at in range(0, len(ids), AT_ONCE)]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def of_ids(ids: Sequence[Sequence[int]]) -> Tensor:
        ids_BL, mask_BL = pad(ids, student.device)
        with autocast(student.device, compute_dtype("auto", student.device)):
            tokens_BLD = student.tokens(ids_BL, mask_BL)
        return F.normalize(student.recall_head(student.pma(tokens_BLD.float(), mask_BL)), dim=-1)

    def vectors(lessons: Sequence[Lesson], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return encode([lesson.query.text for lesson in lessons], "query"), encode(
            [texts[row] for row in rows], "document"
        )

    return vectors


def go_back(trained: nn.Module, start: nn.Module, way: float) -> None:
    """Set weights to a point on the way from the start to where training ended."""
    with torch.no_grad():
        for weight, first in zip(trained.parameters(), start.parameters(), strict=True):
            weight.lerp_(first, 1 - way)
