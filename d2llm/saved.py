"""What students and small query encoders have in common as saved folders: descriptions, weights and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
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
class Description:
    """A JSON file with a config and a provenance."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    backbone: str = ""
    """The `backbone_digest` of the backbone that the folder does not hold itself."""


def read_description(path: Path, kind: type[T], old_names: Mapping[str, str] | None = None) -> tuple[T, Description]:
    """Read a JSON file with a config and a provenance; return the config as the dataclass `kind`, and all as it stands.

    `old_names` renames keys that the config had in earlier versions: `{old: new}`.

    Raises:
        ValueError: the file is not JSON; a key is unknown or missing; a value has the wrong type or is out of range.
    """
    content = build(Description, json.loads(path.read_text(encoding="utf-8")))
    config = {(old_names or {}).get(key, key): value for key, value in content.config.items()}
    return build(kind, config, "config."), content


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

    scaling = {_plain(name): m.scaling["default"] for name, m in backbone.named_modules() if isinstance(m, LoraLayer)}
    weights = {_plain(name): weight for name, weight in backbone.state_dict().items()}
    return weights_sha256(weights, json.dumps(scaling, sort_keys=True))


def _plain(name: str) -> str:
    """The name without what peft adds to the backbone's names."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")


def backbone_digest(backbone: Backbone) -> str:
    """The `sampled_digest` of a backbone without its LoRA adapters."""
    return sampled_digest((_plain(name), weight) for name, weight in backbone.named_parameters() if "lora_" not in name)


def sampled_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A digest (32 hex digits) of each weight's name, its shape and up to 64 of its values, rounded to bfloat16.

    It is the same in any precision, and fast for any size.
    """
    digest = hashlib.sha256()
    for name, value in sorted(weights):
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)][:64].bfloat16().float().cpu()
        digest.update(f"{name} {tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def weights_sha256(weights: Mapping[str, Tensor], before: str = "") -> str:
    """Return the digest (64 hex digits) of `before` and of the weights' names, shapes and float32 values."""
    digest = hashlib.sha256(before.encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + str(tuple(weight.shape)).encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
