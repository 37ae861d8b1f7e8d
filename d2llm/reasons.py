"""Reasons: what each part of the score, and each word that query and passage share, adds to a score. Needs no torch.

Dimensions: K candidates of the query, C parts of the IEM's score, H columns of query features, W words of a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from d2llm.model import Model, Span
from d2llm.tokens import NAMES, QUERY_WORDS
from d2llm.types import Candidates, Floats, Hit, Task


class Mark(NamedTuple):
    """A word of a passage that the query has too."""

    start: int
    """The first character in its field of the payload."""
    end: int
    """The character after the last one."""
    weight: float
    """What the word adds to the score, however often it occurs. If several words are here, it is their sum."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one candidate has its score.

    `hit` is the candidate with its score. Several candidates may be passages of one document.
    `parts`: what each part adds to the score, `{name: weight * value}`; they sum to it. Besides the parts of the IEM's
    score, a hybrid search has the part `bm25`.
    `values`: each part before its weight. The value of `bm25` is the BM25 score, shifted and scaled to mean 0 and
    deviation 1 over the candidates; its contribution is `weight * deviation of the IEM scores * value`.
    `words`: the words of the query that the passage has, and what each adds to the score; they sum to the part `words`.
    `marks`: where these words are in the fields `text` and `title` of the payload.
    """

    hit: Hit
    parts: dict[str, float]
    values: dict[str, float]
    words: dict[str, float]
    marks: dict[str, list[Mark]]


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why the candidates of one search have their scores.

    `scales` are the weights of the parts. `candidates` has all K candidates in the order of recall.

    Example:
        >>> index = d2llm.FlatIndex()
        >>> report = index.add(model, [{"id": "a", "text": "Payment takes five days."}])
        >>> found = d2llm.Searcher(model, index).explain("days for a payment", reasons=True)
        >>> reason = found.reasons.candidates[0]
        >>> list(reason.parts) == model.config.parts, reason.marks["text"][0].end
        (True, 7)
        >>> abs(sum(reason.parts.values()) - found.hits[0].score) < 1e-4
        True
    """

    scales: dict[str, float]
    candidates: list[Reason]


def reasons_of_recall(candidates: Candidates) -> Reasons:
    """Return the reasons for candidates that were not rescored: the cosine alone."""
    parts_KC, nothing = candidates.scores[:, None], [dict[str, float]() for _ in candidates.ids]
    return _reasons({"cosine": 1.0}, candidates, parts_KC, parts_KC, nothing, [{} for _ in candidates.ids])


def reasons_of(
    model: Model,
    query: str,
    features_1H: Any,
    candidates: Candidates,
    task: Task,
    scales: Mapping[str, float],
    bm25_weight: float,
) -> Reasons:
    """Return the reasons for rescored candidates, at least one.

    `features_1H` are the features of `query`, an array or an `OrtValue`. `scales` are the weights of the model's parts,
    in its order. `bm25_weight` counts if the candidates have BM25 scores.
    """
    weights = dict(scales)
    features_1KP, recall_1K = candidates.features[None], candidates.scores[None]
    values_KC = model.parts(features_1H, features_1KP, recall_1K, task)[0]
    parts_KC = values_KC * np.array(list(scales.values()), np.float32)
    if candidates.bm25_scores is not None:
        weights["bm25"] = bm25_weight
        value_K = candidates.bm25_scores - candidates.bm25_scores.mean()
        value_K /= candidates.bm25_scores.std() or 1
        part_K = bm25_weight * parts_KC.sum(1).std() * value_K
        values_KC, parts_KC = (np.column_stack(pair) for pair in ((values_KC, value_K), (parts_KC, part_K)))
    words = [dict[str, float]() for _ in candidates.ids]
    marks: list[dict[str, list[Mark]]] = [{} for _ in candidates.ids]
    if "words" in scales:
        texts = {span.id % NAMES: span.text.strip() for span in reversed(model.query.word_spans(query))}
        adds = [dict[int, float]() for _ in candidates.ids]
        for name, value_K in _values_of_words(model, features_1H, candidates, task):
            for row in np.flatnonzero(value_K):
                adds[row][name] = float(scales["words"] * value_K[row])
                text = texts.get(name, "")
                words[row][text] = words[row].get(text, 0.0) + adds[row][name]
        marks = [_marks(model, payload, added) for payload, added in zip(candidates.payloads, adds, strict=True)]
    return _reasons(weights, candidates, parts_KC, values_KC, words, marks)


def _values_of_words(
    model: Model, features_1H: Any, candidates: Candidates, task: Task
) -> Iterator[tuple[int, Floats]]:
    """Yield the name of each word of the query, and what it adds to the part `words` of each candidate, [K].

    The part is linear in the weights of the query's words: a query whose other words have no weight shows one word.
    """
    features_1H = np.array(features_1H if isinstance(features_1H, np.ndarray) else features_1H.numpy())
    columns = features_1H[:, -3 * QUERY_WORDS :]
    high_W, low_W, weight_W = (row[0].copy() for row in np.split(columns, 3, axis=1))
    column = model.config.parts.index("words")
    for word in np.flatnonzero(weight_W):
        features_1H[0, -QUERY_WORDS:] = np.where(np.arange(QUERY_WORDS) == word, weight_W, 0)
        values_KC = model.parts(features_1H, candidates.features[None], candidates.scores[None], task)[0]
        yield int(256 * high_W[word] + low_W[word]), values_KC[:, column]


def _marks(model: Model, payload: Mapping[str, Any], added: Mapping[int, float]) -> dict[str, list[Mark]]:
    """Return the places of the words of these names in text and title."""
    fields = [name for name in ("text", "title") if added and isinstance(payload.get(name), str)]
    return {name: _marks_in(model.document.word_spans(payload[name]), added) for name in fields}


def _marks_in(spans: Iterable[Span], added: Mapping[int, float]) -> list[Mark]:
    """Return the marks of one text. A character of several tokens, its bytes, has one mark with the sum of them."""
    places: dict[tuple[int, int], float] = {}
    for span in spans:
        place = span.end - len(span.text.lstrip()), span.start + len(span.text.rstrip())
        if span.start >= 0 and place[0] < place[1] and (weight := added.get(span.id % NAMES)):
            places[place] = places.get(place, 0.0) + weight
    return [Mark(*place, weight) for place, weight in places.items()]


def _reasons(
    scales: dict[str, float],
    candidates: Candidates,
    parts_KC: Floats,
    values_KC: Floats,
    words: list[dict[str, float]],
    marks: list[dict[str, list[Mark]]],
) -> Reasons:
    scores_K = parts_KC.sum(1)
    columns = zip(parts_KC.tolist(), values_KC.tolist(), words, marks, strict=True)
    return Reasons(
        scales,
        [
            Reason(
                candidates.hit(row, float(scores_K[row])),
                dict(zip(scales, parts, strict=True)),
                dict(zip(scales, values, strict=True)),
                shared,
                places,
            )
            for row, (parts, values, shared, places) in enumerate(columns)
        ],
    )
