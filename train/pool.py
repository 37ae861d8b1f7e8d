"""The passages that take part in an adaptation: their queries, candidates and ranks.

N rows (passages, then texts without their titles), K candidates of a query, C parts of the score, E recall width, H
columns of the features.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from d2llm.bm25 import Bm25
from d2llm.calibration import Evidence
from d2llm.fusion import Recalled, rrf
from d2llm.passages import content_of, leading_heading, split
from d2llm.student import Encoded, Student
from d2llm.types import Document, task_id

from .mining import interleave
from .precision import autocast, compute_dtype

ENCODED = 512
"""Texts encoded at a time."""
TITLE_STYLE = "own title"
NEVER = -1e9
"""The score of a row that a query must not find."""


class Query(NamedTuple):
    """A query, its style, and the row of the text that it was written for; None for a query of a log."""

    text: str
    style: str
    own: int | None


class Untitled(NamedTuple):
    """The text of a passage without its title or first heading, and the row of the passage."""

    title: str
    text: str
    passage: int


@dataclass(frozen=True, slots=True)
class Pool:
    """A sample of the passages of a corpus, as rows.

    A title is a query for its document, and so is a heading for the passage of a long document that begins with it. So
    the text without the title or heading is a row too, after all passages. Only that query finds it, and it does not
    find the passage with the title.
    """

    texts: list[str]
    documents: list[str]
    """The document of each row, by its id."""
    names: dict[str, int]
    """The row of each passage, by the id that queries name: the document's, with `#number` for its further passages. If
    another document has that id, the passage has no name."""
    titles: list[Query]
    shadows: dict[int, int]
    """The passage with the title or heading, for each row of a text without it."""
    bm25: Bm25

    @classmethod
    def sample(
        cls,
        corpus: Mapping[str, Document],
        student: Student,
        size: int,
        titles: int,
        seed: int,
        wanted: Collection[str] = (),
    ) -> Pool:
        """Draw `size` documents, and split those that are too long. The documents `wanted` come first, by their ids. Of
        their titles and headings, draw `titles` as queries."""
        rng = random.Random(f"{seed}/pool")
        limit = student.config.document_max_length
        student.tokenizer.no_truncation()

        def count_tokens(texts: Sequence[str]) -> list[int]:
            prompt = student.config.document_prompt
            return [len(row.ids) for row in student.tokenizer.encode_batch([prompt + text for text in texts])]

        texts, documents, names, untitled = list[str](), list[str](), dict[str, int](), list[Untitled]()
        drawn = rng.sample(sorted(corpus), len(corpus))
        for id_ in sorted(drawn, key=lambda id_: id_ not in wanted)[:size]:
            document, parts = corpus[id_], {id_: corpus[id_].content}
            if document.text.strip() and count_tokens([document.content])[0] > limit:
                parts = {}
                for passage in split(document, count_tokens, limit):
                    heading, text = leading_heading(document.text[passage.start : passage.end])
                    if heading and text.strip():
                        untitled.append(Untitled(f"{document.title} {heading}".strip(), text, len(texts) + len(parts)))
                    name = f"{id_}#{passage.number}" if passage.number else id_
                    parts[name] = content_of(document, passage, limit, count_tokens)
            elif document.text.strip() and document.title.strip():
                untitled.append(Untitled(document.title, document.text, len(texts)))
            for name, text in parts.items():
                if name == id_ or name not in corpus:
                    names[name] = len(texts)
                texts.append(text)
                documents.append(id_)
        count, untitled = len(texts), rng.sample(untitled, min(titles, len(untitled)))
        texts += [row.text for row in untitled]
        documents += [documents[row.passage] for row in untitled]
        queries = [Query(row.title, TITLE_STYLE, count + at) for at, row in enumerate(untitled)]
        shadows = {count + at: row.passage for at, row in enumerate(untitled)}
        return cls(texts, documents, names, queries, shadows, Bm25(texts))

    def drawn(self, count: int, seed: int) -> dict[str, str]:
        """Draw passages to write queries for, `{id: text}`."""
        names = random.Random(f"{seed}/written").sample(list(self.names), min(count, len(self.names)))
        return {name: self.texts[self.names[name]] for name in names}

    def encode(self, student: Student, *, progress: bool = False) -> Encoded:
        """Encode all rows."""
        return encode(student, self.texts, "document", progress=progress)

    def recalled(self, query: Query, cosine_N: Tensor, depth: int) -> Recalled:
        """The best `depth` rows by cosine and by BM25, among those that the query may find."""
        scores = cosine_N.cpu().numpy().copy(), self.bm25.scores(query.text).copy()
        for scores_N in scores:
            own = None if query.own is None else scores_N[query.own]
            scores_N[len(self.texts) - len(self.shadows) :] = NEVER
            if query.own in self.shadows:
                scores_N[self.shadows[query.own]] = NEVER
                scores_N[query.own] = own
        return Recalled(*scores, *(_best(scores_N, depth) for scores_N in scores))

    def candidates(self, query: Query, cosine_N: Tensor, count: int) -> list[int]:
        """The query's own row, if it has one, and the best `count` other rows by cosine and BM25, interleaved."""
        found = self.recalled(query, cosine_N, count)
        ranked = interleave([found.by_cosine.tolist(), found.by_bm25.tolist()])
        own = [] if query.own is None else [query.own]
        return [*own, *[row for row in ranked if row != query.own][:count]]


def encode(student: Student, texts: Sequence[str], side: str, *, progress: bool = False) -> Encoded:
    """Encode texts in the order of their length, and give them in their own order. Float32, on the CPU."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    parts, dtype = [], compute_dtype("auto", student.device)
    with (
        autocast(student.device, dtype),
        tqdm(total=len(texts), desc=f"encoding ({side})", unit="text", disable=not progress) as bar,
    ):
        for start in range(0, len(order), ENCODED):
            chunk = [texts[row] for row in order[start : start + ENCODED]]
            parts.append(student.encode(chunk, "query" if side == "query" else "document"))
            bar.update(len(chunk))
    inverse = torch.tensor(order).argsort()
    return Encoded(*(torch.cat(tensors)[inverse] for tensors in zip(*parts, strict=True)))


class Scoring(NamedTuple):
    """The scores that a student gives to rows of the pool, for the queries that it has encoded."""

    student: Student
    queries: Encoded
    passages: Encoded

    @classmethod
    def of(cls, student: Student, queries: Sequence[Query], passages: Encoded, *, progress: bool = False) -> Scoring:
        """Encode the queries. The rows are encoded already."""
        return cls(student, encode(student, [query.text for query in queries], "query", progress=progress), passages)

    def cosines(self, place: int) -> Tensor:
        """The cosines [N] of the query at `place` with all rows."""
        cosine_N: Tensor = self.passages.vectors_BE @ self.queries.vectors_BE[place]
        return cosine_N

    @torch.no_grad()
    def parts(self, place: int, rows: Sequence[int]) -> Tensor:
        """The parts [K, C] of the scores of the query at `place` with some rows, as asymmetric pairs."""
        device, iem = self.student.device, self.student.iem
        features_1KH = self.passages.passage_features_BH[rows].unsqueeze(0)
        cosine_1K = (self.passages.vectors_BE[rows] @ self.queries.vectors_BE[place]).unsqueeze(0)
        task_1 = torch.tensor([task_id("asymmetric")], device=device)
        query_1H = self.queries.query_features_BH[place : place + 1]
        parts_1KC: Tensor = iem.parts(query_1H.to(device), features_1KH.to(device), cosine_1K.to(device), task_1)
        return parts_1KC[0].cpu()

    def log_odds(self, place: int, rows: Sequence[int]) -> Tensor:
        """The scores [K] of the query at `place` with some rows."""
        return self.parts(place, rows) @ torch.tensor(list(self.student.iem.scales_of("asymmetric").values()))


def evidence_of(
    pool: Pool, student: Student, queries: Sequence[Query], passages: Encoded, depth: int
) -> list[Evidence]:
    """What a hybrid search of each query says of the student: `depth` candidates, of which the row that the query was
    written for is right."""
    if not queries:
        return []
    scoring, found = Scoring.of(student, queries, passages), list[Evidence]()
    for place, query in enumerate(queries):
        rows = rrf(pool.recalled(query, scoring.cosines(place), depth))[:depth]
        parts_KC = scoring.parts(place, rows.tolist()).numpy()
        found.append(Evidence(parts_KC, (rows == query.own).astype(np.float32), ideal=1.0))
    return found


def _best(scores_N: npt.NDArray[np.float32], depth: int) -> npt.NDArray[np.int64]:
    best: npt.NDArray[np.int64] = np.argsort(-scores_N, kind="stable")[:depth]
    return best[scores_N[best] > NEVER]
