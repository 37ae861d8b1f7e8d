"""Compare exported graphs with the trained torch modules, on batches of real text in many shapes.

The exporter publishes a model folder only if these checks pass. A check that fails raises an `ExportError`, which names
the shape and the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import nn

from d2llm.backbone import pad
from d2llm.errors import ExportError
from d2llm.folder import ENCODER, IEM
from d2llm.sessions import Graph
from d2llm.small_encoder import SmallEncoder, SmallTransformer
from d2llm.student import Student
from d2llm.types import TASKS

from .graphs import EncoderGraph

TOLERANCE = 1e-4
"""Largest allowed difference from torch in fp32: absolute for vectors and query features, relative to the largest value
for the parts of scores."""
STEP_SHARE = 0.01
"""Largest allowed share of the bytes of passage features that differ from torch's in fp32. A difference in the last bit
can turn a number into the next step."""
FLOORS = {
    "fp16": {"min_cosine": 0.999, "score_correlation": 0.999, "batch_cosine": 0.999},
    "int8": {"min_cosine": 0.95, "score_correlation": 0.95, "batch_cosine": 0.99},
}
"""Lowest allowed agreement of each precision.

- `min_cosine`: the worst cosine between a recall vector and torch's.
- `score_correlation`: the worst correlation between the IEM scores of a query and torch's.
- `batch_cosine`: the worst cosine between the vectors of a text in two batches. It is below 1 because a CPU may add up
  padded rows in another order, and int8 can turn a difference in the last bit into a whole quantization step.
"""
BATCH_TOLERANCE = 1e-2
"""Largest allowed difference in fp16 and int8 between a text alone and the same text in a batch without padding. It is
absolute for numbers up to 1 and relative above. It leaves room for one or two rounding errors in the heads."""

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


Arrays: TypeAlias = list[npt.NDArray[Any]]
"""The outputs of an encoder for one batch: recall vectors, query features, and packed passage features."""
Rows: TypeAlias = list[list[int]]
"""The token ids of the texts of one batch."""


def batches(tokenizer: Tokenizer, longest: int) -> Iterator[tuple[list[int], Rows]]:
    """Yield batches of 1 to 33 texts of 1 to `longest` tokens, with equal and mixed lengths: (lengths, token ids)."""
    tokenizer.no_truncation()
    stream = [token for text in TEXTS for token in tokenizer.encode(text).ids]
    mixed = [max(1, longest * share // 33) for share in range(1, 34)]
    shapes = [[1], [2], [longest], [1] * 3, [7] * 4, [1, longest], mixed[::5], mixed[:16], mixed]
    for lengths in shapes:
        starts = cycle(range(0, len(stream), 11))
        yield (
            lengths,
            [list(islice(cycle(stream), start, start + n)) for n, start in zip(lengths, starts, strict=False)],
        )


def verify(student: Student, folder: Path, precision: str) -> dict[str, float]:
    """Compare the encoder and the IEM in `folder` with `student`; return the worst values, by the name of the check.

    `student` must be in eval mode with LoRA merged. In fp32, torch and onnxruntime must agree within `TOLERANCE`. Other
    precisions must stay above their `FLOORS`. In every precision, the vectors of a text must not depend on its batch.

    Raises:
        ExportError: a check fails; names the check, the measured value and the bound.
    """
    longest = max(student.config.query_max_length, student.config.document_max_length)
    shapes = [(lengths, [rows]) for lengths, rows in batches(student.tokenizer, longest)]
    module = EncoderGraph(student)
    measured, expected, actual = _compare(module, Graph(folder / ENCODER), shapes, precision, rotary=student.rotary)
    sides = [((vectors, query), (vectors, passage)) for vectors, query, passage in (expected, actual)]
    return measured | _compare_scores(student, Graph(folder / IEM), sides[0], sides[1], precision)


def verify_query_encoder(
    student: Student, encoder: SmallEncoder, graph: Path, iem: Path, precision: str
) -> dict[str, float]:
    """Compare the graph of a small query encoder with `encoder` in torch; return the worst values, as `verify` does.

    The IEM scores are compared on passages that `student` encodes.

    Raises:
        ExportError: a check fails; names the check, the measured value and the bound.
    """
    shapes = [(lengths, [rows]) for lengths, rows in batches(encoder.tokenizer, encoder.config.query_max_length)]
    if encoder.config.own_tokenizer and encoder.config.query_layout.words:
        student_batches = batches(encoder.student_tokenizer, student.config.query_max_length)
        for (_, inputs), (_, student_ids) in zip(shapes, student_batches, strict=True):
            inputs.append(student_ids[::-1])  # reversed: a text has different lengths in the two tokenizers
    rotary = isinstance(encoder, SmallTransformer) and encoder.rotary
    measured, expected, actual = _compare(encoder, Graph(graph), shapes, precision, rotary=rotary)
    encoded = student.encode(TEXTS, "document")
    passages = encoded.vectors_BE.numpy(), student.iem.layouts[1].pack(encoded.passage_features_BH).numpy()
    sides = [((vectors, features), passages) for vectors, features in (expected, actual)]
    return measured | _compare_scores(student, Graph(iem), sides[0], sides[1], precision)


def _compare(
    module: nn.Module, graph: Graph, shapes: Sequence[tuple[list[int], list[Rows]]], precision: str, *, rotary: bool
) -> tuple[dict[str, float], Arrays, Arrays]:
    """Compare the encoder in torch with its graph on batches of all shapes.

    Returns the worst values by name, and the outputs of torch and of the graph for the last batch.
    """
    difference, cosine, batch_cosine = 0.0, 1.0, 1.0
    expected, actual = Arrays(), Arrays()
    for lengths, inputs in shapes:
        count = len(lengths)
        expected, actual = _torch_encode(module, inputs), _onnx_encode(graph, inputs)
        if not all(np.isfinite(array).all() for array in actual):
            raise ExportError(
                f"the {precision} encoder gives NaN or infinity on {count} rows of {lengths} tokens. Export as fp32, "
                "or check that the student encodes them to finite numbers"
            )
        difference = max(difference, _difference(expected, actual))
        cosine = min(cosine, float((expected[0] * actual[0]).sum(-1).min()))
        if precision == "fp32":
            what = f"torch and onnxruntime on {count} rows of {lengths} tokens"
            _require(difference, what)
            _require_steps(expected, actual, what)
        batch_cosine = min(batch_cosine, _compare_batches(graph, lengths, inputs, actual, precision, rotary=rotary))
    measured = {"max_abs_difference": difference, "min_cosine": cosine, "batch_cosine": batch_cosine}
    _require_floor(measured, precision)
    return measured, expected, actual


def _compare_batches(
    graph: Graph, lengths: list[int], inputs: list[Rows], together: Arrays, precision: str, *, rotary: bool
) -> float:
    """Check that the vector of a text does not depend on its batch; return the worst cosine.

    It compares the last text alone with the same text in the batch (`together` holds the batch's outputs). For a rotary
    backbone, it also compares the batch padded on the left with the batch padded on the right.
    """
    outputs = {
        f"a row of {lengths[-1]} tokens alone and in a batch": (
            [array[-1:] for array in together],
            _onnx_encode(graph, [rows[-1:] for rows in inputs]),
        )
    }
    if rotary:
        outputs[f"left and right padding of {lengths} tokens"] = together, _onnx_encode(graph, inputs, side="left")
    for what, (left, right) in outputs.items():
        if precision == "fp32":
            _require(_difference(left, right), what)
            _require_steps(left, right, what)
        elif len(set(lengths)) == 1:
            _require(_relative_difference(left, right), f"{precision}: {what}", BATCH_TOLERANCE)
    return min(_worst_cosine(left[0], right[0]) for left, right in outputs.values())


def _require(difference: float, what: str, tolerance: float | None = None) -> None:
    bound = TOLERANCE if tolerance is None else tolerance
    if difference > bound:
        raise ExportError(f"{what} differ by {difference:.2e}, more than {bound:.0e}. Nothing was published.")


def _require_floor(measured: dict[str, float], precision: str) -> None:
    for name, floor in FLOORS.get(precision, {}).items():
        if name in measured and measured[name] < floor:
            raise ExportError(f"{precision}: {name} is {measured[name]:.5f}, the floor is {floor}. Export as fp32.")


def _torch_encode(module: nn.Module, inputs: Sequence[Rows]) -> Arrays:
    with torch.inference_mode():
        outputs = module(*chain(*(pad(rows) for rows in inputs)))
    return [(tensor if tensor.dtype == torch.uint8 else tensor.float()).numpy() for tensor in outputs]


def _onnx_encode(graph: Graph, inputs: Sequence[Rows], side: str = "right") -> Arrays:
    arrays = [tensor.numpy() for rows in inputs for tensor in pad(rows, side=side)]
    names = ("input_ids", "attention_mask", "word_ids", "word_mask")
    return list(graph.run(dict(zip(names, arrays, strict=False))).values())


def _worst_cosine(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return float(((left * right).sum(-1) / lengths).min())


def _difference(left: Arrays, right: Arrays) -> float:
    """Return the largest difference of vectors and query features."""
    return max(float(np.abs(a - b).max()) for a, b in zip(left[:2], right[:2], strict=True))


def _relative_difference(left: Arrays, right: Arrays) -> float:
    pairs = zip(left[:2], right[:2], strict=True)
    return max(float((np.abs(a - b) / np.maximum(1, np.abs(a))).max()) for a, b in pairs)


def _require_steps(left: Arrays, right: Arrays, what: str) -> None:
    """Raise `ExportError` if packed passage features differ in more than a few steps."""
    for a, b in zip(left[2:], right[2:], strict=True):
        share = float((a != b).mean())
        if share > STEP_SHARE:
            raise ExportError(
                f"{what} differ in {share:.1%} of the bytes of passage features, more than {STEP_SHARE:.0%}. Nothing "
                "was published."
            )


Side: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[Any]]
"""Recall vectors and features of the queries or of the passages."""


def _compare_scores(
    student: Student, iem: Graph, expected: tuple[Side, Side], actual: tuple[Side, Side], precision: str
) -> dict[str, float]:
    """Compare the IEM scores of torch and of the graph for each query with all passages, on both branches.

    `expected` are torch's (queries, passages), `actual` the graph's. In fp32 both IEMs get torch's features, so the
    check compares the IEM alone. In other precisions the IEM graph gets the features of the encoder graph.
    """
    difference, correlation = 0.0, 1.0
    for task in range(len(TASKS)):
        weights_C = student.iem.weights(torch.tensor([task]))[0].detach().numpy()
        expected_QKC = _torch_parts(student, *expected, task)
        actual_QKC = _onnx_parts(iem, *(expected if precision == "fp32" else actual), task)
        size_C = np.maximum(1.0, np.abs(expected_QKC).max((0, 1)))
        difference = max(difference, float((np.abs(expected_QKC - actual_QKC) / size_C).max()))
        scores = zip(expected_QKC @ weights_C, actual_QKC @ weights_C, strict=True)
        correlation = min(correlation, *(float(np.corrcoef(a, b)[0, 1]) for a, b in scores))
    measured = {"score_difference": difference, "score_correlation": correlation}
    if precision == "fp32":
        _require(difference, "IEM scores of torch and onnxruntime")
    _require_floor(measured, precision)
    return measured


def _torch_parts(student: Student, queries: Side, passages: Side, task: int) -> npt.NDArray[np.float32]:
    query, packed, cosine, branch = (torch.from_numpy(feed) for feed in _feeds(queries, passages, task).values())
    with torch.inference_mode():
        parts = student.iem.parts(query, student.iem.layouts[1].unpack(packed), cosine, branch)
    return parts.numpy()


def _onnx_parts(iem: Graph, queries: Side, passages: Side, task: int) -> npt.NDArray[np.float32]:
    feeds = _feeds(queries, passages, task)
    parts: npt.NDArray[np.float32] = iem.run({name: feeds[name] for name in iem.inputs})["parts"]
    return parts


def _feeds(queries: Side, passages: Side, task: int) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of the IEM for each query with all passages."""
    (query_vectors, query), (passage_vectors, packed) = queries, passages
    return {
        "query_features": query,
        "passage_features": np.repeat(packed[None], len(query), axis=0),
        "recall_score": query_vectors @ passage_vectors.T,
        "task": np.full(len(query), task, np.int64),
    }
