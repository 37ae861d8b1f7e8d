"""The backbone of a student: loading it, its adapters and its tokenizer, and running it. In torch.

B batch, L tokens, D backbone width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from d2llm.errors import ArgumentError, ModelError
from d2llm.folder import TOKENIZER

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
"""How backbones name the table of their learned positions."""


def load_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """Put the LoRA adapters of a peft folder onto a model, in place, to be trained on.

    Raises:
        ValueError: a weight is missing or one too many; names it. A damaged file raises errors of peft's readers.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    place = str(folder.resolve())  # a relative one could be taken for a name on the hub
    adapted: nn.Module = PeftModel.from_pretrained(model, place, is_trainable=True)
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    require_same(load_peft_weights(place, device="cpu").keys(), own.keys())  # peft only warns
    return adapted


def require_same(found: Set[str], expected: Set[str]) -> None:
    """Raise a `ValueError` that names a weight which only one of the two sets of names has."""
    for problem, names in (("is missing", expected - found), ("belongs to something else", found - expected)):
        if names:
            raise ValueError(f"{min(names)} {problem}, one of {len(names)} such weights")


def is_rotary(backbone: nn.Module) -> bool:
    """Whether positions are rotations, so that `token_states` has to count them."""
    return any(hasattr(backbone.config, name) for name in ("rope_parameters", "rope_theta"))


def positions(backbone: nn.Module) -> int | None:
    """How many tokens a backbone can read: as many as its table of learned positions has rows for. None without such a
    table: rotations and relative distances have no end."""
    config: Any = backbone.config
    for name, table in backbone.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            first = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa's count from after its padding
            return min(table.num_embeddings - first, int(config.max_position_embeddings))
    return None


def check_length(key: str, length: int, tokenizer: Tokenizer, prompt: str, backbone: nn.Module) -> None:
    """Check that a limit of `length` tokens leaves room for text, and that the backbone can read as many.

    Raises:
        ArgumentError: names the key, the limit and the bound.
    """
    tokenizer.no_truncation()
    taken, most = len(tokenizer.encode(prompt).ids), positions(backbone)
    if length <= taken:
        raise ArgumentError(f"{key} = {length} leaves no room for text: prompt and special tokens take {taken}")
    if most is not None and length > most:
        raise ArgumentError(f"{key} = {length} is more than the {most} tokens that the backbone can read")


def token_states(backbone: nn.Module, rotary: bool, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """A backbone's last hidden states [B, L, D].

    Rotary models count positions from the first real token, so that left padding changes nothing.
    """
    inputs = {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL}
    if rotary:
        inputs["position_ids"] = (attention_mask_BL.cumsum(-1) - 1).clamp(min=0)
    states: Tensor = backbone(**inputs).last_hidden_state
    return states


def pad(
    rows: Iterable[Sequence[int]], device: torch.device | str = "cpu", side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, L] int64, padded with zeros on `side`."""
    rows = list(rows)
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, place], mask[index, place] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def load_backbone(name: str) -> nn.Module:
    """The bare transformer of a hub id or a folder, in float32, the same at every load.

    Raises:
        ModelError: it cannot be loaded, or some of its weights are missing.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        backbone, report = AutoModel.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers and its readers raise any kind for a file that is damaged
        raise ModelError(f"backbone {name!r} cannot be loaded from the hub or a folder: {error}") from error
    # transformers fills what is missing with random numbers. Nothing here reads the pooler, which many models lack.
    missing = {key: weight for key, weight in backbone.state_dict().items() if key in report["missing_keys"]}
    lost = sorted(key for key in missing if not key.startswith("pooler."))
    if lost:
        raise ModelError(f"backbone {name!r} has no weights for {', '.join(lost[:3])} ({len(lost)} missing)")
    for weight in missing.values():
        weight.zero_()
    loaded: nn.Module = backbone
    return loaded


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that the runtime will use: `tokenizer.json` itself where there is one, else its conversion."""
    path = Path(name) / TOKENIZER
    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        try:
            fast = AutoTokenizer.from_pretrained(name)
        # The last two are how transformers 4.57 stumbles over a vocabulary file that is not there.
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"the tokenizer of backbone {name!r} cannot be loaded: {error}") from error
        # Where no vocabulary is found, transformers makes a tokenizer of its special tokens: every word is unknown.
        if not getattr(fast, "is_fast", False) or len(fast) <= len(fast.all_special_tokens):
            raise ModelError(f"backbone {name!r} has no fast tokenizer: a {TOKENIZER} is needed to serve without torch")
        tokenizer = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
