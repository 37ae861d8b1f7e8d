"""A model folder: its files, how it is written (whole or not at all), how it is checked. Knows no runtime."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from d2llm.errors import MismatchError, ModelError

FORMAT_VERSION = 1
CONFIG = "d2llm.json"
TOKENIZER = "tokenizer.json"
ENCODER = "encoder.onnx"
IEM = "iem.onnx"
REQUIRED = (TOKENIZER, ENCODER, IEM)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The content of `d2llm.json`."""

    embedding_dim: int
    """E, the width of the recall vector."""
    feature_dim: int
    """H, the width of query and passage features."""
    precision: str
    """`fp32`, `fp16` or `int8`: of the encoder's weights."""
    fingerprint: str
    """Names the passage side. An index made with one fingerprint takes no vectors and no queries of another."""
    query_prompt: str = ""
    document_prompt: str = ""
    query_max_length: int = 64
    document_max_length: int = 256
    """In tokens, prompt and special tokens included."""
    tasks: list[str] = field(default_factory=list)
    probe: dict[str, Any] = field(default_factory=dict)
    """`{"text", "ids"}`: a sentence and its token ids, to notice a tokenizer that reads texts in another way."""
    agreement: dict[str, float] = field(default_factory=dict)
    """What the exporter measured against torch before it published the folder."""
    provenance: dict[str, Any] = field(default_factory=dict)
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


def fingerprint(weights_sha256: str, tokenizer_sha256: str, prompt: str, max_length: int, precision: str) -> str:
    """Name of a passage side: 16 hex digits over all that its vectors depend on (not the exporter's version)."""
    parts = json.dumps([weights_sha256, tokenizer_sha256, prompt, max_length, precision])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def written_atomically(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends well, and is removed otherwise.

    Raises:
        ModelError: `target` exists and is not an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists already. Choose another folder or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp makes it private
        staging.replace(target)  # atomic; takes the place of an empty folder
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already when all went well


def write_config(folder: Path, config: ModelConfig) -> None:
    """Write `d2llm.json` into `folder`, with the sha256 of every file that lies there."""
    hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != CONFIG}
    content = {**asdict(config), "files": hashes}
    (folder / CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(folder: Path) -> ModelConfig:
    """Read `d2llm.json` and check every file against it.

    Raises:
        ModelError: no such folder, no model, another format version, a missing or a changed file; names the file.
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
            raise ModelError(f"{path} has format {found}, this d2llm reads {FORMAT_VERSION}. Export the student again.")
        known = {entry.name for entry in fields(ModelConfig)}
        config = ModelConfig(**{key: value for key, value in content.items() if key in known})
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}). Export the student again.") from error
    for name in {*REQUIRED, *config.files}:
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{folder} is incomplete: {name} is missing. Export the student again.")
        digest, recorded = sha256_of(file), config.files.get(name)
        if digest != recorded:
            raise ModelError(f"{file} was changed: its sha256 is {digest}, {CONFIG} has {recorded}. Export again.")
    return config
