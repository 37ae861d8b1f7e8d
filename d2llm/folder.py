"""The files of a model folder, and how they are written, read and checked. Needs neither torch nor onnxruntime."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from d2llm.errors import ArgumentError, MismatchError, ModelError
from d2llm.files import sha256_of, write_lines
from d2llm.settings import Count, Whole, build, check
from d2llm.types import Scales, task_id

FORMAT_VERSION = 2
CONFIG = "d2llm.json"
TOKENIZER = "tokenizer.json"
ENCODER = "encoder.onnx"
IEM = "iem.onnx"
REQUIRED = (TOKENIZER, ENCODER, IEM)
QUERY_ENCODER, QUERY_TOKENIZER = "query_encoder.onnx", "query_tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class SmallEncoderInfo:
    """The entry of `d2llm.json` for a small query encoder (KALE), in a model folder that has one."""

    kind: str
    """`layers` (some layers of the student), `model` (another backbone) or `static` (a table of tokens)."""
    precision: str
    parameters: int
    query_prompt: str = ""
    query_max_length: Count = 64
    own_tokenizer: bool = False
    """Whether the encoder reads queries with `query_tokenizer.json`. Words always use `tokenizer.json`."""
    probe: dict[str, Any] = field(default_factory=dict)
    """A sentence and its token ids in the encoder's own tokenizer, as in `ModelConfig`."""
    agreement: dict[str, float] = field(default_factory=dict)
    """Differences between the graph and torch that the exporter measured."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the encoder was aligned, and how close it came to the student on held-out queries."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The content of `d2llm.json`."""

    embedding_dim: Count
    """E, the width of the recall vector."""
    feature_bytes: Count
    """P, the size of the packed features of a passage in bytes."""
    precision: str
    """Precision of the encoder's weights: `fp32`, `fp16` or `int8`."""
    fingerprint: str
    """Identifies the passage encoder (see the function `fingerprint`). An index refuses vectors and queries of a model
    with another fingerprint."""
    query_width: Count = 1
    """H, the number of columns of query features."""
    parts: list[str] = field(default_factory=list)
    """Names of the parts of the IEM's score, in the order of the graph."""
    scales: dict[str, list[float]] = field(default_factory=dict)
    """The weight of each part of the score, by branch."""
    query_prompt: str = ""
    document_prompt: str = ""
    query_max_length: Count = 64
    document_max_length: Count = 256
    """Length limits in tokens. Prompt and special tokens count."""
    tasks: list[str] = field(default_factory=list)
    """Names of the IEM's branches, in the order of the graph."""
    probe: dict[str, Any] = field(default_factory=dict)
    """`{"text", "ids"}`: a sentence and its token ids at export. They detect a tokenizer that changed since then."""
    agreement: dict[str, float] = field(default_factory=dict)
    """Differences between the graphs and torch that the exporter measured before it published the folder."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the model comes from: the student's provenance, its backbone, and the versions at export."""
    query_encoder: SmallEncoderInfo | None = None
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of every file of the model except `d2llm.json`, by file name."""
    format: int = FORMAT_VERSION

    def require_fingerprint(self, fingerprint: str, where: str) -> None:
        """Raise `MismatchError` if an index has another `fingerprint` than this model. `where` names the index."""
        if fingerprint != self.fingerprint:
            raise MismatchError(
                f"{where} was made with passage encoder {fingerprint}, this model is {self.fingerprint}. "
                "Search it with the model that made it, or index the corpus again into another collection."
            )

    def require_dimensions(self, embedding_dim: int, feature_bytes: int, where: str) -> None:
        """Raise `MismatchError` if the vectors or features of an index have another size than this model's. `where`
        names the index."""
        if (embedding_dim, feature_bytes) != (self.embedding_dim, self.feature_bytes):
            raise MismatchError(
                f"{where} holds vectors of {embedding_dim} numbers and features of {feature_bytes} bytes, the model "
                f"makes {self.embedding_dim} and {self.feature_bytes}: index the corpus again into another collection"
            )

    def scales_with(self, scales: Scales | None, where: str, remedy: str) -> dict[str, list[float]]:
        """Return the weight of each part of the score, by branch: those of `scales`, and the model's for the others.

        Raises:
            MismatchError: `scales` are of other parts than the model's; names `where` they come from, and the `remedy`.
            ArgumentError: there is no such branch, or a scale is not a finite number.
        """
        merged = dict(self.scales)
        for task, weights in (scales or {}).items():
            task_id(task)
            if sorted(weights) != sorted(self.parts):
                raise MismatchError(
                    f"{where} has scales of {', '.join(weights) or 'no part'}, the model's score has the parts "
                    f"{', '.join(self.parts)}: {remedy}"
                )
            if bad := next((name for name in weights if not _is_finite(weights[name])), None):
                raise ArgumentError(f"{where}: expected a finite number as the scale of {bad}, found {weights[bad]!r}")
            merged[task] = [float(weights[name]) for name in self.parts]
        return merged


def fingerprint(weights_sha256: str, tokenizer_sha256: str, prompt: str, max_length: int, precision: str) -> str:
    """Return the fingerprint of a passage encoder: 16 hex digits over everything that its vectors depend on, except the
    exporter's version."""
    parts = json.dumps([weights_sha256, tokenizer_sha256, prompt, max_length, precision])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


@contextlib.contextmanager
def reading(folder: Path, name: str, remedy: str) -> Iterator[Path]:
    """Yield the path of a file or folder `name` in `folder`, and turn errors of the block that reads it into a
    `ModelError`.

    Raises:
        ModelError: the file is missing, or the block raised an error; names the file, and ends in `remedy`.
    """
    path = folder / name
    if not path.exists():
        raise ModelError(f"{folder} is incomplete: {name} is missing. {remedy}")
    try:
        yield path
    except (PermissionError, MemoryError):  # the file may be sound
        raise
    except Exception as error:  # safetensors, tokenizers and peft have their own error classes for a damaged file
        reason = str(error) or type(error).__name__  # torch raises an EOFError without a word
        raise ModelError(f"{folder} is damaged: {name} ({reason}). {remedy}") from error


def write_config(folder: Path, config: ModelConfig, hashes: dict[str, str] | None = None) -> ModelConfig:
    """Write `d2llm.json` into `folder` atomically, and return the config with its `files` set.

    `files` become `hashes`, the sha256 of each file by name. None computes them for every file in `folder`.
    """
    if hashes is None:
        hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != CONFIG}
    config = replace(config, files=hashes)
    write_lines(folder / CONFIG, [json.dumps(asdict(config), indent=2, ensure_ascii=False)])
    return config


def read_config(folder: Path) -> ModelConfig:
    """Read `d2llm.json` and check that every file of the model exists. Symbolic links are accepted, as hub caches use
    them.

    Raises:
        ModelError: the folder does not exist, is not a model, has another format version, lacks a file, or its config
            has a missing key, a value of the wrong type or a file outside of the folder; names the file.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder. Make a model with: d2llm-export onnx STUDENT {folder}")
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a d2llm model: it has no {CONFIG}. Make one with: d2llm-export onnx STUDENT MODEL"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
        if version != FORMAT_VERSION:
            raise ModelError(
                f"{path} has format {version!r}, this d2llm reads {FORMAT_VERSION}. Export the student again; train "
                "a student of an earlier d2llm again, or make it again with d2llm init."
            )
        config = _parsed(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}). Export the student again.") from error
    required = [*REQUIRED, *config.files]
    if config.query_encoder is not None:
        required += [QUERY_ENCODER, QUERY_TOKENIZER] if config.query_encoder.own_tokenizer else [QUERY_ENCODER]
    for name in required:
        if not _is_file(folder / name):
            raise ModelError(f"{folder} is incomplete: {name} is missing. Export the student again.")
    return config


def check_files(folder: Path, config: ModelConfig, names: Iterable[str]) -> None:
    """Check that the files `names` of a model, and the separate weight files of graphs, are as they were exported.

    Raises:
        ModelError: a file was changed; names it and both digests.
    """
    for name in names:
        for file in (name, f"{name}.data"):
            recorded = config.files.get(file)
            if recorded is None and file != name:
                continue
            digest = sha256_of(folder / file)
            if digest != recorded:
                raise ModelError(
                    f"{folder / file} was changed: its sha256 is {digest}, {CONFIG} has {recorded}. Export again."
                )


@dataclass(frozen=True)
class _Probe:
    text: str
    ids: list[Whole]


def _parsed(content: dict[str, Any]) -> ModelConfig:
    small = content.get("query_encoder")
    if small is not None:
        small = build(SmallEncoderInfo, _known(small, SmallEncoderInfo), "query_encoder.")
    config = build(ModelConfig, _known({**content, "query_encoder": small}, ModelConfig))
    check(_known(config.probe, _Probe), _Probe, "probe.")
    if config.query_encoder is not None and config.query_encoder.own_tokenizer:
        check(_known(config.query_encoder.probe, _Probe), _Probe, "query_encoder.probe.")
    outside = next((name for name in config.files if name in ("", "..") or name != Path(name).name), None)
    if outside is not None:
        raise ArgumentError(f"files: expected names of files in the folder, found {outside!r}")
    return config


def _known(content: Any, kind: type) -> Any:
    """Return `content` without the keys that this version does not know: a later version may have written them."""
    if not isinstance(content, dict):
        return content
    names = {entry.name for entry in fields(kind)}
    return {key: value for key, value in content.items() if key in names}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False
