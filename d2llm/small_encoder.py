"""Small query encoders in torch: they stand in for a student on the query side (KALE). Used by train and export alone.

A query yields two things, the recall vector and the IEM's query features; a small encoder gives both as near to the
student's as it can, and passages stay as the student encoded them. Words by name depend on token ids alone, so a small
encoder has them exactly.

B batch, L tokens, D width of the small encoder, E recall width, F width of the features without word slots,
V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.backbone import check_length, is_rotary, load_backbone, load_tokenizer, pad, token_states
from d2llm.errors import ArgumentError, MismatchError, ModelError
from d2llm.files import new_folder
from d2llm.folder import TOKENIZER, reading
from d2llm.heads import PMA, Pooling, WordSlots
from d2llm.settings import Count, Whole, check_fields
from d2llm.student import BACKBONE, Student, earlier_digests, fill, read_description
from d2llm.tokens import encode_batch
from d2llm.types import strings

Kind = Literal["layers", "model", "static"]
BIGRAMS = 2**15
CONFIG, WEIGHTS, STUDENT_TOKENIZER = "query_encoder.json", "query_encoder.safetensors", "words.json"


@dataclass(frozen=True, kw_only=True)
class SmallEncoderConfig:
    """The shape of a small query encoder, and the student that it belongs to."""

    kind: Kind
    student: str
    """Digest of the student: no other one's passages can be searched with it."""
    embedding_dim: Count
    """E."""
    feature_width: Count
    """F."""
    lexical_slots: Whole
    """The student's: its word slots are taken over."""
    student_prompt: str
    student_max_length: Count
    """Of the student's query side: how texts are read for the word slots."""
    query_prompt: str
    query_max_length: Count
    pooling: Literal["pma", "mean", "last"] = "pma"
    pma_heads: Count = 1
    pma_start: Literal["mean", "paper"] = "mean"
    layers: tuple[Whole, ...] = ()
    """Which of the student's layers were kept."""
    bigrams: Whole = 0
    """Of kind `static`: rows for bigrams (pairs of neighbouring tokens)."""
    backbone: str = ""
    """Of kind `model`: the hub id or folder that it was made from."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def own_tokenizer(self) -> bool:
        """Whether it reads queries by another tokenizer than the student's."""
        return self.kind == "model"

    def require_student(self, student: Student, place: Path | str, student_place: Path | str) -> None:
        """Raise `MismatchError` unless it is `student` that this encoder was aligned to."""
        found = student_digest(student)
        if found != self.student:
            raise MismatchError(
                f"{place} was aligned to the student {self.student[:16]}, {student_place} is {found[:16]}. Align one "
                f"to it with: d2llm kale {student_place} KALE --queries FILE{earlier_digests(student)}"
            )


class EncodedQueries(NamedTuple):
    """What a small encoder gives for B queries: unit recall vectors, and features with the word slots at their end."""

    vectors_BE: Tensor
    features_BH: Tensor


class SmallEncoder(nn.Module, ABC):
    """A small query encoder, with the student's word slots. Made by the functions below or `SmallEncoder.load`."""

    def __init__(self, config: SmallEncoderConfig, tokenizer: Tokenizer, student_tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer, self.student_tokenizer = config, tokenizer, student_tokenizer
        self.provenance: dict[str, Any] = {}
        self.lexical: WordSlots | None = None

    @abstractmethod
    def project(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Unit recall vectors [B, E] and features [B, F] without word slots."""

    def forward(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        word_ids_BL: Tensor | None = None,
        word_mask_BL: Tensor | None = None,
    ) -> EncodedQueries:
        """Encode token ids; `word_ids_BL` are the student's, and the same ones where that is the tokenizer."""
        vectors_BE, features_BF = self.project(input_ids_BL, attention_mask_BL)
        if self.lexical is None:
            return EncodedQueries(vectors_BE, features_BF)
        if word_ids_BL is None or word_mask_BL is None:
            word_ids_BL, word_mask_BL = input_ids_BL, attention_mask_BL
        slots_BW = self.lexical(word_ids_BL, word_mask_BL)
        return EncodedQueries(vectors_BE, torch.cat([features_BF, slots_BW], dim=-1))

    def encodings(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of queries, read as the runtime reads them."""
        return _read(self.tokenizer, self.config.query_prompt, self.config.query_max_length, texts)

    def student_encodings(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of queries as the student reads them."""
        return _read(self.student_tokenizer, self.config.student_prompt, self.config.student_max_length, texts)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> EncodedQueries:
        """Encode any number of queries without gradients, on the encoder's device; what comes out is on the CPU."""
        was_training = self.training
        self.eval()
        ids, student_ids = self.encodings(texts), self.student_encodings(texts)
        device = next(iter(self.state_dict().values())).device
        parts = []
        for start in range(0, len(texts), batch_size):
            rows = slice(start, start + batch_size)
            parts.append(self(*pad(ids[rows], device), *pad(student_ids[rows], device)))
        self.train(was_training)
        return EncodedQueries(*(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)))

    @property
    def parameter_count(self) -> int:
        """Numbers that queries are encoded with, the student's table of word weights left out."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, folder: Path) -> None:
        """Write the encoder whole or not at all.

        Raises:
            ModelError: `folder` exists and is not empty.
        """
        with new_folder(folder) as staging:
            own = {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}
            save_file({name: value.detach().cpu().contiguous() for name, value in own.items()}, staging / WEIGHTS)
            for tokenizer, name in ((self.tokenizer, TOKENIZER), (self.student_tokenizer, STUDENT_TOKENIZER)):
                tokenizer.no_truncation()
                tokenizer.save(str(staging / name))
            if isinstance(self, SmallTransformer):
                self.backbone.save_pretrained(staging / BACKBONE)  # type: ignore[operator]  # a Module to torch's types
            content = {"config": asdict(self.config), "provenance": self.provenance}
            (staging / CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> SmallEncoder:
        """Read a folder that `save` wrote.

        Raises:
            ModelError: no such folder, or an incomplete or damaged one; names the file.
        """
        if not (folder / CONFIG).is_file():
            raise ModelError(
                f"{folder} is no small query encoder: no {CONFIG} in it. Make one with: d2llm kale STUDENT {folder} "
                "--queries FILE"
            )
        remedy = "Align it again with d2llm kale."
        with reading(folder, CONFIG, remedy) as path:
            config, provenance = read_description(path, SmallEncoderConfig, {"pairs": "bigrams"})
        with reading(folder, TOKENIZER, remedy) as path:
            tokenizer = Tokenizer.from_file(str(path))
        with reading(folder, STUDENT_TOKENIZER, remedy) as path:
            student_tokenizer = Tokenizer.from_file(str(path))
        if config.kind != "static":
            with reading(folder, BACKBONE, remedy) as path:
                backbone = load_backbone(str(path))
        encoder: SmallEncoder
        with reading(folder, CONFIG, remedy):  # what it says may not suit the rest
            if config.kind == "static":
                table_VO = torch.empty(tokenizer.get_vocab_size(), config.embedding_dim + config.feature_width)
                encoder = StaticTable(config, table_VO, tokenizer, student_tokenizer)
            else:
                encoder = SmallTransformer(config, backbone, tokenizer, student_tokenizer)
        with reading(folder, WEIGHTS, remedy) as path:
            weights = load_file(path)
            if "pairs.weight" in weights:  # the name of version 0.1
                weights["bigrams.weight"] = weights.pop("pairs.weight")
            if config.lexical_slots:
                encoder.lexical = WordSlots(len(weights["lexical.weight_V"]), config.lexical_slots)
            fill(encoder, weights)
        encoder.provenance = provenance
        return encoder.eval()


class SmallTransformer(SmallEncoder):
    """A transformer with the student's kind of pooling, and a linear map to each of the two things a query yields."""

    def __init__(
        self, config: SmallEncoderConfig, backbone: nn.Module, tokenizer: Tokenizer, student_tokenizer: Tokenizer
    ) -> None:
        super().__init__(config, tokenizer, student_tokenizer)
        check_length("query_max_length", config.query_max_length, tokenizer, config.query_prompt, backbone)
        self.backbone = backbone
        self.rotary = is_rotary(backbone)
        dim = int(backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]  # a Module to torch
        self.pma: PMA | Pooling = (
            PMA(dim, config.pma_heads, config.pma_start) if config.pooling == "pma" else Pooling(config.pooling)
        )
        self.recall = nn.Linear(dim, config.embedding_dim, bias=False)
        self.query = nn.Linear(dim, config.feature_width, bias=False)

    def pooled(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Pooled states [B, D], of length 1."""
        states_BLD = token_states(self.backbone, self.rotary, input_ids_BL, attention_mask_BL)
        return F.normalize(self.pma(states_BLD.to(self.query.weight.dtype), attention_mask_BL), dim=-1)

    def project(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Pool, then map; features are made of states of length sqrt(D), as the student's are."""
        pooled_BD = self.pooled(input_ids_BL, attention_mask_BL)
        return F.normalize(self.recall(pooled_BD), dim=-1), self.query(pooled_BD * pooled_BD.shape[-1] ** 0.5)


class StaticTable(SmallEncoder):
    """A table of tokens and of pairs of neighbours: a query is the sum of their rows. No transformer.

    A row holds what its token adds to the recall vector [E] and to the features [F]; how much a token weighs is the
    length of its row. Pairs, which tell "not in" from "in", share `pairs` rows by a hash, as in fastText (arXiv
    1607.04606). The sum is divided by the length of its first part, so that the recall vector has length 1.
    """

    def __init__(
        self, config: SmallEncoderConfig, table_VO: Tensor, tokenizer: Tokenizer, student_tokenizer: Tokenizer
    ) -> None:
        super().__init__(config, tokenizer, student_tokenizer)
        self.table = nn.Embedding(*table_VO.shape)
        self.table.weight.data = table_VO
        self.bigrams: nn.Embedding | None = None
        if config.bigrams:
            self.bigrams = nn.Embedding(config.bigrams, table_VO.shape[1])
            nn.init.zeros_(self.bigrams.weight)

    def project(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the rows, then scale."""
        mask_BL = attention_mask_BL.float()
        sum_BO = _sum(self.table(input_ids_BL), mask_BL)
        if self.bigrams is not None:
            hash_BM = (input_ids_BL[:, :-1] * BIGRAM_HASH + input_ids_BL[:, 1:]).fmod(self.config.bigrams)
            sum_BO = sum_BO + _sum(self.bigrams(hash_BM), mask_BL[:, 1:])
        vector_BE, features_BF = sum_BO.split([self.config.embedding_dim, self.config.feature_width], dim=-1)
        length_B1 = vector_BE.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return vector_BE / length_B1, features_BF / length_B1


BIGRAM_HASH = 1_000_003
"""A prime: neighbours in one order and in the other are different pairs."""


def _sum(rows_BLO: Tensor, mask_BL: Tensor) -> Tensor:
    """The sum [B, O] of the unmasked rows."""
    return (mask_BL.unsqueeze(1) @ rows_BLO).squeeze(1)


def from_layers(student: Student, layers: Sequence[int]) -> SmallEncoder:
    """Some of the student's own layers, with its embeddings, pooling and projections (KALE, arXiv 2304.01016).

    With all layers it is the student's query side itself, where pooling starts as the mean. `student` has its LoRA
    merged.

    Raises:
        ArgumentError: no layer, a layer that the student has not, or one twice.
    """
    parent, name = _layers(student.backbone)
    whole: nn.ModuleList = getattr(parent, name)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= index < len(whole) for index in layers):
        raise ArgumentError(
            f"layers {list(layers)}: choose one or more of the student's 0 to {len(whole) - 1}, each once"
        )
    chosen = tuple(sorted(layers))
    try:  # the rest is not worth copying: it may be most of an LLM
        setattr(parent, name, nn.ModuleList(whole[index] for index in chosen))
        backbone: Any = copy.deepcopy(student.backbone)
    finally:
        setattr(parent, name, whole)
    backbone.config.num_hidden_layers = len(chosen)
    if getattr(backbone.config, "layer_types", None):
        backbone.config.layer_types = [backbone.config.layer_types[index] for index in chosen]
    for place, layer in enumerate(getattr(*_layers(backbone))):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    pooling, heads, start = student.config.pooling, student.config.pma_heads, student.config.start
    config = _config(student, "layers", layers=chosen, pooling=pooling, pma_heads=heads, pma_start=start)
    encoder = SmallTransformer(config, backbone, student.tokenizer, student.tokenizer)
    encoder.pma.load_state_dict(student.pma.state_dict())
    with torch.no_grad():
        if isinstance(student.recall_head, nn.Linear):
            encoder.recall.weight.copy_(student.recall_head.weight)
        else:
            nn.init.eye_(encoder.recall.weight)
        encoder.query.weight.copy_(student.iem.query.weight)
    return _finished(encoder, student)


def from_model(student: Student, backbone: str, *, prompt: str = "", max_length: int | None = None) -> SmallEncoder:
    """Another, smaller model of the hub or a folder, with its own tokenizer and width. Its maps start at random, and
    are set by the warm start of the alignment.

    Raises:
        ModelError: it cannot be loaded, or has no fast tokenizer.
        ArgumentError: it cannot read as many tokens as queries have.
    """
    limit = student.config.query_max_length if max_length is None else max_length
    config = _config(student, "model", backbone=backbone, query_prompt=prompt, query_max_length=limit)
    encoder = SmallTransformer(config, load_backbone(backbone), load_tokenizer(backbone), student.tokenizer)
    return _finished(encoder, student)


@torch.no_grad()
def from_tokens(student: Student, *, bigrams: int = BIGRAMS, batch_size: int = 512) -> SmallEncoder:
    """A static table: each token's row starts as what the student makes of that token alone, times the token's weight
    as a word (the square root of its idf); those of pairs start at zero."""
    config = _config(student, "static", bigrams=bigrams)
    student.eval()
    vocabulary = student.tokenizer.get_vocab_size()
    before, after = _around(student.tokenizer)
    parts = []
    for start in range(0, vocabulary, batch_size):
        ids = range(start, min(start + batch_size, vocabulary))
        encoded = student(*pad([[*before, id_, *after] for id_ in ids], student.device))
        features_BF = encoded.query_features_BH[:, : config.feature_width]
        parts.append(torch.cat([encoded.vectors_BE, features_BF], dim=-1).float().cpu())
    table_VO = torch.cat(parts)
    if student.lexical is not None:
        weight_V = student.lexical.weight_V[:vocabulary].cpu()
        # Special tokens weigh nothing as words, but they are in every query and may learn what all queries share.
        table_VO *= weight_V.clamp(min=float(weight_V.max()) * 0.01).unsqueeze(-1)
    encoder = StaticTable(config, table_VO, student.tokenizer, student.tokenizer)
    return _finished(encoder, student)


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` layers: the first, the last, and evenly between them; of one, the last, which measured better.

    Raises:
        ArgumentError: fewer than one, or more than there are.
    """
    if not 1 <= count <= total:
        raise ArgumentError(f"{count} layers: the student has {total}, choose from 1 to {total}")
    if count == 1:
        return (total - 1,)
    return tuple(round(place * (total - 1) / (count - 1)) for place in range(count))


def layer_count(student: Student) -> int:
    """How many layers the student's backbone has."""
    return len(getattr(*_layers(student.backbone)))


def student_digest(student: Student) -> str:
    """What a small encoder knows its student by: its weights as they are stored, and how it reads queries."""
    config = student.config
    parts = student.weights_sha256(whole=True), config.query_prompt, config.query_max_length
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _config(student: Student, kind: Kind, **options: Any) -> SmallEncoderConfig:
    prompt, limit = student.config.query_prompt, student.config.query_max_length
    return SmallEncoderConfig(
        **{
            "kind": kind,
            "student": student_digest(student),
            "embedding_dim": student.embedding_dim,
            "feature_width": student.iem.width,
            "lexical_slots": student.iem.slots,
            "student_prompt": prompt,
            "student_max_length": limit,
            "query_prompt": prompt,
            "query_max_length": limit,
            **options,
        }
    )


def _finished(encoder: SmallEncoder, student: Student) -> SmallEncoder:
    # Copies: truncation is a tokenizer's state.
    tokenizers = encoder.tokenizer, encoder.student_tokenizer
    encoder.tokenizer, encoder.student_tokenizer = (Tokenizer.from_str(t.to_str()) for t in tokenizers)
    encoder.lexical = copy.deepcopy(student.lexical)
    return encoder.requires_grad_(True)


def _layers(backbone: nn.Module) -> tuple[nn.Module, str]:
    """Where a backbone keeps its layers: the module, and the name in it."""
    count = backbone.config.num_hidden_layers  # type: ignore[union-attr]  # a Module to torch's types
    for module in backbone.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise ModelError(f"{type(backbone).__name__} keeps its {count} layers in no list: a subset cannot be taken")


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    encoding = tokenizer.encode("a")
    inside = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    if not inside:
        return [], []
    return encoding.ids[: inside[0]], encoding.ids[inside[-1] + 1 :]


def _read(tokenizer: Tokenizer, prompt: str, limit: int, texts: Sequence[str]) -> list[list[int]]:
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return [encoding.ids for encoding in encode_batch(tokenizer, [prompt + text for text in strings(texts)], limit)]
