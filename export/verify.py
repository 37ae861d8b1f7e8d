"""Proof before publication: the exported graphs against the torch student, on real text in many shapes.

Every check compares what the runtime will compute with what the trained modules compute, and raises an `ExportError`
that names the shape and the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from d2llm.errors import D2LLMError
from d2llm.folder import ENCODER, IEM
from d2llm.modeling import Student, pad
from d2llm.sessions import Graph
from d2llm.types import TASKS

TOLERANCE = 1e-4
"""Largest absolute difference of an fp32 embedding, feature or score (scores: relative to the largest)."""
FLOORS = {
    "fp16": {"min_cosine": 0.999, "score_correlation": 0.999},
    "int8": {"min_cosine": 0.95, "score_correlation": 0.95},
}
"""What fp16 and int8 must keep of fp32: the worst cosine of a recall vector, the worst correlation of IEM scores."""

TEXTS = [
    "How do I read a file line by line without loading all of it into memory?",
    "Vitamin D is made in the skin under sunlight; deficiency weakens bones, most of all in children and the old.",
    "find . -type f -name '*.py' -mtime -7 -exec grep -l 'import os' {} +",
    "La tour Eiffel fut construite en deux ans, deux mois et cinq jours pour l'Exposition universelle de 1889.",
    "机器学习模型可以把查询和段落分别编码。",
    "Return the index of the first occurrence of value; raise ValueError if the value is not present.",
    "Der Zug nach München fährt heute wegen Bauarbeiten von Gleis 12 ab, nicht von Gleis 7.",
    "E = mc^2, 3.14159, 2026-11-21T10:00:00Z, user@example.org, https://example.org/a?b=c#d",
    "ok",
]


class ExportError(D2LLMError):
    """The exported graphs do not compute what the student computes. Nothing was published."""


def batches(student: Student) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield (lengths, token id rows): batches of 1 to 33 rows of 1 to the maximal number of tokens, equal and mixed."""
    student.tokenizer.no_truncation()
    stream = [token for text in TEXTS for token in student.tokenizer.encode(text).ids]
    longest = max(student.config.query_max_length, student.config.document_max_length)
    mixed = [max(1, longest * share // 33) for share in range(1, 34)]
    shapes = [[1], [2], [longest], [1] * 3, [7] * 4, [1, longest], mixed[::5], mixed[:16], mixed]
    for lengths in shapes:
        starts = cycle(range(0, len(stream), 11))
        yield (
            lengths,
            [list(islice(cycle(stream), start, start + n)) for n, start in zip(lengths, starts, strict=False)],
        )


def verify(student: Student, folder: Path, precision: str) -> dict[str, float]:
    """Compare the graphs in `folder` with `student` (LoRA merged, in eval mode); return what was measured.

    fp32 must agree within `TOLERANCE`; other precisions must stay above their `FLOORS`.

    Raises:
        ExportError: they do not; names the check, the figure and the bound.
    """
    encoder, iem = Graph(folder / ENCODER), Graph(folder / IEM)
    difference, worst_cosine, kept = 0.0, 1.0, []
    for lengths, rows in batches(student):
        expected = _torch_encode(student, rows)
        found = _onnx_encode(encoder, rows)
        if not all(np.isfinite(array).all() for array in found):
            raise ExportError(f"the {precision} encoder gives NaN or infinity on {len(rows)} rows of {lengths} tokens")
        difference = max(difference, _difference(expected, found))
        worst_cosine = min(worst_cosine, float((expected[0] * found[0]).sum(-1).min()))
        kept.append((expected, found))
        if precision == "fp32":
            _require(difference, f"torch and onnxruntime on {len(rows)} rows of {lengths} tokens")
            alone = _onnx_encode(encoder, rows[-1:])
            _require(_difference([x[-1:] for x in found], alone), f"a row of {lengths[-1]} tokens alone and in a batch")
            if student.rotary:
                left = _onnx_encode(encoder, rows, side="left")
                _require(_difference(found, left), f"left and right padding of {lengths} tokens")
    score_difference, correlation = _compare_scores(student, iem, *kept[-1], exact=precision == "fp32")
    measured = {
        "max_abs_difference": difference,
        "min_cosine": worst_cosine,
        "score_difference": score_difference,
        "score_correlation": correlation,
    }
    if precision == "fp32":
        _require(score_difference, "IEM scores of torch and onnxruntime")
    for name, floor in FLOORS.get(precision, {}).items():
        if measured[name] < floor:
            raise ExportError(f"{precision}: {name} is {measured[name]:.5f}, the floor is {floor}. Export as fp32.")
    return measured


def _require(difference: float, what: str) -> None:
    if difference > TOLERANCE:
        raise ExportError(f"{what} differ by {difference:.2e}, more than {TOLERANCE:.0e}. Nothing was published.")


def _torch_encode(student: Student, rows: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    with torch.inference_mode():
        return [tensor.float().numpy() for tensor in student(*pad(rows))]


def _onnx_encode(encoder: Graph, rows: list[list[int]], side: str = "right") -> list[npt.NDArray[np.float32]]:
    ids, mask = (tensor.numpy() for tensor in pad(rows, side=side))
    out = encoder.run({"input_ids": ids, "attention_mask": mask})
    return [out[name] for name in ("sentence_embedding", "query_features", "passage_features")]


def _difference(left: list[npt.NDArray[np.float32]], right: list[npt.NDArray[np.float32]]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def _compare_scores(
    student: Student,
    iem: Graph,
    expected: list[npt.NDArray[np.float32]],
    found: list[npt.NDArray[np.float32]],
    *,
    exact: bool,
) -> tuple[float, float]:
    """Each row as a query against all rows as passages, on each branch: (largest difference, worst correlation).

    `exact` gives both sides torch's features, so that the IEM alone is compared; otherwise the graph gets its own.
    """
    difference, correlation = 0.0, 1.0
    for task in range(len(TASKS)):
        scores: list[npt.NDArray[np.float32]] = []
        for vectors, query, passage in (expected, expected if exact else found):
            tiled = np.repeat(passage[None], len(query), axis=0)
            feeds = (query, tiled, vectors @ vectors.T, np.full(len(query), task, np.int64))
            if not scores:
                with torch.inference_mode():
                    scores.append(student.iem(*(torch.from_numpy(feed) for feed in feeds)).numpy())
            else:
                names = ("query_features", "passage_features", "recall_score", "task")
                scores.append(iem.run(dict(zip(names, feeds, strict=True)))["score"])
        size = max(1.0, float(np.abs(scores[0]).max()))
        difference = max(difference, float(np.abs(scores[0] - scores[1]).max()) / size)
        correlation = min(correlation, *(float(np.corrcoef(a, b)[0, 1]) for a, b in zip(*scores, strict=True)))
    return difference, correlation
