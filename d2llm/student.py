"""The student in torch: backbone, PMA, recall head and IEM. Used by train and export; the runtime never imports it.

B batch, L tokens, D backbone width, E recall width, H feature width, Q queries, K candidates of a query.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.backbone import (
    check_length,
    is_rotary,
    load_adapters,
    load_backbone,
    load_tokenizer,
    pad,
    require_same,
    token_states,
)
from d2llm.errors import DataError, ModelError
from d2llm.files import new_folder
from d2llm.folder import TOKENIZER, reading
from d2llm.heads import IEM, PMA, Pooling, Start, WordSlots
from d2llm.settings import Count, Share, Whole, build, check_fields
from d2llm.tokens import encode_batch
from d2llm.types import strings

T = TypeVar("T")


Tuning = Literal["frozen", "lora", "full"]


STUDENT, HEADS, ADAPTER, BACKBONE = "student.json", "heads.safetensors", "adapter", "backbone"


PASSAGE_SIDE = ("backbone.", "pma.", "recall_head.", "lexical.", "iem.passage.")
"""What passages are encoded with: how the names of these weights begin."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The shape of a student."""

    backbone: str
    """Hugging Face id or local folder of an encoder or a causal LM."""
    tuning: Tuning = "lora"
    """What of the backbone is trained: nothing, LoRA adapters, everything. The heads are always trained."""
    lora_rank: Count = 16
    lora_alpha: Count = 32
    lora_dropout: Share = 0.0
    start: Start = "mean"
    """`mean`: pooling starts as the backbone's mean pooling and the score as the scaled cosine, so that a pretrained
    embedder is not destroyed at step 0. `paper`: the forms of the paper, random start."""
    pma_heads: Count = 1
    embedding_dim: Count | None = None
    """E; None keeps the backbone's width."""
    feature_dim: Count = 64
    """Width of `u_q` and `u_p`; with the words kept by name, H = feature_dim + 2 lexical_slots."""
    product: bool = True
    """Beside ReLU(u_q + u_p), the IEM sees the product u_q * u_p: same features, same storage, a bilinear term."""
    lexical_slots: Whole = 96
    """Words that a text keeps by name for the IEM (see `WordSlots`), two numbers each; 0 leaves them out."""
    pooling: Literal["pma", "mean", "last"] = "pma"
    """How token states become one vector; `mean` and `last` (the EOS of a causal LM) are the paper's ablations."""
    interaction: Literal["iem", "cosine"] = "iem"
    """`cosine` leaves the IEM out, the score is the scaled cosine: the paper's ablation."""
    query_prompt: str = ""
    document_prompt: str = ""
    query_max_length: Count = 64
    document_max_length: Count = 256
    """In tokens, prompt and special tokens included."""

    def __post_init__(self) -> None:
        check_fields(self)


class Encoded(NamedTuple):
    """What the encoder gives for B texts, of either side."""

    vectors_BE: Tensor
    query_features_BH: Tensor
    passage_features_BH: Tensor


class Student(nn.Module):
    """Backbone, PMA, recall head and IEM over one tokenizer. Made by `Student.create` or `Student.load`."""

    def __init__(self, config: StudentConfig, backbone: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.backbone, self.tokenizer = config, backbone, tokenizer
        self.provenance: dict[str, Any] = {}
        self._merged_sha256: str | None = None
        """Digest of the backbone and its LoRA adapters from before they were merged."""
        dim = int(backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]  # a Module to torch
        self.dim = dim
        self.pma: PMA | Pooling = (
            PMA(dim, config.pma_heads, config.start) if config.pooling == "pma" else Pooling(config.pooling)
        )
        self.recall_head: nn.Module = nn.Identity()
        if config.embedding_dim is not None:
            self.recall_head = nn.Linear(dim, config.embedding_dim, bias=False)
            nn.init.orthogonal_(self.recall_head.weight)  # keeps angles as well as any untrained projection can
        slots = config.lexical_slots if config.interaction == "iem" else 0
        self.iem = IEM(dim, config.feature_dim, start=config.start, product=config.product, slots=slots)
        if config.interaction == "cosine":
            self.iem.drop_correction()
            self.iem.requires_grad_(False)
        # Token ids come from the tokenizer, but exporters trace with any id that the backbone has.
        vocabulary = max(tokenizer.get_vocab_size(), int(backbone.config.vocab_size))  # type: ignore[union-attr, arg-type]  # a Module to torch
        self.lexical = WordSlots(vocabulary, slots) if slots else None
        self.rotary = is_rotary(backbone)
        for side in ("query", "document"):
            prompt, length = self._reading(side)
            check_length(f"{side}_max_length", length, tokenizer, prompt, backbone)

    @property
    def embedding_dim(self) -> int:
        """E."""
        return self.config.embedding_dim or self.dim

    @property
    def feature_dim(self) -> int:
        """H."""
        return self.iem.width + 2 * self.iem.slots

    def tokens(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """The backbone's last hidden states [B, L, D]."""
        return token_states(self.backbone, self.rotary, input_ids_BL, attention_mask_BL)

    def heads(self, tokens_BLD: Tensor, mask_BL: Tensor, ids_BL: Tensor) -> Encoded:
        """Pool token states and project them for recall and for both sides of the IEM."""
        pooled_BD = self.pma(tokens_BLD.to(self.iem.query.weight.dtype), mask_BL)
        scaled_BD = pooled_BD
        if self.config.start == "mean":  # the paper's last LN gives this norm; without LN it is set here
            scaled_BD = F.normalize(pooled_BD, dim=-1) * self.dim**0.5
        vectors_BE = F.normalize(self.recall_head(pooled_BD), dim=-1)
        query_BH, passage_BH = self.iem.query(scaled_BD), self.iem.passage(scaled_BD)
        if self.lexical is not None:
            words_BH = self.lexical(ids_BL, mask_BL)
            query_BH, passage_BH = (torch.cat([side_BH, words_BH], dim=-1) for side_BH in (query_BH, passage_BH))
        return Encoded(vectors_BE, query_BH, passage_BH)

    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Encoded:
        """Encode token ids; both sides' features are given, the caller takes its own."""
        return self.heads(self.tokens(input_ids_BL, attention_mask_BL), attention_mask_BL, input_ids_BL)

    def encodings(self, texts: Sequence[str], side: Literal["query", "document"]) -> list[list[int]]:
        """Token ids of `texts` with the side's prompt, cut to its limit, read as the runtime reads them."""
        prompt, limit = self._reading(side)
        texts = list(strings(texts))
        empty = next((index for index, text in enumerate(texts) if not text.strip()), None)
        if empty is not None:
            raise DataError(f"text {empty} of {len(texts)} is empty: there is nothing to encode")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(limit)
        return [encoding.ids for encoding in encode_batch(self.tokenizer, [prompt + text for text in texts], limit)]

    def _reading(self, side: str) -> tuple[str, int]:
        """Prompt and limit of a side."""
        if side == "query":
            return self.config.query_prompt, self.config.query_max_length
        return self.config.document_prompt, self.config.document_max_length

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], side: Literal["query", "document"], batch_size: int = 64) -> Encoded:
        """Encode any number of texts without gradients, batches sorted by length, on the student's device."""
        was_training = self.training
        self.eval()
        ids = self.encodings(texts, side)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        inverse = torch.tensor(order).argsort()
        parts = []
        for start in range(0, len(order), batch_size):
            batch = pad([ids[index] for index in order[start : start + batch_size]], self.device)
            parts.append(self(*batch))
        self.train(was_training)
        return Encoded(*(torch.cat(tensors).float().cpu()[inverse] for tensors in zip(*parts, strict=True)))

    @property
    def device(self) -> torch.device:
        """Where the heads lie."""
        return self.iem.query.weight.device

    @classmethod
    def create(cls, config: StudentConfig) -> Student:
        """A new student on a pretrained backbone.

        Raises:
            ModelError: the backbone cannot be loaded, or has no fast tokenizer.
            ArgumentError: a length, the PMA heads or the lexical slots do not suit the backbone.
        """
        backbone = load_backbone(config.backbone)
        if config.tuning == "lora":
            from peft import LoraConfig, get_peft_model

            settings = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules="all-linear",
            )
            backbone = get_peft_model(backbone, settings)
        elif config.tuning == "frozen":
            backbone.requires_grad_(False)
        return cls(config, backbone, load_tokenizer(config.backbone))

    def save(self, folder: Path, beside: Sequence[Path] = ()) -> None:
        """Write the student whole or not at all: `student.json`, heads, tokenizer, and what was trained of the backbone
        (LoRA adapters, all of it, or nothing; the rest is found by the backbone's name). `beside` are files to add.

        Raises:
            ModelError: `folder` exists and is not empty, or the LoRA adapters were merged.
        """
        if self._merged_sha256 is not None:
            raise ModelError("the student's LoRA adapters are merged into its backbone: save it before merge_lora()")
        with new_folder(folder) as staging:
            heads = {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}
            save_file({name: value.detach().cpu().contiguous() for name, value in heads.items()}, staging / HEADS)
            self.tokenizer.no_truncation()
            self.tokenizer.save(str(staging / TOKENIZER))
            if self.config.tuning == "lora":
                self.backbone.save_pretrained(staging / ADAPTER)  # type: ignore[operator]  # a Module to torch's types
            elif self.config.tuning == "full":
                self.backbone.save_pretrained(staging / BACKBONE)  # type: ignore[operator]  # a Module to torch's types
            content = {"config": asdict(self.config), "provenance": self.provenance}
            (staging / STUDENT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            for path in beside:
                shutil.copy(path, staging)

    @classmethod
    def load(cls, folder: Path) -> Student:
        """Read a student folder.

        Raises:
            ModelError: not a student folder, an incomplete or damaged one, or its backbone cannot be loaded; names the
                file.
        """
        if not (folder / STUDENT).is_file():
            raise ModelError(f"{folder} is no student: no {STUDENT} in it. Train one with: d2llm train RECIPE.toml")
        remedy = "Restore the folder, or train the student again."
        with reading(folder, STUDENT, remedy) as path:
            config, provenance = read_description(path, StudentConfig)
        with reading(folder, TOKENIZER, remedy) as path:
            tokenizer = Tokenizer.from_file(str(path))
        if config.tuning == "full":
            with reading(folder, BACKBONE, remedy) as path:
                backbone = load_backbone(str(path))
        else:
            backbone = load_backbone(config.backbone).requires_grad_(False)
        if config.tuning == "lora":
            with reading(folder, ADAPTER, remedy) as path:
                backbone = load_adapters(backbone, path)
        with reading(folder, STUDENT, remedy):  # what it says may not suit the backbone
            student = cls(config, backbone, tokenizer)
        with reading(folder, HEADS, remedy) as path:
            fill(student, load_file(path))
        student.provenance = provenance
        return student

    def query_parameters(self) -> Iterator[nn.Parameter]:
        """What queries are encoded with: all but the passage half of the IEM and what follows the features."""
        for module in (self.backbone, self.pma, self.recall_head, self.iem.query):
            yield from module.parameters()

    def merge_lora(self) -> None:
        """Fold LoRA adapters into the backbone's weights, in place. The student's digest stays."""
        if self._has_adapters:
            self._merged_sha256 = _adapted_sha256(self.backbone)
            self.backbone = self.backbone.merge_and_unload()  # type: ignore[operator]  # a Module to torch's types

    @property
    def _has_adapters(self) -> bool:
        return self.config.tuning == "lora" and hasattr(self.backbone, "merge_and_unload")

    def weights_sha256(self, *, whole: bool = False) -> str:
        """Digest (64 hex digits) of all that passages are encoded with: backbone, PMA, recall head, and the passage
        half of the IEM. `whole` takes in the rest of the IEM too.

        It is taken of the weights as they are stored, never of what a machine computed from them: LoRA adapters count
        apart from the backbone, merged or not. So it is the same on every machine and in every run.
        """
        weights = {name: w for name, w in self.state_dict().items() if whole or name.startswith(PASSAGE_SIDE)}
        adapted = _adapted_sha256(self.backbone) if self._has_adapters else self._merged_sha256
        if adapted is None:
            return _sha256(weights)
        return _sha256({name: w for name, w in weights.items() if not name.startswith("backbone.")}, adapted)


@dataclass(frozen=True)
class _Description:
    config: dict[str, Any]
    provenance: dict[str, Any]


def read_description(path: Path, kind: type[T], old_names: Mapping[str, str] | None = None) -> tuple[T, dict[str, Any]]:
    """The config, of the dataclass `kind`, and the provenance that a JSON file holds. `old_names` says what keys of the
    config were called once, `{old: new}`.

    Raises:
        ValueError: not JSON; or a key that is unknown or missing, or a value of another type or out of range.
    """
    content = build(_Description, json.loads(path.read_text(encoding="utf-8")))
    config = {(old_names or {}).get(key, key): value for key, value in content.config.items()}
    return build(kind, config, "config."), content.provenance


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load every weight but the backbone's.

    Raises:
        ValueError: one is missing or one too many; names it.
        RuntimeError: one has another shape.
    """
    own = {name for name in module.state_dict() if not name.startswith("backbone.")}
    require_same(weights.keys(), own)
    module.load_state_dict(weights, strict=False)


def earlier_digests(student: Student) -> str:
    """For messages about a digest that differs: why it may be the same student all the same. Empty without LoRA."""
    if student.config.tuning != "lora":
        return ""
    return " (Digests of students with LoRA were once taken of the merged weights: make anew what is that old.)"


def _adapted_sha256(backbone: nn.Module) -> str:
    """Digest (64 hex digits) of a backbone with LoRA adapters that are not merged."""
    from peft.tuners.lora import LoraLayer

    def plain(name: str) -> str:  # without what peft puts around the backbone's own names
        return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")

    scaling = {plain(name): m.scaling["default"] for name, m in backbone.named_modules() if isinstance(m, LoraLayer)}
    weights = {plain(name): weight for name, weight in backbone.state_dict().items()}
    return _sha256(weights, json.dumps(scaling, sort_keys=True))


def _sha256(weights: Mapping[str, Tensor], before: str = "") -> str:
    """Digest of names, shapes and values in float32, after the text `before`."""
    digest = hashlib.sha256(before.encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + str(tuple(weight.shape)).encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
