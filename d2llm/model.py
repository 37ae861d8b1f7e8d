"""The runtime: a model folder in onnxruntime. Texts in, arrays out; knows no torch and no index.

N texts, Q queries, K candidates a query, E recall width, H feature width, B batch, L tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from tqdm.auto import tqdm

from d2llm.errors import DataError, MismatchError, ModelError
from d2llm.folder import ENCODER, IEM, TOKENIZER, ModelConfig, read_config
from d2llm.sessions import Device, Graph
from d2llm.types import Embeddings, Floats, Task, task_id

logger = logging.getLogger(__name__)

CHUNK = 2048
"""Texts tokenised and sorted at a time: bounds memory, long enough that batches hold texts of one length."""
BATCH_TOKENS: dict[str, int] = {"cpu": 4096, "cuda": 32768}
"""Padded tokens in a batch."""


def load(path: str | PathLike[str], device: Device = "cpu", *, threads: int | None = None) -> Model:
    """Open the model folder at `path` on `device`, with `threads` CPU threads (default: one a core).

    Raises:
        ModelError: not a model folder, incomplete, or changed since its export; names the file.
        DeviceError: `device` is not available. There is no fallback to another one.
    """
    folder = Path(path)
    config = read_config(folder)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    found = tokenizer.encode(config.probe["text"]).ids
    if found != config.probe["ids"]:
        raise ModelError(
            f"{folder / TOKENIZER} reads the probe sentence as {found[:8]}..., at export it was "
            f"{config.probe['ids'][:8]}...: install the tokenizers version of the export, or export again."
        )
    encoder = Graph(folder / ENCODER, device, threads)
    iem = Graph(folder / IEM, device, 1)  # a few million multiply-adds: threads would cost more than they give
    return Model(config, tokenizer, encoder, iem)


class Model:
    """Encoder and IEM of one model folder, with its tokenizer. Thread-safe. Made by `load`."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, encoder: Graph, iem: Graph) -> None:
        self.config = config
        self._encoder, self._iem = encoder, iem
        self._query_tokenizer = _truncating(tokenizer, config.query_max_length)
        self._document_tokenizer = _truncating(tokenizer, config.document_max_length)

    @property
    def device(self) -> Device:
        """Where the graphs run."""
        return self._encoder.device

    def encode_query(self, texts: Sequence[str], *, progress: bool = False) -> Embeddings:
        """Encode N queries. Too long ones lose their tail and are counted.

        Raises:
            DataError: a text is empty or blank; says which.
        """
        return self._encode(texts, self.tokenize_query, "query_features", progress)

    def encode_document(self, texts: Sequence[str], *, progress: bool = False) -> Embeddings:
        """Encode N passages. Too long ones lose their tail and are counted.

        Raises:
            DataError: a text is empty or blank; says which.
        """
        return self._encode(texts, self.tokenize_document, "passage_features", progress)

    def encode_queries(self, texts: Sequence[str]) -> Floats:
        """Recall vectors [N, E] alone, under the name that pipelines for bi-encoders call."""
        return self.encode_query(texts).vectors

    def encode_corpus(self, texts: Sequence[str]) -> Floats:
        """Recall vectors [N, E] alone, under the name that pipelines for bi-encoders call."""
        return self.encode_document(texts).vectors

    def tokenize_query(self, texts: Sequence[str]) -> list[Encoding]:
        """Token ids of queries: prompt added, cut to the limit."""
        return _tokenize(self._query_tokenizer, self.config.query_prompt, texts)

    def tokenize_document(self, texts: Sequence[str]) -> list[Encoding]:
        """Token ids of passages: prompt added, cut to the limit."""
        return _tokenize(self._document_tokenizer, self.config.document_prompt, texts)

    def score(
        self,
        query_features: Floats | Any,
        passage_features: npt.NDArray[np.floating[Any]],
        recall_score: Floats,
        task: Task = "asymmetric",
    ) -> Floats:
        """IEM scores [Q, K] of Q queries, each with its own K candidates.

        `query_features` [Q, H] (an array, or what `encode_tokens` left on the device), `passage_features` [Q, K, H],
        `recall_score` [Q, K] cosines. Scores order one query's candidates; they are no probabilities.

        Raises:
            MismatchError: the features have another width than this model's.
        """
        branch = task_id(task)
        if passage_features.shape[-1] != self.config.feature_dim:
            raise MismatchError(
                f"passage features are {passage_features.shape[-1]} wide, this model's are {self.config.feature_dim}: "
                "they come from another model"
            )
        if recall_score.size == 0:
            return np.zeros(recall_score.shape, np.float32)
        feeds = {
            "query_features": query_features,
            "passage_features": passage_features.astype(np.float32, copy=False),
            "recall_score": recall_score.astype(np.float32, copy=False),
            "task": np.full(len(recall_score), branch, np.int64),
        }
        scores: Floats = self._iem.run(feeds)["score"]
        return scores

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], task: Task = "asymmetric") -> Floats:
        """IEM scores [N] of N (query, document) pairs of texts."""
        if len(queries) != len(documents):
            raise ValueError(f"pairs need as many queries as documents, found {len(queries)} and {len(documents)}")
        query, document = self.encode_query(queries), self.encode_document(documents)
        cosine = np.einsum("ne,ne->n", query.vectors, document.vectors)
        return self.score(query.features, document.features[:, None], cosine[:, None], task)[:, 0]

    def score_all(self, query: Embeddings, documents: Embeddings, task: Task = "asymmetric") -> Floats:
        """IEM scores [Q, N] of every query with every document: slow and exact, what recall is measured against."""
        cosine_QN = query.vectors @ documents.vectors.T
        scores_QN = np.empty(cosine_QN.shape, np.float32)
        for row, features in enumerate(query.features):
            for start in range(0, len(documents), CHUNK):
                part = slice(start, start + CHUNK)
                scores_QN[row, part] = self.score(
                    features[None], documents.features[None, part], cosine_QN[row : row + 1, part], task
                )[0]
        return scores_QN

    def encode_tokens(self, encodings: Sequence[Encoding], features: str, *, keep_features: bool = False) -> Any:
        """Run the encoder on one batch: (vectors [B, E], features [B, H], left on the device if `keep_features`)."""
        length = max(len(encoding.ids) for encoding in encodings)
        input_ids_BL = np.zeros((len(encodings), length), np.int64)
        attention_mask_BL = np.zeros_like(input_ids_BL)
        for row, encoding in enumerate(encodings):
            input_ids_BL[row, : len(encoding.ids)] = encoding.ids
            attention_mask_BL[row, : len(encoding.ids)] = 1
        out = self._encoder.run(
            {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL},
            keep=[features] if keep_features else [],
            outputs=["sentence_embedding", features],
        )
        return out["sentence_embedding"], out[features]

    def _encode(self, texts: Sequence[str], tokenize: Any, features: str, progress: bool) -> Embeddings:
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, found a single string: pass [text]")
        _reject_empty(texts)
        vectors_NE = np.empty((len(texts), self.config.embedding_dim), np.float32)
        features_NH = np.empty((len(texts), self.config.feature_dim), np.float32)
        truncated = 0
        with tqdm(total=len(texts), unit="text", disable=not progress) as bar:
            for start in range(0, len(texts), CHUNK):
                encodings = tokenize(texts[start : start + CHUNK])
                truncated += sum(bool(encoding.overflowing) for encoding in encodings)
                for batch in _batches([len(e.ids) for e in encodings], BATCH_TOKENS[self.device]):
                    rows = [start + index for index in batch]
                    vectors_NE[rows], features_NH[rows] = self.encode_tokens([encodings[i] for i in batch], features)
                    bar.update(len(batch))
        return Embeddings(vectors_NE, features_NH, truncated)


def _truncating(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())  # truncation is the tokenizer's state: one for each side
    copy.no_padding()
    copy.enable_truncation(max_length)
    return copy


def _tokenize(tokenizer: Tokenizer, prompt: str, texts: Sequence[str]) -> list[Encoding]:
    return tokenizer.encode_batch([prompt + text for text in texts] if prompt else list(texts))


def _reject_empty(texts: Sequence[str]) -> None:
    for index, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"text {index} of {len(texts)} is empty: there is nothing to encode")


def _batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Group indices into batches of similar length, longest first, whose padded size stays within `budget` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
