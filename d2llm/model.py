"""The runtime: a model folder in onnxruntime. Texts in, arrays out; knows no torch and no index.

N texts, Q queries, K candidates a query, E recall width, H feature width, B batch, L tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from tqdm.auto import tqdm

from d2llm.errors import ArgumentError, DataError, MismatchError, ModelError
from d2llm.folder import (
    ENCODER,
    IEM,
    QUERY_ENCODER,
    QUERY_TOKENIZER,
    TOKENIZER,
    ModelConfig,
    check_files,
    read_config,
)
from d2llm.sessions import Device, Graph
from d2llm.tokens import encode_batch
from d2llm.types import Embeddings, Floats, Task, strings, task_id

CHUNK = 2048
"""Texts tokenised and sorted at a time: bounds memory, long enough that batches hold texts of one length."""
BATCH_TOKENS: dict[str, int] = {"cpu": 4096, "cuda": 32768}
"""Padded tokens in a batch."""


EncoderSize: TypeAlias = Literal["full", "small"]
ENCODER_SIZES: tuple[EncoderSize, ...] = get_args(EncoderSize)


def load(
    path: str | PathLike[str],
    device: Device = "cpu",
    *,
    threads: int | None = None,
    query_encoder: EncoderSize | None = None,
) -> Model:
    """Open the model folder at `path` on `device`, with `threads` CPU threads (default: one a core).

    `query_encoder` chooses the encoder of queries: the student's own (`full`), or the small one that was aligned to it
    (`small`). None takes the small one if the folder has one. With the small one, the full encoder is opened when the
    first passage is encoded: a process that only searches never holds it.

    Raises:
        ModelError: not a model folder, incomplete, changed since its export, or without the small query encoder that
            was asked for; names the file.
        DeviceError: `device` is not available. There is no fallback to another one.
    """
    folder = Path(path)
    config = read_config(folder)
    if query_encoder is not None and query_encoder not in ENCODER_SIZES:
        raise ArgumentError(f"unknown query encoder {query_encoder!r}: choose one of {', '.join(ENCODER_SIZES)}")
    small = config.query_encoder if query_encoder != "full" else None
    if query_encoder == "small" and small is None:
        raise ModelError(
            f"{folder} has no small query encoder. Make one with: d2llm kale STUDENT KALE --queries FILE; "
            f"d2llm-export onnx STUDENT {folder} --query-encoder KALE"
        )
    tokenizer = _tokenizer(folder, config, TOKENIZER, config.probe)
    document = TextEncoder(
        lambda: _graph(folder, config, ENCODER, device, threads),
        *("passage_features", config.embedding_dim, config.feature_dim),
        Reader(tokenizer, config.document_prompt, config.document_max_length),
    )
    full = Reader(tokenizer, config.query_prompt, config.query_max_length)
    if small is None:
        query = TextEncoder(lambda: document.graph, "query_features", config.embedding_dim, config.feature_dim, full)
    else:
        alone = small.kind == "static" or small.precision == "int8"  # one query is too small to split over threads
        own = _tokenizer(folder, config, QUERY_TOKENIZER, small.probe) if small.own_tokenizer else tokenizer
        query = TextEncoder(
            lambda: _graph(folder, config, QUERY_ENCODER, device, 1 if threads is None and alone else threads),
            *("query_features", config.embedding_dim, config.feature_dim),
            Reader(own, small.query_prompt, small.query_max_length),
            full if small.own_tokenizer else None,
        )
    query.open()  # what is wrong with it is reported before the first query
    iem = _graph(folder, config, IEM, device, 1)  # a few million multiply-adds: threads would cost more than they give
    return Model(config, query, document, iem, "full" if small is None else "small")


def _graph(folder: Path, config: ModelConfig, name: str, device: Device, threads: int | None) -> Graph:
    check_files(folder, config, [name])
    return Graph(folder / name, device, threads)


def _tokenizer(folder: Path, config: ModelConfig, name: str, probe: Mapping[str, Any]) -> Tokenizer:
    check_files(folder, config, [name])
    tokenizer = Tokenizer.from_file(str(folder / name))
    found = tokenizer.encode(probe["text"]).ids
    if found != probe["ids"]:
        raise ModelError(
            f"{folder / name} reads the probe sentence as {found[:8]}..., at export it was {probe['ids'][:8]}...: "
            "install the tokenizers version of the export, or export again."
        )
    return tokenizer


class Tokens(NamedTuple):
    """A text as an encoder reads it: the `ids` of its tokenizer. An encoder with a tokenizer of its own also needs the
    `student_ids` of the student's tokenizer, for the word slots. `truncated` texts were longer than the limit and lost
    their tail."""

    ids: list[int]
    student_ids: list[int]
    truncated: bool


class Reader:
    """A tokenizer with the prompt that goes before each text and the limit, in tokens, that all is cut to."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, max_length: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())  # truncation is the tokenizer's state: one for each
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._prompt, self._max_length = prompt, max_length

    def __call__(self, texts: Sequence[str]) -> list[Encoding]:
        """Token ids of each text."""
        whole = [self._prompt + text for text in texts] if self._prompt else texts
        return encode_batch(self._tokenizer, whole, self._max_length)


class TextEncoder:
    """One side of a model: how its texts are read, and the graph that encodes them. Thread-safe."""

    def __init__(
        self,
        open_graph: Callable[[], Graph],
        features: str,
        embedding_dim: int,
        feature_dim: int,
        reader: Reader,
        student_reader: Reader | None = None,
    ) -> None:
        """`open_graph` is called once, when the graph is first needed. `features` names the output that is this
        side's; `student_reader` reads the student's tokens, if `reader` reads those of another
        tokenizer."""
        self._open_graph, self._lock = open_graph, threading.Lock()
        self._graph: Graph | None = None
        self._features, self._embedding_dim, self._feature_dim = features, embedding_dim, feature_dim
        self._reader, self._student_reader = reader, student_reader

    def open(self) -> Graph:
        """Open the graph, unless it is open, and return it."""
        if self._graph is None:
            with self._lock:
                self._graph = self._graph or self._open_graph()
        return self._graph

    @property
    def graph(self) -> Graph:
        """The graph, opened if it was not yet."""
        return self.open()

    def tokenize(self, texts: Iterable[str]) -> list[Tokens]:
        """Token ids of texts: prompt added, cut to the limit.

        Raises:
            TypeError: `texts` is a single string, or one of them is no string.
        """
        texts = list(strings(texts))
        encodings = self._reader(texts)
        others = self._student_reader(texts) if self._student_reader else [None] * len(encodings)
        return [
            Tokens(own.ids, [] if other is None else other.ids, bool(own.overflowing))
            for own, other in zip(encodings, others, strict=True)
        ]

    def run(self, batch: Sequence[Tokens], *, keep_features: bool = False) -> tuple[Floats, Any]:
        """Run the graph on one batch: vectors [B, E] and features [B, H], these left on the device if wanted."""
        feeds = _padded("input_ids", "attention_mask", [tokens.ids for tokens in batch])
        if self._student_reader is not None:
            feeds |= _padded("word_ids", "word_mask", [tokens.student_ids for tokens in batch])
        out = self.graph.run(
            {name: feeds[name] for name in self.graph.inputs},
            keep=[self._features] if keep_features else [],
            outputs=["sentence_embedding", self._features],
        )
        return out["sentence_embedding"], out[self._features]

    def encode(self, texts: Iterable[str], *, progress: bool = False) -> Embeddings:
        """Encode N texts, in batches of similar length. Too long ones lose their tail and are counted.

        Raises:
            DataError: a text is empty or blank; says which.
            TypeError: `texts` is a single string, or one of them is no string.
        """
        texts = list(strings(texts))
        _reject_empty(texts)
        whole = Embeddings(
            np.empty((len(texts), self._embedding_dim), np.float32),
            np.empty((len(texts), self._feature_dim), np.float32),
        )
        truncated = 0
        with tqdm(total=len(texts), unit="text", disable=not progress) as bar:
            for start in range(0, len(texts), CHUNK):
                part = slice(start, start + CHUNK)
                found = self.encode_tokens(self.tokenize(texts[part]), bar.update)
                whole.vectors[part], whole.features[part] = found.vectors, found.features
                truncated += found.truncated
        return replace(whole, truncated=truncated)

    def encode_tokens(self, texts: Sequence[Tokens], done: Callable[[int], Any] | None = None) -> Embeddings:
        """Encode N texts that `tokenize` has read, in batches of similar length; `done` hears of each batch's size."""
        vectors_NE = np.empty((len(texts), self._embedding_dim), np.float32)
        features_NH = np.empty((len(texts), self._feature_dim), np.float32)
        for rows in _batches([len(tokens.ids) for tokens in texts], BATCH_TOKENS[self.graph.device]):
            vectors_NE[rows], features_NH[rows] = self.run([texts[row] for row in rows])
            if done is not None:
                done(len(rows))
        return Embeddings(vectors_NE, features_NH, sum(tokens.truncated for tokens in texts))


class Model:
    """Both encoders and the IEM of one model folder. Thread-safe. Made by `load`, after a fork if there is one: in a
    forked child, all that encodes or scores raises a `DeviceError`.

    `query` and `document` are the two sides; `query_encoder` says which encoder reads queries.
    """

    def __init__(
        self, config: ModelConfig, query: TextEncoder, document: TextEncoder, iem: Graph, query_encoder: EncoderSize
    ) -> None:
        self.config, self.query, self.document, self.query_encoder = config, query, document, query_encoder
        self._iem = iem

    @property
    def device(self) -> Device:
        """Where the graphs run."""
        return self._iem.device

    def encode_query(self, texts: Iterable[str], *, progress: bool = False) -> Embeddings:
        """Encode N queries. Too long ones lose their tail and are counted.

        Raises:
            DataError: a text is empty or blank; says which.
            TypeError: `texts` is a single string, or one of them is no string.
        """
        return self.query.encode(texts, progress=progress)

    def encode_document(self, texts: Iterable[str], *, progress: bool = False) -> Embeddings:
        """Encode N passages. Too long ones lose their tail and are counted.

        Raises:
            DataError: a text is empty or blank; says which.
            TypeError: `texts` is a single string, or one of them is no string.
        """
        return self.document.encode(texts, progress=progress)

    def score(
        self,
        query_features: Floats | Any,
        passage_features: npt.NDArray[np.floating[Any]],
        recall_score: Floats,
        task: Task = "asymmetric",
    ) -> Floats:
        """IEM scores [Q, K] of Q queries, each with its own K candidates.

        `query_features` [Q, H] (an array, or what `TextEncoder.run` left on the device), `passage_features` [Q, K, H],
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

    def score_pairs(self, queries: Iterable[str], documents: Iterable[str], task: Task = "asymmetric") -> Floats:
        """IEM scores [N] of N (query, document) pairs of texts.

        Raises:
            ArgumentError: not as many queries as documents, or an unknown task.
            DataError: a text is empty or blank; says which.
            TypeError: either is a single string, or a text is no string.
        """
        queries, documents = list(strings(queries)), list(strings(documents))
        if len(queries) != len(documents):
            raise ArgumentError(f"pairs need as many queries as documents, found {len(queries)} and {len(documents)}")
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


def _padded(ids_name: str, mask_name: str, rows: Sequence[Sequence[int]]) -> dict[str, npt.NDArray[np.int64]]:
    """Token ids and attention mask [B, L] int64 of one batch, padded on the right."""
    if len(rows) == 1:  # a search: there is nothing to pad
        ids_1L = np.array(rows, np.int64)
        return {ids_name: ids_1L, mask_name: np.ones_like(ids_1L)}
    ids_BL = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask_BL = np.zeros_like(ids_BL)
    for row, ids in enumerate(rows):
        ids_BL[row, : len(ids)] = ids
        mask_BL[row, : len(ids)] = 1
    return {ids_name: ids_BL, mask_name: mask_BL}


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
