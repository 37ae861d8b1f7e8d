"""The graphs of a model: their inputs, outputs and dynamic axes, and random inputs to trace them with.

The descriptions are `ExporterConfig`s of optimum, as for any other model that optimum exports.
"""

from __future__ import annotations

from typing import Any

import torch
from optimum.exporters.base import ExporterConfig
from optimum.utils.input_generators import DummyInputGenerator, DummyTextInputGenerator
from optimum.utils.normalized_config import NormalizedTextConfig
from torch import Tensor, nn
from transformers import PretrainedConfig

from d2llm.iem import IEM
from d2llm.small_encoder import SmallEncoder, SmallTransformer, StaticTable
from d2llm.student import Student


class EncoderConfig(ExporterConfig):  # type: ignore[misc]  # optimum has no types
    """`encoder.onnx`: from token ids to recall vectors and the features of both sides."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES: tuple[type[DummyInputGenerator], ...] = (DummyTextInputGenerator,)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input names and dynamic axes."""
        return {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Output names and dynamic axes."""
        return {name: {0: "batch"} for name in ("sentence_embedding", "query_features", "passage_features")}


class SmallEncoderOnnxConfig(EncoderConfig):
    """`query_encoder.onnx`: from token ids to recall vectors and query features."""

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Output names and dynamic axes."""
        return {name: {0: "batch"} for name in ("sentence_embedding", "query_features")}


class DummyWordInputGenerator(DummyInputGenerator):  # type: ignore[misc]  # optimum has no types
    """Token ids of the student's tokenizer, which gives a query another length than the encoder's tokenizer does."""

    SUPPORTED_INPUT_NAMES = ("word_ids", "word_mask")

    def __init__(self, task: str, normalized_config: Any, batch_size: int = 2, words: int = 11, **_: Any) -> None:
        self.shape, self.vocabulary = [batch_size, words], normalized_config.config.word_vocabulary

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Tensor:
        """Return random ids of the student's vocabulary, or a mask of ones."""
        if input_name == "word_mask":
            return torch.ones(self.shape, dtype=torch.long)
        ids: Tensor = self.random_int_tensor(self.shape, self.vocabulary, framework=framework, dtype=int_dtype)
        return ids


class TwoTokenizersConfig(SmallEncoderOnnxConfig):
    """`query_encoder.onnx` of an encoder with its own tokenizer: it reads words by the student's tokenizer."""

    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, DummyWordInputGenerator)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input names and dynamic axes."""
        return {**super().inputs, **{name: {0: "batch", 1: "words"} for name in ("word_ids", "word_mask")}}


class DummyPairInputGenerator(DummyInputGenerator):  # type: ignore[misc]  # optimum has no types
    """Random inputs of the IEM: features, cosines and tasks of a few queries with a few candidates each."""

    SUPPORTED_INPUT_NAMES = ("query_features", "passage_features", "recall_score", "task")

    def __init__(self, task: str, normalized_config: Any, queries: int = 2, candidates: int = 3, **_: Any) -> None:
        self.queries, self.candidates, self.sizes = queries, candidates, normalized_config.config

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Tensor:
        """Return a random tensor for `input_name`."""
        shapes = {
            "query_features": [self.queries, self.sizes.query_width],
            "recall_score": [self.queries, self.candidates],
        }
        if input_name == "task":
            tasks: Tensor = self.random_int_tensor([self.queries], 2, framework=framework, dtype=int_dtype)
            return tasks
        if input_name == "passage_features":
            shape = [self.queries, self.candidates, self.sizes.passage_bytes]
            return torch.randint(256, shape, dtype=torch.uint8)
        floats: Tensor = self.random_float_tensor(shapes[input_name], framework=framework, dtype=float_dtype)
        return floats


class IEMConfig(ExporterConfig):  # type: ignore[misc]  # optimum has no types
    """`iem.onnx`: from features and cosines of Q queries with K candidates each to the parts [Q, K, C] of scores."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyPairInputGenerator,)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input names and dynamic axes."""
        pairs = {0: "queries", 1: "candidates"}
        return {
            "query_features": {0: "queries"},
            "passage_features": pairs,
            "recall_score": pairs,
            "task": {0: "queries"},
        }

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Output names and dynamic axes."""
        return {"parts": {0: "queries", 1: "candidates"}}


class EncoderGraph(nn.Module):
    """The student's encoder as an exportable module: it runs the trained modules and returns plain tensors."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return recall vectors [B, E], query features [B, H] and packed passage features uint8 [B, P]."""
        encoded = self.student(input_ids, attention_mask)
        packed_BP = self.student.iem.layouts[1].pack(encoded.passage_features_BH)
        return encoded.vectors_BE, encoded.query_features_BH, packed_BP


class SmallEncoderGraph(nn.Module):
    """A small query encoder as an exportable module, with the input names of its graph."""

    def __init__(self, encoder: SmallEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        word_ids: Tensor | None = None,
        word_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return recall vectors [B, E] and query features [B, H]."""
        encoded = self.encoder(input_ids, attention_mask, word_ids, word_mask)
        return encoded.vectors_BE, encoded.features_BH


class IEMGraph(nn.Module):
    """The IEM as an exportable module, with the input names of its graph."""

    def __init__(self, iem: IEM) -> None:
        super().__init__()
        self.iem = iem

    def forward(self, query_features: Tensor, passage_features: Tensor, recall_score: Tensor, task: Tensor) -> Tensor:
        """Return the parts [Q, K, C] of the scores, from packed passage features uint8 [Q, K, P]."""
        layout, passage_layout = self.iem.layouts
        query = layout.split(query_features)
        if layout.vectors:
            query = query._replace(vectors=_filled(query.vectors))
        return self.iem.parts(query, passage_layout.unpack(passage_features), recall_score, task)


def _filled(vectors_QMd: Tensor) -> Tensor:
    """Return the vectors [Q, m, d] up to the last one that is not zero. Most queries have fewer than M vectors, and
    MaxSim takes longer than the rest of the score."""
    number_M = torch.arange(1, vectors_QMd.shape[1] + 1)
    filled_M = (vectors_QMd != 0).any(-1).any(0)
    filled = (number_M * filled_M).max().clamp(min=1).item()
    torch._check(filled >= 1)
    torch._check(filled <= vectors_QMd.shape[1])
    return vectors_QMd[:, :filled]


def encoder_graph(student: Student) -> tuple[nn.Module, EncoderConfig]:
    """Return the student's encoder as an exportable module, and the description of its inputs and outputs."""
    return EncoderGraph(student), EncoderConfig(student.backbone.config, task="feature-extraction")


def small_encoder_graph(encoder: SmallEncoder) -> tuple[nn.Module, SmallEncoderOnnxConfig]:
    """Return a small query encoder as an exportable module, and its description."""
    sizes: dict[str, int] = {}
    if isinstance(encoder, SmallTransformer):
        sizes["vocab_size"] = encoder.backbone.config.vocab_size
    elif isinstance(encoder, StaticTable):
        sizes["vocab_size"] = encoder.tokenizer.get_vocab_size()
    description = SmallEncoderOnnxConfig
    if encoder.config.own_tokenizer and encoder.config.query_layout.words and encoder.words is not None:
        sizes["word_vocabulary"], description = len(encoder.words.idf_V), TwoTokenizersConfig
    return SmallEncoderGraph(encoder), description(PretrainedConfig.from_dict(sizes), task="feature-extraction")


def iem_graph(student: Student) -> tuple[nn.Module, IEMConfig]:
    """Return the student's IEM as an exportable module, and its description."""
    query, passage = student.iem.layouts
    config = PretrainedConfig.from_dict({"query_width": query.width, "passage_bytes": passage.bytes})
    return IEMGraph(student.iem), IEMConfig(config, task="feature-extraction")


def dynamic_shapes(config: ExporterConfig, limits: dict[str, int]) -> dict[str, dict[int, torch.export.Dim]]:
    """Return the dynamic axes of a graph for torch.export. `limits` gives the largest size of each axis."""
    names = {name for axes in config.inputs.values() for name in axes.values()}
    dims = {name: torch.export.Dim(name, min=1, max=limits[name]) for name in names}
    return {key: {number: dims[name] for number, name in axes.items()} for key, axes in config.inputs.items()}
