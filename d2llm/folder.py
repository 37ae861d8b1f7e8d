"""A model folder: its files, how it is written (whole or not at all), how it is checked. Knows no runtime."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from d2llm.errors import MismatchError, ModelError

FORMAT_VERSION = 1
CONFIG = "d2llm.json"
TOKENIZER = "tokenizer.json"
ENCODER = "encoder.onnx"
IEM = "iem.onnx"
REQUIRED = (TOKENIZER, ENCODER, IEM)
QUERY_ENCODER, QUERY_TOKENIZER = "query_encoder.onnx", "query_tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class SmallQueryEncoder:
    """What `d2llm.json` says of a small query encoder (KALE) that stands beside the student's own."""

    kind: str
    """`layers` (some of the student's), `model` (another backbone) or `static` (a table of tokens)."""
    precision: str
    parameters: int
    query_prompt: str = ""
    query_max_length: int = 64
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
    query_encoder: SmallQueryEncoder | None = None
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


def write_config(folder: Path, config: ModelConfig, hashes: dict[str, str] | None = None) -> ModelConfig:
    """Write `d2llm.json` into `folder`, in one step, and return what it says.

    It names the model's files with their sha256: `hashes`, or those of every file that lies there.
    """
    if hashes is None:
        hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != CONFIG}
    config = replace(config, files=hashes)
    staging = folder / f".{CONFIG}"
    staging.write_text(json.dumps(asdict(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    staging.replace(folder / CONFIG)
    return config


def read_config(folder: Path) -> ModelConfig:
    """Read `d2llm.json` and see that every file of the model is there.

    Raises:
        ModelError: no such folder, no model, another format version, a missing file; names the file.
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
        small = content.get("query_encoder")
        content["query_encoder"] = None if small is None else SmallQueryEncoder(**_known(small, SmallQueryEncoder))
        config = ModelConfig(**_known(content, ModelConfig))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged ({error}). Export the student again.") from error
    for name in {*REQUIRED, *config.files}:
        if not (folder / name).is_file():
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


def _known(content: dict[str, Any], kind: type) -> dict[str, Any]:
    """What this version knows of `content`; a later one may have written more."""
    names = {entry.name for entry in fields(kind)}
    return {key: value for key, value in content.items() if key in names}
