"""The architecture of a small query encoder, and the student that it belongs to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from d2llm.errors import MismatchError
from d2llm.features import Layout
from d2llm.heads import PMAStart, Weightless
from d2llm.saved import earlier_digests
from d2llm.settings import Count, Whole, check_fields
from d2llm.student import Student
from d2llm.types import StrPath

Kind = Literal["layers", "model", "static"]


@dataclass(frozen=True, kw_only=True)
class SmallEncoderConfig:
    """The architecture of a small query encoder, and the student that it belongs to."""

    kind: Kind
    """`layers` of the student, another `model`, or a `static` table of tokens."""
    student: str
    """`student_digest` of the student. The encoder can search only passages that this student encoded."""
    embedding_dim: Count
    """E, the width of the recall vector."""
    layout: tuple[Whole, ...]
    """The `Layout` of the student's query features."""
    student_prompt: str
    student_max_length: Count
    """The student's query prompt and limit in tokens, with which the words of a query are read."""
    query_prompt: str
    query_max_length: Count
    """The encoder's own query prompt and limit in tokens."""
    pooling: Literal["pma", Weightless] = "pma"
    pma_heads: Count = 1
    pma_start: PMAStart = "mean"
    layers: tuple[Whole, ...] = ()
    """For kind `layers`: the student's layers that the encoder keeps, counted from 0."""
    bigrams: Whole = 0
    """For kind `static`: table rows for bigrams (pairs of neighbouring tokens)."""
    backbone: str = ""
    """For kind `model`: the hub id, folder or GGUF file of the pretrained model."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def query_layout(self) -> Layout:
        """The layout of the query features, the student's."""
        return Layout(*self.layout)

    @property
    def own_tokenizer(self) -> bool:
        """Whether the encoder has another tokenizer than the student."""
        return self.kind == "model"

    def require_student(self, student: Student, place: StrPath, student_place: StrPath) -> None:
        """Raise `MismatchError` if this encoder was aligned to another student than `student`. `place` and
        `student_place` are the folders of the two, for the message."""
        digest = student_digest(student)
        if digest != self.student:
            earlier = earlier_digests(student.config.tuning)
            raise MismatchError(
                f"{place} was aligned to the student {self.student[:16]}, {student_place} is {digest[:16]}. Align an "
                f"encoder to it: d2llm kale {student_place} KALE --queries FILE --layers 1{earlier}"
            )


def student_digest(student: Student) -> str:
    """Return the digest (64 hex digits) by which a small encoder identifies its student.

    It covers the student's stored weights, query prompt and query limit.
    """
    config = student.config
    parts = student.weights_sha256(whole=True), config.query_prompt, config.query_max_length
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
