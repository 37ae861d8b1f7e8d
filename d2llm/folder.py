"""A model folder: its files, how it is written (whole or not at all), how it is checked. Knows no runtime."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from d2llm.errors import ArgumentError, MismatchError, ModelError
from d2llm.files import sha256_of, write_lines
from d2llm.settings import Count, Whole, build, check

FORMAT_VERSION = 1
CONFIG = "d2llm.json"
TOKENIZER = "tokenizer.json"
ENCODER = "encoder.onnx"
IEM = "iem.onnx"
REQUIRED = (TOKENIZER, ENCODER, IEM)
QUERY_ENCODER, QUERY_TOKENIZER = "query_encoder.onnx", "query_tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class SmallEncoderInfo:
    """What `d2llm.json` says of a small query encoder (KALE) that stands beside the student's own."""

    kind: str
    """`layers` (some of the student's), `model` (another backbone) or `static` (a table of tokens)."""
    precision: str
    parameters: int
    query_prompt: str = ""
    query_max_length: Count = 64
    own_tokenizer: bool = False
    """Whether it reads queries by `query_tokenizer.json`; words by name are read by `tokenizer.json` all the same."""
    probe: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    """What the exporter measured against torch."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was aligned, and how near it came to the student on queries it had not seen."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The content of `d2llm.json`."""

    embedding_dim: Count
    """E, the width of the recall vector."""
    feature_dim: Count
    """H, the width of query and passage features."""
    precision: str
    """`fp32`, `fp16` or `int8`: of the encoder's weights."""
    fingerprint: str
    """Names the passage side. An index made with one fingerprint takes no vectors and no queries of another."""
    query_prompt: str = ""
    document_prompt: str = ""
    query_max_length: Count = 64
    document_max_length: Count = 256
    """In tokens, prompt and special tokens included."""
    tasks: list[str] = field(default_factory=list)
    probe: dict[str, Any] = field(default_factory=dict)
    """`{"text", "ids"}`: a sentence and its token ids, to notice a tokenizer that reads texts in another way."""
    agreement: dict[str, float] = field(default_factory=dict)
    """What the exporter measured against torch before it published the folder."""
    provenance: dict[str, Any] = field(default_factory=dict)
    query_encoder: SmallEncoderInfo | None = None
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of every other file."""
    format: int = FORMAT_VERSION

    def require_fingerprint(self, found: str, where: str) -> None:
        """Raise `MismatchError` if `where` was made with another passage side than this model's."""
        if found != self.fingerprint:
            raise MismatchError(
                f"{where} was made with passage encoder {found}, this model is {self.fingerprint}. "
                "Search it with the model that made it, or index the corpus again into another collection."
            )

    def require_dimensions(self, embedding_dim: int, feature_dim: int, where: str) -> None:
        """Raise `MismatchError` if `where` holds vectors or features of other widths than this model's."""
        if (embedding_dim, feature_dim) != (self.embedding_dim, self.feature_dim):
            raise MismatchError(
                f"{where} holds vectors and features of {embedding_dim} and {feature_dim} dimensions, the model makes "
                f"{self.embedding_dim} and {self.feature_dim}"
            )


def fingerprint(weights_sha256: str, tokenizer_sha256: str, prompt: str, max_length: int, precision: str) -> str:
    """Name of a passage side: 16 hex digits over all that its vectors depend on (not the exporter's version)."""
    parts = json.dumps([weights_sha256, tokenizer_sha256, prompt, max_length, precision])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


@contextlib.contextmanager
def reading(folder: Path, name: str, remedy: str) -> Iterator[Path]:
    """Yield the path of a file or folder `name` in `folder`; whatever goes wrong in the block, it cannot be used.

    Raises:
        ModelError: it is missing, or an error in the block: names both, and ends in `remedy`.
    """
    path = folder / name
    if not path.exists():
        raise ModelError(f"{folder} is incomplete: {name} is missing. {remedy}")
    try:
        yield path
    except (PermissionError, MemoryError):  # the file may be sound
        raise
    except Exception as error:  # safetensors, tokenizers and peft raise kinds of their own for a damaged file
        raise ModelError(f"{folder} is damaged: {name} ({error}). {remedy}") from error


def write_config(folder: Path, config: ModelConfig, hashes: dict[str, str] | None = None) -> ModelConfig:
    """Write `d2llm.json` into `folder`, in one step, and return what it says.

    It names the model's files with their sha256: `hashes`, or those of every file that lies there.
    """
    if hashes is None:
        hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != CONFIG}
    config = replace(config, files=hashes)
    write_lines(folder / CONFIG, [json.dumps(asdict(config), indent=2, ensure_ascii=False)])
    return config


def read_config(folder: Path) -> ModelConfig:
    """Read `d2llm.json` and see that every file of the model is there. A file may be a link, as hub caches have them.

    Raises:
        ModelError: no such folder, no model, another format version, a key that is missing or of another type, a file
            that is missing or outside of the folder; names the file.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder. Make a model with: d2llm-export onnx STUDENT {folder}")
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(
            f"{folder} is no d2llm model: no {CONFIG} in it. Make one with: d2llm-export onnx STUDENT MODEL"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        if found != FORMAT_VERSION:
            raise ModelError(
                f"{path} has format {found!r}, this d2llm reads {FORMAT_VERSION}. Export the student again."
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
    """Raise a `ModelError` unless these files of the model are as they were exported.

    Of a graph that keeps its weights in a file beside it, that file is checked too.
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
    """What this version knows of `content`; a later one may have written more."""
    if not isinstance(content, dict):
        return content
    names = {entry.name for entry in fields(kind)}
    return {key: value for key, value in content.items() if key in names}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for one
        return False
