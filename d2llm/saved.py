"""What students and small query encoders have in common as saved folders: descriptions, weights and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor, nn

from d2llm.backbone import Backbone, require_same
from d2llm.folder import reading
from d2llm.settings import build

T = TypeVar("T")

NEW_WEIGHTS = ("words.", "token_vectors.", "iem.scales")
"""Prefixes of the names of weights that the IEM of earlier versions did not have."""


def is_of_earlier_form(folder: Path, file: str, old_key: str, weights: str, remedy: str) -> bool:
    """Whether an earlier version made a folder, for an IEM of another form.

    Then the config in `file` has the key `old_key`, or `weights` have none of the names `NEW_WEIGHTS`.

    Raises:
        ModelError: one of the two files is missing or damaged; names it, and ends in `remedy`.
    """
    with reading(folder, file, remedy) as path:
        content = json.loads(path.read_text(encoding="utf-8"))
        earlier = isinstance(content, dict) and old_key in content.get("config", ())
    with reading(folder, weights, remedy) as path, safe_open(path, "pt") as stored:
        return earlier or not any(name.startswith(NEW_WEIGHTS) for name in stored.keys())


@dataclass(frozen=True)
class _Description:
    config: dict[str, Any]
    provenance: dict[str, Any]


def read_description(path: Path, kind: type[T], old_names: Mapping[str, str] | None = None) -> tuple[T, dict[str, Any]]:
    """Read a JSON file with a config and a provenance; return the config as the dataclass `kind`, and the provenance.

    `old_names` renames keys that the config had in earlier versions: `{old: new}`.

    Raises:
        ValueError: the file is not JSON; a key is unknown or missing; a value has the wrong type or is out of range.
    """
    content = build(_Description, json.loads(path.read_text(encoding="utf-8")))
    config = {(old_names or {}).get(key, key): value for key, value in content.config.items()}
    return build(kind, config, "config."), content.provenance


def load_head_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load every weight of `module` except the backbone's from `weights`.

    Raises:
        ValueError: `weights` lacks a name or has an unknown one; names it.
        RuntimeError: a weight has the wrong shape.
    """
    expected = {name for name in module.state_dict() if not name.startswith("backbone.")}
    require_same(weights.keys(), expected)
    module.load_state_dict(weights, strict=False)


def earlier_digests(tuning: str) -> str:
    """Return a hint for the message that two digests differ: an earlier version may have made the other digest. Empty
    unless the `tuning` of the student is `lora`."""
    if tuning != "lora":
        return ""
    return (
        " (An earlier version computed the digests of students with LoRA from merged weights. If it made one of these, "
        "make that one again.)"
    )


def adapted_sha256(backbone: Backbone) -> str:
    """Return the digest (64 hex digits) of a backbone with LoRA adapters that are not merged yet."""
    from peft.tuners.lora import LoraLayer

    def plain(name: str) -> str:  # remove what peft adds to the backbone's names
        return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")

    scaling = {plain(name): m.scaling["default"] for name, m in backbone.named_modules() if isinstance(m, LoraLayer)}
    weights = {plain(name): weight for name, weight in backbone.state_dict().items()}
    return weights_sha256(weights, json.dumps(scaling, sort_keys=True))


def weights_sha256(weights: Mapping[str, Tensor], before: str = "") -> str:
    """Return the digest (64 hex digits) of `before` and of the weights' names, shapes and float32 values."""
    digest = hashlib.sha256(before.encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + str(tuple(weight.shape)).encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
