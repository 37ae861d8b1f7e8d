"""The student in torch: backbone, PMA, recall head and IEM. Used by train and export; the runtime never imports it.

B batch, L tokens, D backbone width, E recall width, H feature width, Q queries, K candidates of a query.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

from d2llm.errors import ArgumentError, DataError, ModelError
from d2llm.folder import TOKENIZER, reading, written_atomically
from d2llm.settings import Count, Share, Whole, build, check_fields
from d2llm.tokens import encode_batch
from d2llm.types import strings

T = TypeVar("T")
Start = Literal["mean", "paper"]
Tuning = Literal["frozen", "lora", "full"]
STUDENT, HEADS, ADAPTER, BACKBONE = "student.json", "heads.safetensors", "adapter", "backbone"
PASSAGE_SIDE = ("backbone.", "pma.", "recall_head.", "lexical.", "iem.passage.")
"""What passages are encoded with: how the names of these weights begin."""

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
"""How backbones name the table of their learned positions."""


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
    """Words that a text keeps by name for the IEM (see `Lexical`), two numbers each; 0 leaves them out."""
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


class PMA(nn.Module):
    """Pooling by multi-head attention with one learned query (paper section 3.2, after the Set Transformer).

    `h = LN(MHA(q, Y, Y) + q)`, `out = LN(h + FFN(h))`. With `start="paper"` as printed. With `start="mean"` there is no
    LN, q is zero (attention is uniform), values pass unchanged and the FFN's last layer is zero: `out` is the mean of
    the unmasked token states until training moves it.
    """

    def __init__(self, dim: int, heads: int = 1, start: Start = "mean") -> None:
        super().__init__()
        if dim % heads:
            raise ArgumentError(f"the backbone's width {dim} is not divisible into {heads} PMA heads")
        self.heads = heads
        self.seed = nn.Parameter(torch.zeros(dim))
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_attention: nn.Module = nn.Identity()
        self.norm_out: nn.Module = nn.Identity()
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if start == "paper":
            nn.init.normal_(self.seed, std=dim**-0.5)
            self.norm_attention, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.ffn = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        else:
            nn.init.eye_(self.value.weight)
            last = nn.Linear(dim, dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.ffn = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), last)

    def forward(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Pool token states to [B, D]; positions where `mask_BL` is 0 have no influence, whatever they hold."""
        batch, _, dim = tokens_BLD.shape
        tokens_BLD = tokens_BLD.masked_fill(mask_BL.unsqueeze(-1) == 0, 0.0)  # 0 * NaN would be NaN
        # There is one query, so no token needs a key or a value of its own: q (K y) = (q K) y, and values are made of
        # the mixture. What the keys' bias adds is the same for all tokens, and softmax does not see it.
        query_Nd = self.query(self.seed).view(self.heads, -1) * (dim // self.heads) ** -0.5
        lens_ND = (query_Nd.unsqueeze(1) @ self.key.weight.view(self.heads, -1, dim)).squeeze(1)
        logits_BNL = lens_ND @ tokens_BLD.transpose(1, 2)
        logits_BNL = logits_BNL.masked_fill(mask_BL.unsqueeze(1) == 0, torch.finfo(logits_BNL.dtype).min)
        mixed_BND = logits_BNL.softmax(-1) @ tokens_BLD
        value_NDd = self.value.weight.view(self.heads, -1, dim).transpose(1, 2)
        pooled_NBd = mixed_BND.transpose(0, 1) @ value_NDd
        pooled_BD = pooled_NBd.transpose(0, 1).reshape(batch, dim) + self.value.bias
        hidden_BD = self.norm_attention(pooled_BD + self.seed)
        out: Tensor = self.norm_out(hidden_BD + self.ffn(hidden_BD))
        return out


class Pooling(nn.Module):
    """The paper's ablations of PMA: the mean of the token states, or the state of the last token (EOS)."""

    def __init__(self, kind: Literal["mean", "last"]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Pool token states to [B, D]."""
        if self.kind == "last":
            last_B = (mask_BL * torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device)).argmax(-1)
            return tokens_BLD[torch.arange(len(last_B), device=last_B.device), last_B]
        mask_BL1 = mask_BL.unsqueeze(-1)
        return tokens_BLD.masked_fill(mask_BL1 == 0, 0.0).sum(1) / mask_BL1.sum(1).clamp(min=1)


class Lexical(nn.Module):
    """The words of a text in 2 S numbers: what pooled vectors blur and an LLM that reads both texts at once does not.

    A densified lexical representation (Lin and Lin, arXiv 2112.04666 and 2206.09912): the vocabulary is cut into S
    slots, token t going to slot `t mod S`, and each slot keeps the heaviest of the text's tokens: its weight and its
    name `t div S + 1`. Two texts share a token where the names in a slot are equal; their lexical score is the sum of
    weight products over those slots, a gated inner product. Weights are `sqrt(idf)`, so that a match counts its idf.
    Names stay at or below 2048, which fp16 holds exactly.
    """

    weight_V: Tensor
    name_V: Tensor

    def __init__(self, vocabulary: int, slots: int) -> None:
        super().__init__()
        if vocabulary > 2048 * slots:
            raise ArgumentError(
                f"lexical_slots = {slots} is too few for a vocabulary of {vocabulary} tokens: at least "
                f"{-(-vocabulary // 2048)}, or 0 to leave them out"
            )
        self.slots = slots
        self.register_buffer("weight_V", torch.zeros(vocabulary))
        name_V = (torch.arange(vocabulary) // slots + 1).float()
        self.register_buffer("name_V", name_V, persistent=False)

    def fit(self, documents: Iterable[Sequence[int]], special: Iterable[int]) -> None:
        """Set the weights from the document frequencies of tokens; `special` tokens are no words."""
        frequency_V, count = torch.zeros_like(self.weight_V, device="cpu"), 0
        for ids in documents:
            frequency_V[torch.tensor(sorted(set(ids)), dtype=torch.long)] += 1
            count += 1
        idf_V = torch.log1p((count - frequency_V + 0.5) / (frequency_V + 0.5))
        idf_V[torch.tensor(list(special), dtype=torch.long)] = 0.0
        self.weight_V.copy_(idf_V.sqrt())

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Weights and names [B, 2 S] of the tokens kept; an empty slot holds zeros."""
        # One lookup for both, and no remainder of negative numbers: of a short query, each node of the graph counts.
        table_V2 = torch.stack([self.weight_V, self.name_V], dim=-1)
        weight_BL, name_BL = F.embedding(ids_BL, table_V2).unbind(-1)
        weight_BL = weight_BL * mask_BL
        slot_BL = ids_BL.fmod(self.slots)
        empty_BS = weight_BL.new_zeros(ids_BL.shape[0], self.slots)  # not len(): tracing would fix it
        heaviest_BS = empty_BS.scatter_reduce(1, slot_BL, weight_BL, "amax")
        kept_BL = (weight_BL == heaviest_BS.gather(1, slot_BL)) & (weight_BL > 0)
        names_BS = empty_BS.scatter_reduce(1, slot_BL, torch.where(kept_BL, name_BL, 0.0), "amax")
        return torch.cat([heaviest_BS, names_BS], dim=-1)


class IEM(nn.Module):
    """Interaction emulation module (paper section 3.3), split so that passages can be prepared ahead.

    f1's first layer acts on the concatenation `[q; p]`, so it is the sum of `u_q = W_q q` and `u_p = W_p p + b`
    (`query`, `passage`), and the pair's part starts at `ReLU(u_q + u_p)`. `f2` has a branch for symmetric and one for
    asymmetric pairs; f1 and the last layer are shared. With `start="mean"` the score is `scale * cosine` plus a
    correction that starts at zero: rescoring begins as recall and learns what recall lacks. With `slots`, the features
    end in those of `Lexical`, and `lexical_scale` times their gated inner product is added, one scale a branch.
    """

    def __init__(
        self, dim: int, feature_dim: int, *, start: Start = "mean", product: bool = True, slots: int = 0
    ) -> None:
        super().__init__()
        self.width, self.slots = feature_dim, slots
        self.lexical_scale = nn.Parameter(torch.zeros(2)) if slots else None
        self.query = nn.Linear(dim, feature_dim, bias=False)
        self.passage = nn.Linear(dim, feature_dim)
        self.product = product
        width = 2 * feature_dim if product else feature_dim
        self.symmetric, self.asymmetric = nn.Linear(width, feature_dim), nn.Linear(width, feature_dim)
        self.out = nn.Linear(feature_dim, 1)
        for layer in (self.query, self.passage, self.symmetric, self.asymmetric, self.out):
            nn.init.xavier_uniform_(layer.weight)
        self.scale = nn.Parameter(torch.tensor(20.0)) if start == "mean" else None
        if start == "mean":
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def interact(self, query_features_QH: Tensor, passage_features_QKH: Tensor, task_Q: Tensor) -> Tensor:
        """The pair's feature [Q, K, F] before the last layer: what feature imitation compares with the teacher's."""
        query_Q1F = query_features_QH[:, None, : self.width]
        passage_QKF = passage_features_QKH[..., : self.width]
        hidden = F.relu(query_Q1F + passage_QKF)
        if self.product:
            hidden = torch.cat([hidden, query_Q1F * passage_QKF], dim=-1)
        # Each query's own branch is taken first, so that the other one costs nothing.
        weight_QHF = torch.stack([self.symmetric.weight, self.asymmetric.weight])[task_Q]
        bias_QH = torch.stack([self.symmetric.bias, self.asymmetric.bias])[task_Q]
        return F.relu(hidden @ weight_QHF.transpose(1, 2) + bias_QH.unsqueeze(1))

    def matches(self, query_features_QH: Tensor, passage_features_QKH: Tensor) -> Tensor:
        """The gated inner product [Q, K] of both sides' words: the idf of those they share."""
        query_weight_Q1S, query_name_Q1S = query_features_QH[:, None, self.width :].split(self.slots, dim=-1)
        weight_QKS, name_QKS = passage_features_QKH[..., self.width :].split(self.slots, dim=-1)
        return torch.where(query_name_Q1S == name_QKS, query_weight_Q1S * weight_QKS, 0.0).sum(-1)

    @torch.no_grad()
    def drop_correction(self) -> None:
        """Make the score the scaled cosine again, as at the start."""
        self.out.weight.zero_()
        self.out.bias.zero_()
        if self.lexical_scale is not None:
            self.lexical_scale.zero_()

    def forward(
        self, query_features_QH: Tensor, passage_features_QKH: Tensor, recall_score_QK: Tensor, task_Q: Tensor
    ) -> Tensor:
        """Scores [Q, K]; `task_Q` int64 chooses each query's branch: 0 symmetric, 1 asymmetric."""
        score_QK: Tensor = self.out(self.interact(query_features_QH, passage_features_QKH, task_Q)).squeeze(-1)
        if self.lexical_scale is not None:
            matches_QK = self.matches(query_features_QH, passage_features_QKH)
            score_QK = score_QK + self.lexical_scale[task_Q].unsqueeze(-1) * matches_QK
        if self.scale is not None:
            score_QK = score_QK + self.scale * recall_score_QK
        else:
            score_QK = score_QK + 0.0 * recall_score_QK  # the graph keeps its input in the paper's form too
        return score_QK


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
        self.lexical = Lexical(vocabulary, slots) if slots else None
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
        with written_atomically(folder) as staging:
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


def read_description(path: Path, kind: type[T]) -> tuple[T, dict[str, Any]]:
    """The config, of the dataclass `kind`, and the provenance that a JSON file holds.

    Raises:
        ValueError: not JSON; or a key that is unknown or missing, or a value of another type or out of range.
    """
    content = build(_Description, json.loads(path.read_text(encoding="utf-8")))
    return build(kind, content.config, "config."), content.provenance


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load every weight but the backbone's.

    Raises:
        ValueError: one is missing or one too many; names it.
        RuntimeError: one has another shape.
    """
    own = {name for name in module.state_dict() if not name.startswith("backbone.")}
    _require_same(weights.keys(), own)
    module.load_state_dict(weights, strict=False)


def load_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """Put the LoRA adapters of a peft folder onto a model, in place, to be trained on.

    Raises:
        ValueError: a weight is missing or one too many; names it. A damaged file raises errors of peft's readers.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    place = str(folder.resolve())  # a relative one could be taken for a name on the hub
    adapted: nn.Module = PeftModel.from_pretrained(model, place, is_trainable=True)
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _require_same(load_peft_weights(place, device="cpu").keys(), own.keys())  # peft only warns
    return adapted


def _require_same(found: Set[str], expected: Set[str]) -> None:
    for problem, names in (("is missing", expected - found), ("belongs to something else", found - expected)):
        if names:
            raise ValueError(f"{min(names)} {problem}, one of {len(names)} such weights")


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


__all__ = [
    "IEM",
    "PMA",
    "Encoded",
    "Lexical",
    "Pooling",
    "Student",
    "StudentConfig",
    "check_length",
    "earlier_digests",
    "fill",
    "is_rotary",
    "load_adapters",
    "load_backbone",
    "load_tokenizer",
    "pad",
    "positions",
    "read_description",
    "token_states",
]
