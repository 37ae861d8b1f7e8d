"""Load and run a pretrained backbone in torch, with its LoRA adapters and its tokenizer.

Dimensions: B texts of a batch, L tokens, D backbone width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

from d2llm.errors import ArgumentError, ModelError
from d2llm.folder import TOKENIZER, reading
from d2llm.pretrained import load_chat_tokenizer, load_pretrained

# peft reads this attribute of transformers with all adapters, and users can do nothing about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

Backbone: TypeAlias = Any
"""A model of transformers, bare or with LoRA adapters of peft: a `torch.nn.Module` whose further attributes (`config`,
`save_pretrained`, `merge_and_unload`) torch's type does not have, and the two libraries have no types."""

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
"""Names that backbones give the embedding table of their learned positions."""


def load_adapters(model: Backbone, folder: Path) -> Backbone:
    """Add the LoRA adapters of a peft folder to `model`, in place and trainable; return the adapted model.

    Raises:
        ValueError: the folder lacks a weight or has an unknown one; names it. A damaged file raises peft's errors.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    absolute = str(folder.resolve())  # peft could mistake a relative path for a hub id
    adapted: nn.Module = PeftModel.from_pretrained(model, absolute, is_trainable=True)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    require_same(load_peft_weights(absolute, device="cpu").keys(), expected.keys())  # peft only warns
    return adapted


def require_same(names: Set[str], expected: Set[str]) -> None:
    """Check that a file has the expected weights, by their names.

    Raises:
        ValueError: an expected name is missing, or a name is unknown; names one and counts them.
    """
    for problem, wrong in (("is missing", expected - names), ("belongs to another model", names - expected)):
        if wrong:
            raise ValueError(f"{min(wrong)} {problem}, one of {len(wrong)} such weights")


def is_rotary(backbone: Backbone) -> bool:
    """Whether the backbone has rotary positions (RoPE), which `token_states` has to pass to it."""
    return any(hasattr(backbone.config, name) for name in ("rope_parameters", "rope_theta"))


def positions(backbone: Backbone) -> int | None:
    """Return the largest number of tokens that a backbone can read, the usable rows of its table of learned positions.

    None without such a table: rotary and relative positions have no limit.
    """
    config: Any = backbone.config
    for name, table in backbone.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            first = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa starts after its padding row
            return min(table.num_embeddings - first, int(config.max_position_embeddings))
    return None


def check_length(key: str, length: int, tokenizer: Tokenizer, prompt: str, backbone: Backbone) -> None:
    """Check that a limit of `length` tokens leaves room for text after the prompt, and that the backbone can read it.

    Raises:
        ArgumentError: the limit is too low or too high; names the key, the limit and the bound.
    """
    tokenizer.no_truncation()
    prompt_length, readable = len(tokenizer.encode(prompt).ids), positions(backbone)
    if length <= prompt_length:
        raise ArgumentError(f"{key} = {length} leaves no room for text: prompt and special tokens take {prompt_length}")
    if readable is not None and length > readable:
        raise ArgumentError(f"{key} = {length} is more than the {readable} tokens that the backbone can read")


def token_states(backbone: Backbone, rotary: bool, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """Return a backbone's last hidden states [B, L, D].

    For a rotary backbone, positions start at the first unmasked token, so left padding does not change the states.
    """
    inputs = {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL}
    if rotary:
        inputs["position_ids"] = (attention_mask_BL.cumsum(-1) - 1).clamp(min=0)
    states: Tensor = backbone(**inputs).last_hidden_state
    return states


def pad(
    rows: Iterable[Sequence[int]], device: torch.device | str = "cpu", side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Return the token ids and the attention mask [B, L] int64 of a batch, padded with zeros on `side`."""
    rows = list(rows)
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, columns], mask[index, columns] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


def layer_list(backbone: Backbone) -> tuple[nn.Module, str]:
    """Return the module that holds a backbone's list of layers, and the name of its attribute.

    Raises:
        ModelError: the backbone does not keep its layers in a list.
    """
    count = backbone.config.num_hidden_layers
    for module in backbone.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise ModelError(
        f"{type(backbone).__name__} does not keep its {count} layers in a list, so layers cannot be chosen from it: "
        "make a small encoder from another model or from tokens"
    )


def spread(count: int, total: int) -> tuple[int, ...]:
    """Choose `count` of `total` layers, evenly spaced from the first to the last. For `count=1`, choose the last layer,
    which measured better than the first.

    Raises:
        ArgumentError: `count` is below 1 or above `total`.
    """
    if not 1 <= count <= total:
        raise ArgumentError(f"{count} layers: the student has {total}, choose from 1 to {total}")
    if count == 1:
        return (total - 1,)
    return tuple(round(index * (total - 1) / (count - 1)) for index in range(count))


@torch.no_grad()
def load_backbone(name: str) -> Backbone:
    """Load the bare transformer of a hub id, a folder or a GGUF file in float32. Each load gives the same weights.

    Raises:
        ModelError: the backbone cannot be loaded, or its file lacks weights; names them.
        MissingExtraError: a GGUF file needs the library `gguf`.
    """
    backbone, absent = load_pretrained(AutoModel, name, role="backbone")
    # transformers fills missing weights with random numbers. Many models lack the pooler, which d2llm never uses: it
    # is set to zero, so that all loads are equal. Any other missing weight is an error.
    missing = {key: weight for key, weight in backbone.state_dict().items() if key in absent}
    needed = sorted(key for key in missing if not key.startswith("pooler."))
    if needed:
        raise ModelError(f"backbone {name!r} has no weights for {', '.join(needed[:3])} ({len(needed)} missing)")
    for weight in missing.values():
        weight.zero_()
    loaded: nn.Module = backbone
    return loaded


def load_tokenizer(name: str) -> Tokenizer:
    """Load the fast tokenizer of a hub id, a folder or a GGUF file, which the runtime uses without transformers.

    It is the folder's `tokenizer.json` if there is one, else the conversion that transformers makes. Padding and
    truncation are off.

    Raises:
        ModelError: the tokenizer cannot be loaded, or is not a fast tokenizer.
        MissingExtraError: a GGUF file needs the library `gguf`.
    """
    path = Path(name) / TOKENIZER
    if path.is_file():
        with reading(path.parent, path.name, "Download the model again."):
            tokenizer = Tokenizer.from_file(str(path))
    else:
        fast = load_chat_tokenizer(name, role="backbone")
        # Without a vocabulary file, transformers makes a tokenizer with special tokens only: every word is unknown.
        if not getattr(fast, "is_fast", False) or len(fast) <= len(fast.all_special_tokens):
            raise ModelError(
                f"backbone {name!r} has no fast tokenizer: the runtime needs a {TOKENIZER}. Choose a backbone with one"
            )
        tokenizer = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
