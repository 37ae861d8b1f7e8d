"""The runtime: runs a model folder in onnxruntime, from texts to arrays. It needs neither torch nor an index.

Dimensions: N texts, Q queries, K candidates of a query, E width of the recall vector, H columns of query features, P
bytes of passage features, C parts of a score, B texts of a batch, L tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
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
from d2llm.pipeline import mapped
from d2llm.sessions import Device, Graph
from d2llm.tokens import batches_of, encode_batch
from d2llm.types import Bytes, Embeddings, Floats, StrPath, Task, strings, task_id

CHUNK = 2048
"""Number of texts that are tokenized and sorted by length together. It bounds memory, and is large enough to make
batches of nearly equal lengths."""

EncoderSize: TypeAlias = Literal["full", "small"]
ENCODER_SIZES: tuple[EncoderSize, ...] = get_args(EncoderSize)


def load(
    path: StrPath,
    device: Device = "cpu",
    *,
    threads: int | None = None,
    query_encoder: EncoderSize | None = None,
) -> Model:
    """Open the model folder at `path` on `device`, with `threads` CPU threads (default: one per core).

    `query_encoder` chooses the encoder of queries: the student's own encoder (`full`) or the small query encoder that
    was aligned to it (`small`). None chooses the small encoder if the folder has one. With the small encoder, the full
    encoder is opened only when the first passage is encoded, so a process that only searches never loads it.

    Raises:
        ModelError: the folder is not a model, is incomplete, was changed since its export, or has no small query
            encoder although `query_encoder="small"`; names the file.
        DeviceError: `device` is not available. d2llm never falls back to another device.
        ArgumentError: `device`, `threads` or `query_encoder` has an impossible value.
    """
    folder = Path(path)
    config = read_config(folder)
    if query_encoder is not None and query_encoder not in ENCODER_SIZES:
        raise ArgumentError(f"unknown query encoder {query_encoder!r}: choose one of {', '.join(ENCODER_SIZES)}")
    small = config.query_encoder if query_encoder != "full" else None
    if query_encoder == "small" and small is None:
        raise ModelError(
            f"{folder} has no small query encoder. Make one with: d2llm kale STUDENT KALE --queries FILE --layers 1; "
            f"d2llm-export onnx STUDENT {folder} --query-encoder KALE"
        )
    tokenizer = _tokenizer(folder, config, TOKENIZER, config.probe)
    document = TextEncoder(
        lambda: _graph(folder, config, ENCODER, device, threads),
        *("passage_features", config.embedding_dim, config.feature_bytes, np.uint8),
        Reader(tokenizer, config.document_prompt, config.document_max_length),
    )
    sizes = config.embedding_dim, config.query_width, np.float32
    full = Reader(tokenizer, config.query_prompt, config.query_max_length)
    if small is None:
        query = TextEncoder(lambda: document.graph, "query_features", *sizes, full)
    else:
        # One query is too little work for several threads.
        single_thread = threads is None and (small.kind == "static" or small.precision == "int8")
        own = _tokenizer(folder, config, QUERY_TOKENIZER, small.probe) if small.own_tokenizer else tokenizer
        query = TextEncoder(
            lambda: _graph(folder, config, QUERY_ENCODER, device, 1 if single_thread else threads),
            *("query_features", *sizes),
            Reader(own, small.query_prompt, small.query_max_length),
            full if small.own_tokenizer else None,
        )
    query.open()  # report a damaged graph now, not at the first query
    iem = _graph(folder, config, IEM, device, 1)  # a few million multiply-adds: too little work for several threads
    return Model(config, query, document, iem, "full" if small is None else "small")


def _graph(folder: Path, config: ModelConfig, name: str, device: Device, threads: int | None) -> Graph:
    check_files(folder, config, [name])
    return Graph(folder / name, device, threads)


def _tokenizer(folder: Path, config: ModelConfig, name: str, probe: Mapping[str, Any]) -> Tokenizer:
    check_files(folder, config, [name])
    tokenizer = Tokenizer.from_file(str(folder / name))
    ids = tokenizer.encode(probe["text"]).ids
    if ids != probe["ids"]:
        raise ModelError(
            f"{folder / name} reads the probe sentence as {ids[:8]}..., at export it was {probe['ids'][:8]}...: "
            "install the tokenizers version of the export, or export again."
        )
    return tokenizer


class Tokens(NamedTuple):
    """The token ids of one text."""

    ids: list[int]
    """Ids of the encoder's tokenizer."""
    student_ids: list[int]
    """Ids of the student's tokenizer, for the words of an encoder with its own tokenizer; empty for others."""
    truncated: bool
    """Whether the text was longer than the limit and lost its end."""


class Span(NamedTuple):
    """A token and its characters in a text."""

    id: int
    start: int
    """The first character. It is below 0 in the prompt, which is before the text."""
    end: int
    """The character after the last one."""
    text: str


class Reader:
    """A tokenizer that puts a prompt before each text and truncates to a limit in tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, max_length: int) -> None:
        # Copies, since truncation is part of a tokenizer's state.
        self._tokenizer, self._unlimited = (Tokenizer.from_str(tokenizer.to_str()) for _ in range(2))
        self._tokenizer.no_padding()
        self._unlimited.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._unlimited.no_truncation()
        self._prompt, self._max_length = prompt, max_length

    def spans(self, text: str) -> list[Span]:
        """Return the tokens of one text and its prompt, up to the limit. Special tokens have no characters."""
        (encoding,) = self([text])
        skipped = len(self._prompt)
        return [
            Span(id_, start - skipped, end - skipped, (self._prompt + text)[start:end])
            for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if start < end
        ]

    def __call__(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize each text."""
        return encode_batch(self._tokenizer, [self._prompt + text for text in texts], self._max_length)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, with the prompt, without the limit."""
        return [len(encoding) for encoding in self._unlimited.encode_batch([self._prompt + text for text in texts])]


class TextEncoder:
    """The encoder of one side of a model: its tokenizer and its graph. Thread-safe."""

    def __init__(
        self,
        open_graph: Callable[[], Graph],
        features: str,
        embedding_dim: int,
        feature_size: int,
        feature_type: type[np.float32 | np.uint8],
        reader: Reader,
        student_reader: Reader | None = None,
    ) -> None:
        """`open_graph` is called once, when the graph is first needed. `features` is the name of the graph's output
        with the features of this side. `student_reader` is the student's tokenizer, if `reader` is another one."""
        self._open_graph, self._lock = open_graph, threading.Lock()
        self._graph: Graph | None = None
        self._features, self._embedding_dim = features, embedding_dim
        self._feature_size, self._feature_type = feature_size, feature_type
        self._reader, self._student_reader = reader, student_reader

    def open(self) -> Graph:
        """Open the graph if it is not open yet, and return it."""
        if self._graph is None:
            with self._lock:
                self._graph = self._graph or self._open_graph()
        return self._graph

    @property
    def graph(self) -> Graph:
        """The graph. The first access opens it."""
        return self.open()

    def tokenize(self, texts: Iterable[str]) -> list[Tokens]:
        """Tokenize texts, with the prompt and truncated to the limit.

        Raises:
            DataError: a text cannot be written as UTF-8.
            TypeError: `texts` is a single string, or a text is not a string.
        """
        texts = list(strings(texts))
        encodings = self._reader(texts)
        student_encodings = self._student_reader(texts) if self._student_reader else [None] * len(encodings)
        return [
            Tokens(encoding.ids, [] if student is None else student.ids, bool(encoding.overflowing))
            for encoding, student in zip(encodings, student_encodings, strict=True)
        ]

    def word_spans(self, text: str) -> list[Span]:
        """Return the tokens that may be words of the features of one text, those of the student's tokenizer."""
        return (self._student_reader or self._reader).spans(text)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, with the prompt and special tokens, without the limit."""
        return self._reader.count(texts)

    def run(self, batch: Sequence[Tokens], *, keep_features: bool = False) -> tuple[Floats, Any]:
        """Run the graph on one batch; return the recall vectors [B, E] and the features [B, H] of this side.

        With `keep_features` the features stay on the device, as an `OrtValue`.
        """
        feeds = _padded("input_ids", "attention_mask", [tokens.ids for tokens in batch])
        if self._student_reader is not None:
            feeds |= _padded("word_ids", "word_mask", [tokens.student_ids for tokens in batch])
        outputs = self.graph.run(
            {name: feeds[name] for name in self.graph.inputs},
            keep=[self._features] if keep_features else [],
            outputs=["sentence_embedding", self._features],
        )
        return outputs["sentence_embedding"], outputs[self._features]

    def encode(self, texts: Iterable[str], *, progress: bool = False) -> Embeddings:
        """Encode N texts in batches of similar length. Texts above the limit lose their end; `truncated` counts them.

        Raises:
            DataError: a text is empty or blank, or cannot be written as UTF-8; says which.
            TypeError: `texts` is a single string, or a text is not a string.
        """
        texts = list(strings(texts))
        _reject_empty(texts)
        embeddings = Embeddings(
            np.empty((len(texts), self._embedding_dim), np.float32),
            np.empty((len(texts), self._feature_size), self._feature_type),
        )
        truncated = 0
        with tqdm(total=len(texts), unit="text", disable=not progress) as bar:
            for start in range(0, len(texts), CHUNK):
                rows = slice(start, start + CHUNK)
                chunk = self.encode_tokens(self.tokenize(texts[rows]), bar.update)
                embeddings.vectors[rows], embeddings.features[rows] = chunk.vectors, chunk.features
                truncated += chunk.truncated
        return replace(embeddings, truncated=truncated)

    def encode_tokens(self, texts: Sequence[Tokens], done: Callable[[int], Any] | None = None) -> Embeddings:
        """Encode N tokenized texts in batches of similar length. `done` is called with the size of each batch."""
        vectors_NE = np.empty((len(texts), self._embedding_dim), np.float32)
        features_NH = np.empty((len(texts), self._feature_size), self._feature_type)
        graph, batches = self.graph, list(batches_of([len(tokens.ids) for tokens in texts], self.graph.batch_tokens))
        inputs = ([texts[row] for row in rows] for rows in batches)
        with closing(mapped(self.run, inputs, min(graph.batches_at_a_time, max(1, len(batches))))) as results:
            for rows, (vectors_BE, features_BH) in zip(batches, results, strict=True):
                vectors_NE[rows], features_NH[rows] = vectors_BE, features_BH
                if done is not None:
                    done(len(rows))
        return Embeddings(vectors_NE, features_NH, sum(tokens.truncated for tokens in texts))


class Model:
    """An opened model folder: it encodes queries and passages, and scores them with the IEM. Made by `load`.

    `query` and `document` encode the two sides. `query_encoder` is the encoder of queries, `full` or `small`.

    A model is thread-safe, but does not survive a fork: in a forked child, its methods raise a `DeviceError`. Load it
    in the child.

    Example:
        >>> import d2llm
        >>> model = d2llm.load(model_folder)
        >>> queries = model.encode_query(["How do I read a file?"])
        >>> documents = model.encode_document(["Call open(path).read().", "Vitamin D is made in the skin."])
        >>> documents.vectors.shape == (2, model.config.embedding_dim)
        True
        >>> model.score_all(queries, documents).shape
        (1, 2)
    """

    def __init__(
        self, config: ModelConfig, query: TextEncoder, document: TextEncoder, iem: Graph, query_encoder: EncoderSize
    ) -> None:
        self.config, self.query, self.document, self.query_encoder = config, query, document, query_encoder
        self._iem = iem

    @property
    def device(self) -> Device:
        """The device that the graphs run on."""
        return self._iem.device

    def encode_query(self, texts: Iterable[str], *, progress: bool = False) -> Embeddings:
        """Encode N queries. Queries above the limit lose their end; `truncated` counts them.

        Raises:
            DataError: a text is empty or blank, or cannot be written as UTF-8; says which.
            TypeError: `texts` is a single string, or a text is not a string.
        """
        return self.query.encode(texts, progress=progress)

    def encode_document(self, texts: Iterable[str], *, progress: bool = False) -> Embeddings:
        """Encode N passages. Passages above the limit lose their end; `truncated` counts them.

        Raises:
            DataError: a text is empty or blank, or cannot be written as UTF-8; says which.
            TypeError: `texts` is a single string, or a text is not a string.
        """
        return self.document.encode(texts, progress=progress)

    def parts(
        self,
        query_features: Floats | Any,
        passage_features: Bytes,
        recall_score: Floats,
        task: Task = "asymmetric",
    ) -> Floats:
        """Return the parts [Q, K, C] float32 of the IEM scores of Q queries with K candidates each.

        The parts are `config.parts`: the cosine, BM25 over the words of both texts, MaxSim over their vectors, and the
        MLP, as far as the model has them. Arguments are those of `score`.

        Raises:
            MismatchError: the passage features have another size than this model's.
            ArgumentError: an unknown task.
        """
        branch = task_id(task)
        if passage_features.shape[-1] != self.config.feature_bytes:
            raise MismatchError(
                f"passage features have {passage_features.shape[-1]} bytes, this model's have "
                f"{self.config.feature_bytes}: encode the passages with this model"
            )
        if recall_score.size == 0:
            return np.zeros((*recall_score.shape, len(self.config.parts)), np.float32)
        feeds = {
            "query_features": query_features,
            "passage_features": passage_features,
            "recall_score": recall_score.astype(np.float32, copy=False),
            "task": np.full(len(recall_score), branch, np.int64),
        }
        parts: Floats = self._iem.run({name: feeds[name] for name in self._iem.inputs})["parts"]
        return parts

    def score(
        self,
        query_features: Floats | Any,
        passage_features: Bytes,
        recall_score: Floats,
        task: Task = "asymmetric",
        *,
        scales: Sequence[float] | None = None,
    ) -> Floats:
        """Return the IEM scores [Q, K] float32 of Q queries with K candidates each, the weighted sums of their `parts`.

        Arguments are `query_features` [Q, H] float32 (an array, or the `OrtValue` of `TextEncoder.run`),
        `passage_features` [Q, K, P] uint8, and the cosines `recall_score` [Q, K]. `scales` are the weights of
        `config.parts`; None takes the model's. Scores rank the candidates of one query; they are not probabilities.

        Raises:
            MismatchError: the passage features have another size than this model's.
            ArgumentError: an unknown task, or another number of scales than of parts.
        """
        chosen = self.config.scales[task] if scales is None and task in self.config.scales else scales
        parts_QKC = self.parts(query_features, passage_features, recall_score, task)
        if chosen is None or len(chosen) != parts_QKC.shape[-1]:
            raise ArgumentError(f"expected one scale for each of {', '.join(self.config.parts)}, found {chosen}")
        scores: Floats = parts_QKC @ np.array(chosen, np.float32)
        return scores

    def score_pairs(self, queries: Iterable[str], documents: Iterable[str], task: Task = "asymmetric") -> Floats:
        """Return the IEM scores [N] float32 of N pairs of a query and a document, given as texts.

        Raises:
            ArgumentError: the numbers of queries and documents differ, or the task is unknown.
            DataError: a text is empty or blank, or cannot be written as UTF-8; says which.
            TypeError: `queries` or `documents` is a single string, or a text is not a string.
        """
        queries, documents = list(strings(queries)), list(strings(documents))
        if len(queries) != len(documents):
            raise ArgumentError(f"pairs need as many queries as documents, found {len(queries)} and {len(documents)}")
        query, document = self.encode_query(queries), self.encode_document(documents)
        cosine = np.einsum("ne,ne->n", query.vectors, document.vectors)
        return self.score(query.features, document.features[:, None], cosine[:, None], task)[:, 0]

    def score_all(self, query: Embeddings, documents: Embeddings, task: Task = "asymmetric") -> Floats:
        """Return the IEM scores [Q, N] float32 of every query with every document. Slow and exact: the reference that
        recall is measured against."""
        cosine_QN = query.vectors @ documents.vectors.T
        scores_QN = np.empty(cosine_QN.shape, np.float32)
        for row, features in enumerate(query.features):
            for start in range(0, len(documents), CHUNK):
                columns = slice(start, start + CHUNK)
                scores_QN[row, columns] = self.score(
                    features[None], documents.features[None, columns], cosine_QN[row : row + 1, columns], task
                )[0]
        return scores_QN


def _padded(ids_name: str, mask_name: str, rows: Sequence[Sequence[int]]) -> dict[str, npt.NDArray[np.int64]]:
    """Return the token ids and the attention mask [B, L] int64 of one batch, padded on the right."""
    if len(rows) == 1:  # the usual search: no padding
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
