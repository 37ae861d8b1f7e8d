"""A cross-encoder that starts where the stack stands, and learns to correct it.

A new cross-encoder ranks at chance, and needs half a million pairs to get where the stack stands at once. `OnStack`
adds its log-odds to those of the stack. At the first step they are zero.

K candidates of a query, N passages of the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2llm.embedder import create_student
from d2llm.errors import MismatchError
from d2llm.pretrained import absolute
from d2llm.student import STUDENT, Student
from d2llm.types import Task

from .cache import Identified
from .teacher import Bm25Teacher, Cosine, Judgement, LateInteraction, Stack, Teacher
from .token_states import TokenStates


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedStack:
    """A stack in `teacher.json`, with the scale of the log-odds that are added to it."""

    encoder: str
    """Hub id or folder of the embedder, or a student's folder."""
    encoder_digest: str
    weights: dict[str, float]
    """The weight of each part."""
    bias: float
    scale: float


class EncoderStack(Stack):
    """The stack of an encoder as it is: its cosine, late interaction over its token states, and BM25.

    `encoder` is a student's folder, or the hub id or folder of an embedder, which is read as by `d2llm init`.

    Raises:
        ModelError: the encoder cannot be loaded.
    """

    def __init__(
        self,
        encoder: str,
        words: Bm25Teacher,
        device: torch.device | str,
        dtype: torch.dtype | None,
        *,
        progress: bool = False,
    ) -> None:
        self.name = absolute(encoder)
        saved = (Path(encoder) / STUDENT).is_file()
        self.encoder = (Student.load(Path(encoder)) if saved else create_student(self.name)).to(device).eval()
        self.states = TokenStates(self.encoder, dtype, progress=progress)
        cosine, late = Cosine(self.encoder, self.states), LateInteraction(self.states)
        super().__init__({"cosine": cosine, "late-interaction": late, "bm25": words})

    @classmethod
    def restore(
        cls, saved: SavedStack, words: Bm25Teacher, device: torch.device | str, dtype: torch.dtype | None
    ) -> EncoderStack:
        """The stack of `teacher.json`, over the words of another corpus or the same.

        Raises:
            ModelError: the encoder cannot be loaded.
            MismatchError: the encoder has changed, or the parts are others.
        """
        stack = cls(saved.encoder, words, device, dtype)
        if (digest := stack.encoder.weights_sha256()) != saved.encoder_digest:
            raise MismatchError(
                f"the teacher was fine-tuned on the stack of {saved.encoder} with weights {saved.encoder_digest[:32]}, "
                f"which are {digest[:32]} now. Fine-tune again."
            )
        if saved.weights.keys() != stack.members.keys():
            raise MismatchError(
                f"the teacher was fine-tuned on a stack of {', '.join(saved.weights)}; this version of d2llm has "
                f"{', '.join(stack.members)}. Fine-tune again."
            )
        stack.weights = torch.tensor([saved.weights[name] for name in stack.members])
        stack.bias = torch.tensor(saved.bias)
        return stack

    def settings(self) -> dict[str, Any]:
        """What `restore` needs, as plain values."""
        return {
            "encoder": self.name,
            "encoder_digest": self.encoder.weights_sha256(),
            "weights": dict(zip(self.members, self.weights.tolist(), strict=True)),
            "bias": self.bias.item(),
        }


class OnStack:
    """A teacher whose log-odds are those of a stack, plus a scale times those of a cross-encoder.

    A new head is zero, and its scale stays 1. A model that can judge already, such as an LLM that says yes or no, keeps
    its head, and its scale learns from 0.

    The stack compares the candidates of a query with one another, so what it says of a passage depends on the others.
    The cross-encoder reads one passage at a time. Only its judgements can be cached: put the cache into `teacher`.
    """

    def __init__(self, teacher: Teacher, stack: EncoderStack, scale: nn.Parameter) -> None:
        self.teacher, self.stack, self.scale = teacher, stack, scale

    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """Log-odds [K], and the features of the cross-encoder."""
        own = self.teacher.judge(query, candidates, task)
        with torch.no_grad():
            base_K = self.stack.judge(query, candidates, task).log_odds_K
            return Judgement(base_K + self.scale.cpu() * own.log_odds_K, own.features_KT)

    def behind(self, teacher: Teacher) -> OnStack:
        """The same stack and scale with `teacher` in the place of the cross-encoder, such as its cache."""
        return OnStack(teacher, self.stack, self.scale)

    def settings(self) -> dict[str, Any]:
        """The fields of `SavedStack`, as plain values."""
        return {**self.stack.settings(), "scale": self.scale.item()}


def own_weights(teacher: Teacher) -> str:
    """The identities of the models that a teacher loads. Its other members score with the student's weights."""
    if isinstance(teacher, Stack):
        return " ".join(filter(None, map(own_weights, teacher.members.values())))
    if isinstance(teacher, OnStack):
        encoder = teacher.stack.encoder.weights_sha256()[:32]
        return f"{own_weights(teacher.teacher)} {encoder} {teacher.scale.item()}"
    return teacher.identity if isinstance(teacher, Identified) else ""
