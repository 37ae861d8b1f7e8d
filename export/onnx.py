"""Export: torch's dynamo exporter, onnxruntime's own optimizer, fp16 and int8, verification, one atomic folder."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import float16, optimizer
from optimum.exporters.base import ExporterConfig
from torch import nn

from d2llm.folder import ENCODER, IEM, TOKENIZER, ModelConfig, fingerprint, sha256_of, write_config, written_atomically
from d2llm.modeling import Student
from d2llm.types import TASKS

from .graphs import dynamic_shapes, encoder_graph, iem_graph
from .verify import TEXTS, ExportError, verify

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
PROBE = " ".join(TEXTS[:6])


def export(
    student_folder: Path, target: Path, *, precision: Precision = "fp32", opset: int = DEFAULT_OPSET
) -> ModelConfig:
    """Write the model folder `target` from a student: LoRA merged, graphs optimised, verified against torch.

    `precision` is the encoder's; the IEM is small and stays in fp32. Whole or not at all: a failed or interrupted
    export leaves nothing at `target`.

    Raises:
        ModelError: no student there, or `target` exists.
        ExportError: the graphs do not compute what the student computes, or fp16/int8 lose more than their floor.
        ValueError: an opset below 18, the lowest that the exporter writes.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"opset {opset} is too low: the exporter writes {MIN_OPSET} and above")
    with written_atomically(target) as staging:
        student = Student.load(student_folder)
        student.merge_lora()
        student.eval()
        longest = max(student.config.query_max_length, student.config.document_max_length)
        limits = {"batch": 2**16, "length": 2 * longest, "queries": 2**16, "candidates": 2**24}
        graph, description = encoder_graph(student)
        _trace(graph, description, staging / ENCODER, limits, opset, precision, student)
        graph, description = iem_graph(student)
        _trace(graph, description, staging / IEM, limits, opset, "fp32", None)
        logger.info("verifying against torch")
        agreement = verify(student, staging, precision)
        student.tokenizer.no_truncation()
        student.tokenizer.save(str(staging / TOKENIZER))
        config = _describe(student, staging, precision, opset, agreement)
        write_config(staging, config)
    return config


def _trace(
    graph: nn.Module,
    description: ExporterConfig,
    path: Path,
    limits: dict[str, int],
    opset: int,
    precision: Precision,
    student: Student | None,
) -> None:
    """Export one graph to `path`; `student` gives the optimizer the backbone's kind, None skips it."""
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
        if student is not None:
            _optimise(path, student, precision, large)
    left = [
        tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer if "lora_" in tensor.name
    ]
    if left:
        raise ExportError(f"{path.name} still holds LoRA weights, which should have been merged: {left[:3]}")


def _optimise(path: Path, student: Student, precision: Precision, large: bool) -> None:
    """Fuse norms and activations, then convert to `precision`, in place."""
    backbone: Any = student.backbone.config
    kind = backbone.model_type if backbone.model_type in optimizer.MODEL_TYPES else "bert"
    fused = optimizer.optimize_model(
        str(path),
        model_type=kind,
        num_heads=backbone.num_attention_heads,
        hidden_size=backbone.hidden_size,
        opt_level=0,
    )
    if precision == "fp16":
        fused.model = float16.convert_float_to_float16(
            fused.model, keep_io_types=True, disable_shape_infer=True, op_block_list=FP32_OPS
        )
        # A tensor that two fp32 nodes read is cast twice under one name, which is no valid model: keep one of the two.
        nodes = {tuple(node.output): node for node in fused.model.graph.node}
        del fused.model.graph.node[:]
        fused.model.graph.node.extend(nodes.values())
    path.unlink()
    path.with_suffix(".onnx.data").unlink(missing_ok=True)
    del fused.model.graph.value_info[:]  # shapes from before the fusions, which the quantizer would take for true
    whole = path.with_suffix(".fp32.onnx") if precision == "int8" else path
    fused.save_model_to_file(str(whole), use_external_data_format=large)
    if precision == "int8":
        quantize_dynamic(
            whole,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=large,
            # onnx infers no types behind onnxruntime's own fused nodes; what is multiplied here is float throughout.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        for leftover in path.parent.glob(whole.name + "*"):
            leftover.unlink()


def _describe(
    student: Student, staging: Path, precision: Precision, opset: int, agreement: dict[str, float]
) -> ModelConfig:
    config = student.config
    return ModelConfig(
        embedding_dim=student.embedding_dim,
        feature_dim=student.feature_dim,
        precision=precision,
        fingerprint=fingerprint(
            student.weights_sha256(),
            sha256_of(staging / TOKENIZER),
            config.document_prompt,
            config.document_max_length,
            precision,
        ),
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
