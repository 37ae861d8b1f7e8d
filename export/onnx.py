"""Export a student to a model folder: trace the graphs, optimize and convert them, verify them, publish the folder."""

from __future__ import annotations

import contextlib
import io
import logging
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
from d2llm.files import folder_beside, new_folder, set_ordinary_permissions, sha256_of
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
from d2llm.saved import earlier_digests
from d2llm.small_encoder import SmallEncoder, SmallTransformer
from d2llm.student import Student
from d2llm.types import TASKS, StrPath

from .attention import TRANSLATIONS
from .graphs import dynamic_shapes, encoder_graph, iem_graph, small_encoder_graph
from .int8 import quantize
from .verify import TEXTS, verify, verify_query_encoder

logger = logging.getLogger(__name__)

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
MIN_OPSET, DEFAULT_OPSET = 18, 18
EXTERNAL_DATA_BYTES = 2**31 - 2**20
"""Size above which the weights of a graph go into a separate data file: protobuf is limited to 2 GiB."""
FP32_OPS = [
    *(
        "LayerNormalization",
        "SkipLayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    ),
    *("Pow", "ReduceMean", "ReduceL2", "Sqrt", "Reciprocal", "Softmax"),
]
"""Operators that stay in fp32 in an fp16 graph. Norms and their parts would overflow or lose precision in fp16."""
FINGERPRINTED = {"fp32": ["fp32"], "fp16": ["fp16"], "int8": ["int8-rows", "int8"]}
"""Names of each precision in fingerprints: the current name first, then earlier ones. Earlier int8 graphs had one range
for all activations of a batch. Their vectors differ too much from current ones to share a collection."""
LIMITS = {"batch": 2**16, "queries": 2**16, "candidates": 2**24}
"""Largest size of each dynamic axis. The largest length of a text depends on the model."""
PROBE = " ".join(TEXTS[:6])
"""The sentence whose token ids a model folder stores, to detect a tokenizer that changed."""


def export(
    student_folder: StrPath | Student,
    target: StrPath,
    *,
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
    query_encoder: StrPath | None = None,
    query_precision: Precision | None = None,
) -> ModelConfig:
    """Export a student to the new model folder `target`, and return the model's config.

    `student_folder` may also be a student in memory, such as `d2llm.embedder.create_student` makes; its LoRA adapters
    are merged in place. The export optimizes the ONNX graphs and verifies them against torch. `precision` is the
    precision of the encoder's weights; the small IEM stays in fp32. `query_encoder` is a folder of `d2llm kale`, to add
    to the model in `query_precision` (default: `precision`). `target` appears atomically: a failed or interrupted
    export leaves nothing. One that is killed with SIGKILL leaves a hidden folder, which the next one removes.

    Example:
        >>> from d2llm.export import export
        >>> student.save(tmp_path / "student")
        >>> config = export(tmp_path / "student", tmp_path / "model")
        >>> config.precision
        'fp32'
        >>> d2llm.load(tmp_path / "model").config.fingerprint == config.fingerprint
        True

    Raises:
        ModelError: the student folder or the query encoder is missing or damaged.
        OutputExistsError: `target` exists.
        MismatchError: the query encoder was aligned to another student.
        ExportError: a graph does not compute what torch computes, or fp16 or int8 is below its floor.
        ArgumentError: the opset is below 18, the lowest that the exporter writes.
    """
    if opset < MIN_OPSET:
        raise ArgumentError(f"opset {opset} is too low: the exporter writes {MIN_OPSET} and above")
    with new_folder(Path(target)) as staging:
        student = _load(student_folder)
        small = None if query_encoder is None else load_query_encoder(query_encoder, student, _place(student_folder))
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
    student_folder: StrPath | Student,
    model_folder: StrPath,
    query_encoder: StrPath,
    *,
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
) -> ModelConfig:
    """Add a small query encoder to an exported model folder, or replace the one it has; return the new config.

    Model and query encoder must come from the student in `student_folder`, which may also be a student in memory. The
    passage encoder and its fingerprint stay the same, so collections stay valid. If the process is interrupted, the
    folder is still a valid model, with or without a small query encoder.

    Example:
        >>> from d2llm.export import add_query_encoder, export
        >>> from d2llm.small_encoder import from_tokens
        >>> student.save(tmp_path / "student")
        >>> model = export(tmp_path / "student", tmp_path / "model")
        >>> from_tokens(student).save(tmp_path / "small")
        >>> config = add_query_encoder(tmp_path / "student", tmp_path / "model", tmp_path / "small")
        >>> config.query_encoder.kind, config.fingerprint == model.fingerprint
        ('static', True)

    Raises:
        ModelError: the student, the query encoder or the model is missing or damaged.
        MismatchError: the model or the query encoder belongs to another student; names both.
        ExportError: the graph does not compute what torch computes, or fp16 or int8 is below its floor.
    """
    model_folder = Path(model_folder)
    config = read_config(model_folder)
    student, place = _load(student_folder), _place(student_folder)
    names = FINGERPRINTED[config.precision]
    if not any(_fingerprint(student, model_folder, name) == config.fingerprint for name in names):
        expected = _fingerprint(student, model_folder, names[0])
        raise MismatchError(
            f"{model_folder} has the passage encoder {config.fingerprint}, {place} would have {expected}: the "
            "model was exported from another student. Give the student that it was exported from."
            f"{earlier_digests(student.config.tuning)}"
        )
    small = load_query_encoder(query_encoder, student, place)
    with folder_beside(model_folder) as staging:
        entry = _write_query_encoder(student, small, staging, model_folder / IEM, precision, opset)
        old_names = [name for name in config.files if name.startswith((QUERY_ENCODER, QUERY_TOKENIZER))]
        if old_names:  # first remove them from d2llm.json: the model consists of the files that it lists
            other_files = {name: digest for name, digest in config.files.items() if name not in old_names}
            config = write_config(model_folder, replace(config, query_encoder=None), other_files)
        for name in old_names:
            (model_folder / name).unlink()
        set_ordinary_permissions(staging)
        new_files = sorted(staging.iterdir())
        hashes = {path.name: sha256_of(path) for path in new_files}
        for path in new_files:
            path.replace(model_folder / path.name)
        return write_config(model_folder, replace(config, query_encoder=entry), {**config.files, **hashes})


def _load(source: StrPath | Student) -> Student:
    """Return a student for export: LoRA merged, in eval mode."""
    student = source if isinstance(source, Student) else Student.load(source)
    student.merge_lora()
    return student.eval()


def _place(source: StrPath | Student) -> StrPath:
    """Return the name of a student for messages: its folder, or the embedder that it was made of."""
    return str(source.provenance.get("embedder", "STUDENT")) if isinstance(source, Student) else source


def load_query_encoder(folder: StrPath, student: Student, place: StrPath) -> SmallEncoder:
    """Read a small query encoder, and check that it was aligned to `student`. `place` names it in the message.

    Raises:
        ModelError: the folder is not a small query encoder, or is incomplete or damaged.
        MismatchError: the encoder was aligned to another student; names both.
    """
    encoder = SmallEncoder.load(folder)
    encoder.config.require_student(student, folder, place)
    return encoder


def _write_query_encoder(
    student: Student, encoder: SmallEncoder, folder: Path, iem: Path, precision: Precision, opset: int
) -> SmallEncoderInfo:
    """Trace and verify a small query encoder into `folder`; return its entry in `d2llm.json`."""
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
    """Export one graph to `path`. Operators are fused as the architecture of `backbone` allows; None fuses nothing."""
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
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
        program.save(str(path), external_data=large)  # type: ignore[union-attr]  # None only with `dynamo=False`
        if backbone is not None:
            _fuse(path, backbone, large)
        if precision == "fp16":
            _to_fp16(path, large)
        elif precision == "int8":
            _to_int8(path, large)
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    lora_names = [tensor.name for tensor in tensors if "lora_" in tensor.name]
    if lora_names:
        raise ExportError(f"{path.name} still holds LoRA weights, which should have been merged: {lora_names[:3]}")


def _fuse(path: Path, backbone: nn.Module, large: bool) -> None:
    """Fuse the norms and activations of a graph, in place."""
    config: Any = backbone.config
    fused = optimizer.optimize_model(
        str(path),
        model_type=config.model_type if config.model_type in optimizer.MODEL_TYPES else "bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
    )
    _save(fused.model, path, large)


def _to_fp16(path: Path, large: bool) -> None:
    """Convert weights and most operators of a graph to float16, in place. Inputs and outputs keep their types."""
    model = float16.convert_float_to_float16(
        onnx.load(path), keep_io_types=True, disable_shape_infer=True, op_block_list=FP32_OPS
    )
    # If two fp32 nodes read one tensor, the converter adds two casts with the same output name, which ONNX forbids.
    # Keep one of them.
    nodes = {tuple(node.output): node for node in model.graph.node}
    del model.graph.node[:]
    model.graph.node.extend(nodes.values())
    del model.graph.value_info[:]  # the types before the conversion
    _save(model, path, large)


def _to_int8(path: Path, large: bool) -> None:
    """Convert the matrices and tables of a graph to int8, in place. The graph quantizes activations at run time."""
    model = onnx.load(path)
    quantize(model)
    _save(model, path, large)


def _save(model: onnx.ModelProto, path: Path, large: bool) -> None:
    """Write a graph with its weights to `path`, replacing the graph and the data file there."""
    _remove(path)
    OnnxModel.save(model, str(path), save_as_external_data=large)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".onnx.data").unlink(missing_ok=True)


def _describe(
    student: Student, staging: Path, precision: Precision, opset: int, agreement: dict[str, float]
) -> ModelConfig:
    """Return the config of a model folder, without its files and its small query encoder."""
    config = student.config
    return ModelConfig(
        embedding_dim=student.embedding_dim,
        query_width=student.iem.layouts[0].width,
        feature_bytes=student.iem.layouts[1].bytes,
        parts=list(student.iem.part_names),
        scales=_scales(student),
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


def _scales(student: Student) -> dict[str, list[float]]:
    """Return the weight of each part of the score, by branch."""
    weights_TC = student.iem.weights(torch.arange(len(TASKS)))
    return {task: [round(weight, 6) for weight in row] for task, row in zip(TASKS, weights_TC.tolist(), strict=True)}


def _fingerprint(student: Student, model_folder: Path, precision: str) -> str:
    """Return the fingerprint of the passage encoder of `student` with the tokenizer of `model_folder`."""
    config = student.config
    tokenizer = sha256_of(model_folder / TOKENIZER)
    return fingerprint(
        student.weights_sha256(), tokenizer, config.document_prompt, config.document_max_length, precision
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress output, log messages and warnings of the exporter and the optimizer. Errors pass through."""
    previous_level = logging.root.manager.disable
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
        logging.disable(previous_level)
