"""Texts through a student: its backbone run once and the token states kept, or run anew with gradients.

B batch, L tokens, D backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from d2llm.backbone import pad
from d2llm.student import Encoded, Student
from d2llm.tokens import batches_of

from .precision import autocast

Side = Literal["query", "document"]

Encode: TypeAlias = Callable[[Sequence[str], Side], Encoded]
"""Encodes a batch of texts with gradients: `TokenStates.encode`, or `encode_live` with its first arguments set."""


class TokenStates:
    """Token states of a frozen backbone, computed once for each text and kept in float16: 2 D bytes a token.

    A text whose tokens are the same on both sides has one copy of them.
    """

    def __init__(self, student: Student, dtype: torch.dtype | None, *, progress: bool = False) -> None:
        self.student, self.dtype, self._progress = student, dtype, progress
        self._states: dict[tuple[Side, str], tuple[Tensor, Tensor]] = {}
        self._by_ids: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def compute(self, texts: Sequence[str], side: Side) -> None:
        """Compute the states of the texts that have none yet, in batches of similar length."""
        missing = list({text for text in texts if (side, text) not in self._states})
        if not missing:
            return  # at once: most batches have been seen, and to change a student's mode walks through all its modules
        ids = [tuple(row) for row in self.student.encodings(missing, side)]
        self._run([row for row in set(ids) if row not in self._by_ids], f"token states ({side})")
        self._states |= {(side, text): self._by_ids[row] for text, row in zip(missing, ids, strict=True)}

    def _run(self, ids: list[tuple[int, ...]], what: str) -> None:
        """Run the backbone over token ids."""
        ids.sort()  # batches do not depend on the order of a set
        bar = tqdm(total=len(ids), unit="text", desc=what, disable=not self._progress or len(ids) < 1000)
        was_training = self.student.training
        self.student.eval()  # dropout would become part of the states
        for batch in batches_of([len(row) for row in ids], self.student.batch_tokens):
            chunk = [ids[place] for place in batch]
            ids_BL, mask_BL = pad(chunk, self.student.device)
            with torch.inference_mode(), autocast(self.student.device, self.dtype):
                states_BLD = self.student.tokens(ids_BL, mask_BL).half()
            for index, row in enumerate(chunk):
                self._by_ids[row] = states_BLD[index, : len(row)].clone(), ids_BL[index, : len(row)].clone()
            bar.update(len(chunk))
        self.student.train(was_training)
        bar.close()

    def of(self, text: str, side: Side) -> Tensor:
        """States [L, D] of one text, float32."""
        if (side, text) not in self._states:
            self.compute([text], side)
        return self._states[side, text][0].float()

    def batch(self, texts: Sequence[str], side: Side) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, L, D] float32, mask [B, L] and token ids [B, L], padded, as `Student.heads` takes them."""
        self.compute(texts, side)
        rows = [self._states[side, text] for text in texts]
        tokens_BLD = nn.utils.rnn.pad_sequence([states for states, _ in rows], batch_first=True).float()
        ids_BL = nn.utils.rnn.pad_sequence([ids for _, ids in rows], batch_first=True)
        lengths_B = torch.tensor([len(ids) for _, ids in rows], device=ids_BL.device)
        mask_BL = (torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B.unsqueeze(-1)).long()
        return tokens_BLD, mask_BL, ids_BL

    def encode(self, texts: Sequence[str], side: Side) -> Encoded:
        """One batch of texts through the heads, with their gradients."""
        return self.student.heads(*self.batch(texts, side))

    def encode_all(self, texts: Sequence[str], side: Side) -> Encoded:
        """Any number of texts through the heads, 256 at a time."""
        self.compute(texts, side)
        parts = [self.encode(texts[start : start + 256], side) for start in range(0, len(texts), 256)]
        return Encoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def encode_live(student: Student, dtype: torch.dtype | None, texts: Sequence[str], side: Side) -> Encoded:
    """One batch of texts through backbone and heads, with the gradients of both."""
    ids_BL, mask_BL = pad(student.encodings(texts, side), student.device)
    with autocast(student.device, dtype):
        tokens_BLD = student.tokens(ids_BL, mask_BL)
    return student.heads(tokens_BLD, mask_BL, ids_BL)
