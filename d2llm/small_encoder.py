"""Small query encoders in torch, which replace a student's encoder for queries only (KALE, arXiv 2304.01016).

A query needs a recall vector and the IEM's query features. A small encoder is trained to approximate both; passages
keep the student's vectors and features. The words depend on token ids only, so a small encoder computes them exactly.
Training and export use this module; the runtime never imports it.

Dimensions: B queries of a batch, L tokens, D width of the small encoder, E width of the recall vector, F width of the
IEM's projection, M vectors of a query, d their width, H columns of the features, G = F + M d columns without words,
O = E + F + d, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.backbone import (
    Backbone,
    check_length,
    is_rotary,
    layer_list,
    load_backbone,
    load_tokenizer,
    pad,
    positions,
    token_states,
)
from d2llm.errors import ArgumentError, ModelError
from d2llm.features import TokenVectors, Words, pool_parts
from d2llm.files import new_folder
from d2llm.folder import TOKENIZER, reading
from d2llm.heads import PMA, Pooling
from d2llm.saved import is_of_earlier_form, load_head_weights, read_description
from d2llm.small_encoder_config import Kind, SmallEncoderConfig, student_digest
from d2llm.student import BACKBONE, Student
from d2llm.tokens import special_ids_around, token_ids
from d2llm.types import StrPath, strings

logger = logging.getLogger(__name__)

BIGRAMS = 2**15
CONFIG, WEIGHTS, STUDENT_TOKENIZER = "query_encoder.json", "query_encoder.safetensors", "words.json"


class EncodedQueries(NamedTuple):
    """The encoding of B queries: recall vectors of length 1, and query features that end in the words."""

    vectors_BE: Tensor
    features_BH: Tensor


class SmallEncoder(nn.Module, ABC):
    """A small query encoder with the words of its student.

    Make a new one with `from_layers`, `from_model` or `from_tokens`, and read a saved one with `SmallEncoder.load`.

    Example:
        >>> from d2llm.small_encoder import SmallEncoder, from_tokens
        >>> encoder = from_tokens(student)
        >>> encoder.encode(["How do I read a file?"]).vectors_BE.shape == (1, student.embedding_dim)
        True
        >>> encoder.save(tmp_path / "small")
        >>> SmallEncoder.load(tmp_path / "small").config == encoder.config
        True
    """

    def __init__(self, config: SmallEncoderConfig, tokenizer: Tokenizer, student_tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer, self.student_tokenizer = config, tokenizer, student_tokenizer
        self.provenance: dict[str, Any] = {}
        self.words: Words | None = None

    @abstractmethod
    def project(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return recall vectors [B, E] of length 1 and features [B, G] without words."""

    def forward(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        word_ids_BL: Tensor | None = None,
        word_mask_BL: Tensor | None = None,
    ) -> EncodedQueries:
        """Encode token ids [B, L]. `word_ids_BL` are the words, ids of the student's tokenizer; None takes
        `input_ids_BL`, for an encoder with this tokenizer."""
        vectors_BE, features_BG = self.project(input_ids_BL, attention_mask_BL)
        words = self.config.query_layout.words
        if not words or self.words is None:
            return EncodedQueries(vectors_BE, features_BG)
        if word_ids_BL is None or word_mask_BL is None:
            word_ids_BL, word_mask_BL = input_ids_BL, attention_mask_BL
        words_BW = self.words.query(word_ids_BL, word_mask_BL, words)
        return EncodedQueries(vectors_BE, torch.cat([features_BG, words_BW], dim=-1))

    def word_mask(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return 1 for the tokens that have vectors, else 0, [B, L]: the student's words."""
        assert self.words is not None
        return attention_mask_BL * (self.words.idf(input_ids_BL) > 0).to(torch.float32)

    def encodings(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the encoder's token ids of queries, with prompt and truncated, as the runtime does."""
        return token_ids(self.tokenizer, list(strings(texts)), self.config.query_prompt, self.config.query_max_length)

    def student_encodings(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the student's token ids of queries, with its prompt and truncated to its limit."""
        prompt, max_length = self.config.student_prompt, self.config.student_max_length
        return token_ids(self.student_tokenizer, list(strings(texts)), prompt, max_length)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> EncodedQueries:
        """Encode any number of queries without gradients, in eval mode. The encoder's device computes; the result is on
        the CPU."""
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
        """Number of the encoder's parameters. The token weights of the words do not count."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, folder: StrPath) -> None:
        """Write the encoder to a new folder, atomically.

        Raises:
            OutputExistsError: `folder` exists and is not empty.
        """
        with new_folder(Path(folder)) as staging:
            weights = {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}
            save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, staging / WEIGHTS)
            for tokenizer, name in ((self.tokenizer, TOKENIZER), (self.student_tokenizer, STUDENT_TOKENIZER)):
                tokenizer.no_truncation()
                tokenizer.save(str(staging / name))
            if isinstance(self, SmallTransformer):
                self.backbone.save_pretrained(staging / BACKBONE)
            content = {"config": asdict(self.config), "provenance": self.provenance}
            (staging / CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: StrPath) -> SmallEncoder:
        """Read a folder that `save` wrote.

        Raises:
            ModelError: the folder is not a small query encoder, was made by an earlier version, or is incomplete or
                damaged; names the file.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise ModelError(
                f"{folder} is not a small query encoder: it has no {CONFIG}. Make one with: d2llm kale STUDENT "
                f"{folder} --queries FILE --layers 1"
            )
        remedy = "Align it again with d2llm kale."
        if is_of_earlier_form(folder, CONFIG, "feature_width", WEIGHTS, remedy):
            raise ModelError(f"{folder} was made by an earlier d2llm: align it again with d2llm kale")
        with reading(folder, CONFIG, remedy) as path:
            config, content = read_description(path, SmallEncoderConfig, {"pairs": "bigrams"})
        with reading(folder, TOKENIZER, remedy) as path:
            tokenizer = Tokenizer.from_file(str(path))
        with reading(folder, STUDENT_TOKENIZER, remedy) as path:
            student_tokenizer = Tokenizer.from_file(str(path))
        if config.kind != "static":
            with reading(folder, BACKBONE, remedy) as path:
                backbone = load_backbone(str(path))
        encoder: SmallEncoder
        with reading(folder, CONFIG, remedy):  # the config may not suit the backbone and the tokenizers
            if config.kind == "static":
                width = config.embedding_dim + config.query_layout.projection + config.query_layout.dim
                table_VO = torch.empty(tokenizer.get_vocab_size(), width)
                encoder = StaticTable(config, table_VO, tokenizer, student_tokenizer)
            else:
                encoder = SmallTransformer(config, backbone, tokenizer, student_tokenizer)
        with reading(folder, WEIGHTS, remedy) as path:
            weights = load_file(path)
            if "pairs.weight" in weights:  # the name in version 0.1
                weights["bigrams.weight"] = weights.pop("pairs.weight")
            encoder.words = Words(len(weights["words.idf_V"]))
            load_head_weights(encoder, weights)
        encoder.provenance = content.provenance
        return encoder.eval()


class SmallTransformer(SmallEncoder):
    """A small query encoder with a transformer: pooled token states, two linear projections, and token vectors.

    One projection gives the recall vector, the other is the one that the IEM reads. Pooling follows the config: the
    student's for its own layers, a PMA that starts as mean pooling for another model.

    Example:
        >>> from copy import deepcopy
        >>> from d2llm.small_encoder import from_layers
        >>> merged = deepcopy(student)
        >>> merged.merge_lora()
        >>> encoder = from_layers(merged, layers=[0])
        >>> encoder.recall.out_features == student.embedding_dim
        True
    """

    ordinary_V1: Tensor

    def __init__(
        self, config: SmallEncoderConfig, backbone: Backbone, tokenizer: Tokenizer, student_tokenizer: Tokenizer
    ) -> None:
        super().__init__(config, tokenizer, student_tokenizer)
        check_length("query_max_length", config.query_max_length, tokenizer, config.query_prompt, backbone)
        self.backbone = backbone
        self.rotary = is_rotary(backbone)
        dim = int(backbone.config.hidden_size)
        self.pma: PMA | Pooling = (
            PMA(dim, config.pma_heads, config.pma_start) if config.pooling == "pma" else Pooling(config.pooling)
        )
        self.recall = nn.Linear(dim, config.embedding_dim, bias=False)
        layout = config.query_layout
        self.query = nn.Linear(dim, layout.projection, bias=False) if layout.projection else None
        self.token_vectors = TokenVectors(dim, layout.dim) if layout.vectors else None
        if config.own_tokenizer:
            special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
            special.update(tokenizer.encode(config.query_prompt).ids)
            vocabulary = max(tokenizer.get_vocab_size(), int(backbone.config.vocab_size))
            ordinary_V1 = torch.tensor([[float(id_ not in special)] for id_ in range(vocabulary)])
            self.register_buffer("ordinary_V1", ordinary_V1, persistent=False)

    def states(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the token states [B, L, D], and the pooled ones [B, D], normalized to length 1."""
        states_BLD = token_states(self.backbone, self.rotary, input_ids_BL, attention_mask_BL)
        states_BLD = states_BLD.to(self.recall.weight.dtype)
        return states_BLD, F.normalize(self.pma(states_BLD, attention_mask_BL), dim=-1)

    def project(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return recall vectors [B, E] of length 1 and features [B, G] without words."""
        states_BLD, pooled_BD = self.states(input_ids_BL, attention_mask_BL)
        vectors_BE = F.normalize(self.recall(pooled_BD), dim=-1)
        features = [vectors_BE[:, :0]]
        if self.query is not None:
            # The student computes features from pooled states of length sqrt(D), so this encoder does too.
            features.append(self.query(pooled_BD * pooled_BD.shape[-1] ** 0.5))
        if self.token_vectors is not None:
            word_BL = self.word_mask(input_ids_BL, attention_mask_BL)
            features.append(self.token_vectors(states_BLD, word_BL, self.config.query_layout.vectors).flatten(1))
        return vectors_BE, torch.cat(features, dim=-1)

    def word_mask(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return 1 for the tokens that have vectors, else 0, [B, L]. With another tokenizer than the student's, these
        are all but special tokens and the prompt's."""
        if self.config.own_tokenizer:
            return F.embedding(input_ids_BL, self.ordinary_V1).squeeze(-1) * attention_mask_BL
        return super().word_mask(input_ids_BL, attention_mask_BL)


class StaticTable(SmallEncoder):
    """A small query encoder without a transformer: it adds up one table row for each token and each bigram.

    A row [E + F + d] is the token's contribution to the recall vector and to the IEM's projection, with its norm as the
    token's weight, and the token's vector for MaxSim. Bigrams (pairs of neighbouring tokens) distinguish "not in" from
    "in". A hash maps them to `config.bigrams` rows, as in fastText (arXiv 1607.04606). The sum is divided by the norm
    of its recall part, so recall vectors have length 1.

    Example:
        >>> from d2llm.small_encoder import from_tokens
        >>> table = from_tokens(student, bigrams=1024)
        >>> table.encode(["red shoes"]).features_BH.shape == (1, student.iem.layouts[0].width)
        True
    """

    def __init__(
        self, config: SmallEncoderConfig, table_VO: Tensor, tokenizer: Tokenizer, student_tokenizer: Tokenizer
    ) -> None:
        super().__init__(config, tokenizer, student_tokenizer)
        self.table = nn.Embedding(*table_VO.shape)
        self.table.weight.data = table_VO
        self.bigrams: nn.Embedding | None = None
        if config.bigrams:
            self.bigrams = nn.Embedding(config.bigrams, table_VO.shape[1] - config.query_layout.dim)
            nn.init.zeros_(self.bigrams.weight)

    def project(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return recall vectors [B, E] of length 1 and features [B, G] without words."""
        mask_BL, layout = attention_mask_BL.float(), self.config.query_layout
        rows_BLO, tokens_BLd = self.table(input_ids_BL).split(
            [self.config.embedding_dim + layout.projection, layout.dim], dim=-1
        )
        sum_BO = _sum(rows_BLO, mask_BL)
        if self.bigrams is not None:
            hash_BM = (input_ids_BL[:, :-1] * BIGRAM_HASH + input_ids_BL[:, 1:]).fmod(self.config.bigrams)
            sum_BO = sum_BO + _sum(self.bigrams(hash_BM), mask_BL[:, 1:])
        vector_BE, features_BF = sum_BO.split([self.config.embedding_dim, layout.projection], dim=-1)
        length_B1 = vector_BE.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        features = [features_BF / length_B1]
        if layout.vectors:
            word_BL = self.word_mask(input_ids_BL, mask_BL)
            features.append(pool_parts(tokens_BLd, word_BL, layout.vectors, earlier_first=True).flatten(1))
        return vector_BE / length_B1, torch.cat(features, dim=-1)


BIGRAM_HASH = 1_000_003
"""A prime factor for the first token of a bigram, so that the two orders of two tokens have different hashes."""


def _sum(rows_BLO: Tensor, mask_BL: Tensor) -> Tensor:
    """Return the sum [B, O] of the unmasked rows."""
    return (mask_BL.unsqueeze(1) @ rows_BLO).squeeze(1)


def from_layers(student: Student, layers: Sequence[int]) -> SmallEncoder:
    """Make a small encoder from some of the student's layers, with its embeddings, pooling and projections.

    `layers` are counted from 0. `student` must have merged its LoRA adapters. With all layers, `start="mean"` and a
    linear recall head, the encoder computes what the student computes for queries.

    Raises:
        ArgumentError: `layers` is empty, names a layer twice, or names a layer that the student lacks.
        ModelError: the backbone does not keep its layers in a list.
    """
    parent, name = layer_list(student.backbone)
    whole: nn.ModuleList = getattr(parent, name)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= index < len(whole) for index in layers):
        raise ArgumentError(
            f"layers {list(layers)}: choose one or more of the student's 0 to {len(whole) - 1}, each once"
        )
    chosen = tuple(sorted(layers))
    try:  # copy the backbone with the chosen layers only: the other layers may be most of an LLM
        setattr(parent, name, nn.ModuleList(whole[index] for index in chosen))
        backbone: Any = copy.deepcopy(student.backbone)
    finally:
        setattr(parent, name, whole)
    backbone.config.num_hidden_layers = len(chosen)
    if getattr(backbone.config, "layer_types", None):
        backbone.config.layer_types = [backbone.config.layer_types[index] for index in chosen]
    for index, layer in enumerate(getattr(*layer_list(backbone))):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    pooling, heads = student.config.pooling, student.config.pma_heads
    start = student.pma.start if isinstance(student.pma, PMA) else "mean"
    config = _config(student, "layers", layers=chosen, pooling=pooling, pma_heads=heads, pma_start=start)
    encoder = SmallTransformer(config, backbone, student.tokenizer, student.tokenizer)
    encoder.pma.load_state_dict(student.pma.state_dict())
    with torch.no_grad():
        if isinstance(student.recall_head, nn.Linear):
            encoder.recall.weight.copy_(student.recall_head.weight)
        else:
            nn.init.eye_(encoder.recall.weight)
        if encoder.query is not None and student.iem.query is not None:
            encoder.query.weight.copy_(student.iem.query.weight)
        if encoder.token_vectors is not None:
            encoder.token_vectors.load_state_dict(student.token_vectors.state_dict())
    return _finished(encoder, student)


def from_model(student: Student, backbone: str, *, prompt: str = "", max_length: int | None = None) -> SmallEncoder:
    """Make a small encoder from another pretrained model, with its own tokenizer and width.

    `backbone` is the model's hub id, folder or GGUF file. The encoder's two projections are random; the warm start of
    `d2llm kale` sets them. `max_length` in tokens defaults to the student's query limit, or to what the model can read
    if that is less.

    Raises:
        ModelError: the model cannot be loaded, or has no fast tokenizer.
        ArgumentError: the model cannot read `max_length` tokens.
    """
    network = load_backbone(backbone)
    if max_length is None:
        wanted = student.config.query_max_length
        max_length = min(wanted, positions(network) or wanted)
        if max_length < wanted:
            logger.warning("%s reads %d tokens of a query at most, the student reads %d", backbone, max_length, wanted)
    config = _config(student, "model", backbone=backbone, query_prompt=prompt, query_max_length=max_length)
    encoder = SmallTransformer(config, network, load_tokenizer(backbone), student.tokenizer)
    return _finished(encoder, student)


@torch.no_grad()
def from_tokens(student: Student, *, bigrams: int = BIGRAMS, batch_size: int = 512) -> SmallEncoder:
    """Make a static table with a row for each token of the student's tokenizer and `bigrams` rows for bigrams. The row
    of a token starts as the student's encoding of this token alone, times the square root of its idf. Rows of bigrams
    start at zero."""
    config = _config(student, "static", bigrams=bigrams)
    layout = config.query_layout
    student.eval()
    vocabulary = student.tokenizer.get_vocab_size()
    before, after = special_ids_around(student.tokenizer)
    parts = []
    for start in range(0, vocabulary, batch_size):
        ids = range(start, min(start + batch_size, vocabulary))
        encoded = student(*pad([[*before, id_, *after] for id_ in ids], student.device))
        # A text of one token has one vector, the first one.
        features_BG = encoded.query_features_BH[:, : layout.projection + layout.dim]
        parts.append(torch.cat([encoded.vectors_BE, features_BG], dim=-1).float().cpu())
    table_VO = torch.cat(parts)
    weight_V = student.words.idf_V[:vocabulary].cpu().sqrt()
    if weight_V.any():
        # Special tokens have idf 0. They still get a small weight here: they are in every query, so their rows can
        # learn what all queries share.
        table_VO *= weight_V.clamp(min=float(weight_V.max()) * 0.01).unsqueeze(-1)
    encoder = StaticTable(config, table_VO, student.tokenizer, student.tokenizer)
    return _finished(encoder, student)


def layer_count(student: Student) -> int:
    """Return the number of layers of the student's backbone."""
    return len(getattr(*layer_list(student.backbone)))


def _config(student: Student, kind: Kind, **options: Any) -> SmallEncoderConfig:
    prompt, limit = student.config.query_prompt, student.config.query_max_length
    return SmallEncoderConfig(
        **{
            "kind": kind,
            "student": student_digest(student),
            "embedding_dim": student.embedding_dim,
            "layout": student.iem.layouts[0],
            "student_prompt": prompt,
            "student_max_length": limit,
            "query_prompt": prompt,
            "query_max_length": limit,
            **options,
        }
    )


def _finished(encoder: SmallEncoder, student: Student) -> SmallEncoder:
    # Truncation is part of a tokenizer's state: the encoder must not share tokenizers with the student.
    tokenizers = encoder.tokenizer, encoder.student_tokenizer
    encoder.tokenizer, encoder.student_tokenizer = (Tokenizer.from_str(t.to_str()) for t in tokenizers)
    encoder.words = copy.deepcopy(student.words)
    return encoder.requires_grad_(True)
