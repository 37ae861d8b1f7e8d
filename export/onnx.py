"""Export: torch's dynamo exporter, onnxruntime's own optimizer, fp16 and int8, verification, one atomic folder."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
import torch
from onnxruntime.transformers import float16, optimizer
from onnxruntime.transformers.onnx_model import OnnxModel
from optimum.exporters.base import ExporterConfig
from torch import nn

from d2llm.errors import ArgumentError, ExportError, MismatchError
from d2llm.files import new_folder, set_ordinary_permissions, sha256_of
from d2llm.folder import (
    ENCODER,
    IEM,
    QUERY_ENCODER,
    QUERY_TOKENIZER,
    TOKENIZER,
    ModelConfig,
    SmallEncoderInfo,
    fingerprint,
    read_config,
    write_config,
)
from d2llm.small_encoder import SmallEncoder, SmallTransformer
from d2llm.student import Student, earlier_digests
from d2llm.types import TASKS

from .graphs import dynamic_shapes, encoder_graph, iem_graph, small_encoder_graph
from .int8 import quantize
from .verify import TEXTS, verify, verify_query_encoder

logger = logging.getLogger(__name__)

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
MIN_OPSET, DEFAULT_OPSET = 18, 18
EXTERNAL_DATA_BYTES = 2**31 - 2**20
"""Graphs above this go with a data file beside them: protobuf ends at 2 GiB."""
FP32_OPS = [
    *(
        "LayerNormalization",
        "SkipLayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    ),
    *("Pow", "ReduceMean", "ReduceL2", "Sqrt", "Reciprocal", "Softmax"),
]
"""Kept in fp32 when the rest goes to fp16: norms and what they are made of overflow or lose their digits."""
FINGERPRINTED = {"fp32": ["fp32"], "fp16": ["fp16"], "int8": ["int8-rows", "int8"]}
"""A precision as fingerprints say it: today's, then earlier ones. int8 once had one range for all activations of a
batch; vectors of such a graph are too far from today's to share a collection."""
LIMITS = {"batch": 2**16, "queries": 2**16, "candidates": 2**24}
"""How long each axis may be; lengths of texts depend on the model."""
PROBE = " ".join(TEXTS[:6])


def export(
    student_folder: Path,
    target: Path,
    *,
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
    query_encoder: Path | None = None,
    query_precision: Precision | None = None,
) -> ModelConfig:
    """Write the model folder `target` from a student: LoRA merged, graphs optimised, verified against torch.

    `precision` is the encoder's; the IEM is small and stays in fp32. `query_encoder` is a folder of `d2llm kale` to put
    beside the encoder, in `query_precision` (that of the encoder, if None). Whole or not at all: a failed or
    interrupted export leaves nothing at `target`.

    Raises:
        ModelError: no student or query encoder there, or `target` exists.
        MismatchError: the query encoder was aligned to another student.
        ExportError: the graphs do not compute what the student computes, or fp16/int8 lose more than their floor.
        ArgumentError: an opset below 18, the lowest that the exporter writes.
    """
    if opset < MIN_OPSET:
        raise ArgumentError(f"opset {opset} is too low: the exporter writes {MIN_OPSET} and above")
    with new_folder(target) as staging:
        student = _load(student_folder)
        small = None if query_encoder is None else load_query_encoder(query_encoder, student, student_folder)
        longest = max(student.config.query_max_length, student.config.document_max_length)
        limits = {**LIMITS, "length": 2 * longest}
        graph, description = encoder_graph(student)
        _trace(graph, description, staging / ENCODER, limits, opset, precision, student.backbone)
        graph, description = iem_graph(student)
        _trace(graph, description, staging / IEM, limits, opset, "fp32", None)
        logger.info("verifying against torch")
        agreement = verify(student, staging, precision)
        student.tokenizer.no_truncation()
        student.tokenizer.save(str(staging / TOKENIZER))
        config = _describe(student, staging, precision, opset, agreement)
        if small is not None:
            entry = _write_query_encoder(student, small, staging, staging / IEM, query_precision or precision, opset)
            config = replace(config, query_encoder=entry)
        return write_config(staging, config)


def add_query_encoder(
    student_folder: Path,
    model_folder: Path,
    query_encoder: Path,
    *,
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
) -> ModelConfig:
    """Put a small query encoder into a model folder that was exported from the same student, in place of one that is
    there. The passage side and its fingerprint stay as they are, and so do all collections.

    Interrupted at any moment, the folder is a valid model, with a small query encoder or without.

    Raises:
        ModelError: no student, no query encoder, or no model there.
        MismatchError: the model or the query encoder belongs to another student; names both.
        ExportError: the graph does not compute what the query encoder computes, or loses more than its floor.
    """
    config = read_config(model_folder)
    student = _load(student_folder)
    names = FINGERPRINTED[config.precision]
    if not any(_fingerprint(student, model_folder, name) == config.fingerprint for name in names):
        expected = _fingerprint(student, model_folder, names[0])
        raise MismatchError(
            f"{model_folder} has the passage encoder {config.fingerprint}, {student_folder} would have {expected}: it "
            f"was exported from another student. Name the student that it was made from.{earlier_digests(student)}"
        )
    small = load_query_encoder(query_encoder, student, student_folder)
    with tempfile.TemporaryDirectory(prefix=f".{model_folder.name}-", dir=model_folder.parent) as temporary:
        staging = Path(temporary)
        entry = _write_query_encoder(student, small, staging, model_folder / IEM, precision, opset)
        old = [name for name in config.files if name.startswith((QUERY_ENCODER, QUERY_TOKENIZER))]
        if old:  # d2llm.json is what makes a file part of the model: first it forgets the old ones
            kept = {name: digest for name, digest in config.files.items() if name not in old}
            config = write_config(model_folder, replace(config, query_encoder=None), kept)
        for name in old:
            (model_folder / name).unlink()
        set_ordinary_permissions(staging)
        new = sorted(staging.iterdir())
        hashes = {path.name: sha256_of(path) for path in new}
        for path in new:
            path.replace(model_folder / path.name)
        return write_config(model_folder, replace(config, query_encoder=entry), {**config.files, **hashes})


def _load(folder: Path) -> Student:
    student = Student.load(folder)
    student.merge_lora()
    return student.eval()


def load_query_encoder(folder: Path, student: Student, student_folder: Path) -> SmallEncoder:
    """Read a small query encoder that was aligned to `student`, which lies in `student_folder`.

    Raises:
        ModelError: no query encoder there.
        MismatchError: it was aligned to another student; names both.
    """
    encoder = SmallEncoder.load(folder)
    encoder.config.require_student(student, folder, student_folder)
    return encoder


def _write_query_encoder(
    student: Student, encoder: SmallEncoder, folder: Path, iem: Path, precision: Precision, opset: int
) -> SmallEncoderInfo:
    """Trace and verify a small query encoder into `folder`; what `d2llm.json` is to say of it."""
    config = encoder.config
    longest = 2 * max(config.query_max_length, config.student_max_length)
    limits = {**LIMITS, "length": longest, "words": longest}
    graph, description = small_encoder_graph(encoder)
    backbone = encoder.backbone if isinstance(encoder, SmallTransformer) else None
    _trace(graph, description, folder / QUERY_ENCODER, limits, opset, precision, backbone)
    agreement = verify_query_encoder(student, encoder, folder / QUERY_ENCODER, iem, precision)
    if config.own_tokenizer:
        encoder.tokenizer.no_truncation()
        encoder.tokenizer.save(str(folder / QUERY_TOKENIZER))
    return SmallEncoderInfo(
        kind=config.kind,
        precision=precision,
        parameters=encoder.parameter_count,
        query_prompt=config.query_prompt,
        query_max_length=config.query_max_length,
        own_tokenizer=config.own_tokenizer,
        probe={"text": PROBE, "ids": encoder.tokenizer.encode(PROBE).ids} if config.own_tokenizer else {},
        agreement=agreement,
        provenance={**encoder.provenance, "layers": list(config.layers), "backbone": Path(config.backbone).name},
    )


def _trace(
    graph: nn.Module,
    description: ExporterConfig,
    path: Path,
    limits: dict[str, int],
    opset: int,
    precision: Precision,
    backbone: nn.Module | None,
) -> None:
    """Export one graph to `path`; `backbone` gives the optimizer its kind, without one nothing is fused."""
    logger.info("tracing %s", path.name)
    large = sum(p.numel() for p in graph.parameters()) * 4 > EXTERNAL_DATA_BYTES
    with _quiet():
        program = torch.onnx.export(
            graph,
            kwargs=description.generate_dummy_inputs(framework="pt"),
            dynamo=True,
            input_names=list(description.inputs),
            output_names=list(description.outputs),
            dynamic_shapes=dynamic_shapes(description, limits),
            opset_version=opset,
            verbose=False,
        )
        program.save(str(path), external_data=large)  # type: ignore[union-attr]  # torch types it optional
        if backbone is not None:
            _fuse(path, backbone, large)
        if precision == "fp16":
            _to_fp16(path, large)
        elif precision == "int8":
            _to_int8(path, large)
    left = [
        tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer if "lora_" in tensor.name
    ]
    if left:
        raise ExportError(f"{path.name} still holds LoRA weights, which should have been merged: {left[:3]}")


def _fuse(path: Path, backbone: nn.Module, large: bool) -> None:
    """Fuse norms and activations, in place."""
    shape: Any = backbone.config
    fused = optimizer.optimize_model(
        str(path),
        model_type=shape.model_type if shape.model_type in optimizer.MODEL_TYPES else "bert",
        num_heads=shape.num_attention_heads,
        hidden_size=shape.hidden_size,
        opt_level=0,
    )
    _save(fused.model, path, large)


def _to_fp16(path: Path, large: bool) -> None:
    """Weights and most of the arithmetic to float16, in place; inputs and outputs stay as they are."""
    model = float16.convert_float_to_float16(
        onnx.load(path), keep_io_types=True, disable_shape_infer=True, op_block_list=FP32_OPS
    )
    # A tensor that two fp32 nodes read is cast twice under one name, which is no valid model: keep one of the two.
    nodes = {tuple(node.output): node for node in model.graph.node}
    del model.graph.node[:]
    model.graph.node.extend(nodes.values())
    del model.graph.value_info[:]  # types from before the conversion
    _save(model, path, large)


def _to_int8(path: Path, large: bool) -> None:
    """Weights of matrix products and of tables to int8, in place; activations are quantized as they come."""
    model = onnx.load(path)
    quantize(model)
    _save(model, path, large)


def _save(model: onnx.ModelProto, path: Path, large: bool) -> None:
    """Write a graph whose weights are in memory, in place of what is there."""
    _remove(path)
    OnnxModel.save(model, str(path), save_as_external_data=large)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".onnx.data").unlink(missing_ok=True)


def _describe(
    student: Student, staging: Path, precision: Precision, opset: int, agreement: dict[str, float]
) -> ModelConfig:
    config = student.config
    return ModelConfig(
        embedding_dim=student.embedding_dim,
        feature_dim=student.feature_dim,
        precision=precision,
        fingerprint=_fingerprint(student, staging, FINGERPRINTED[precision][0]),
        query_prompt=config.query_prompt,
        document_prompt=config.document_prompt,
        query_max_length=config.query_max_length,
        document_max_length=config.document_max_length,
        tasks=list(TASKS),
        probe={"text": PROBE, "ids": student.tokenizer.encode(PROBE).ids},
        agreement=agreement,
        provenance={
            **student.provenance,
            "backbone": Path(config.backbone).name,
            "opset": opset,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                name: metadata.version(name) for name in ("d2llm", "torch", "transformers", "onnx", "onnxruntime")
            },
        },
    )


def _fingerprint(student: Student, model_folder: Path, precision: str) -> str:
    """The fingerprint of the passage side of `student` with the tokenizer of `model_folder`."""
    config = student.config
    tokenizer = sha256_of(model_folder / TOKENIZER)
    return fingerprint(
        student.weights_sha256(), tokenizer, config.document_prompt, config.document_max_length, precision
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter and the optimizer print and warn; errors still rise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
