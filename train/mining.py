"""Hard negatives: passages that rank high for a query, but are no answer as far as labels and a teacher can tell.

Q queries, N passages, M passages of a block, K nearest passages or candidates, E vector width.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from d2llm.embedder import create_student
from d2llm.errors import ArgumentError
from d2llm.student import STUDENT, Student

from .examples import Example
from .teacher import Teacher
from .token_states import TokenStates

Ranker: TypeAlias = Callable[[Sequence[str], int], list[list[int]]]
"""Takes queries and a depth. Gives the indices of each query's best passages, best first, at most `depth` of them.
`Bm25.rank` and `BiEncoderRanker.rank` are rankers."""

ENCODED = 2048
"""Passages encoded at a time."""
QUERIES, PASSAGES = 256, 65_536
"""Queries and passages compared at a time: 64 MiB of scores."""


@dataclass(frozen=True, slots=True)
class Mined:
    """Examples with their hard negatives, and counts of the candidates that were left out.

    Example:
        >>> from d2llm.bm25 import Bm25
        >>> corpus = ["The median is the middle value.", "The middle of the street", "Bread is baked in an oven",
        ...           "Cats sleep all day", "Rain falls in spring"]
        >>> example = Example("the middle value", positives=[corpus[0]], negatives=[])
        >>> mined = mine([example], corpus, [Bm25(corpus).rank], negatives=1)
        >>> mined.examples[0].negatives, mined.positives
        (['The middle of the street'], 1)
    """

    examples: list[Example]
    positives: int
    """Candidates that were known positives."""
    probable: int
    """Candidates above the filter's `max_probability`."""
    within_margin: int
    """Candidates whose score is above that of the positive minus the filter's `margin`, if they are not `probable`."""
    short: int
    """Examples with fewer negatives than asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FalseNegativeFilter:
    """Finds unlabelled answers among the candidates by a teacher's scores.

    Set `max_probability`, `margin`, or both. The margin is TopK-MarginPos of NV-Retriever (arXiv 2407.15831), in
    log-odds. If a query has several positives, the margin counts from the one with the lowest score.

    Raises:
        ArgumentError: neither is set, or a value is out of range.

    Example:
        >>> from d2llm.bm25 import Bm25
        >>> from d2llm.train.teacher import Bm25Teacher
        >>> corpus = ["The median is the middle value.", "The middle of the street", "Bread is baked in an oven",
        ...           "Cats sleep all day", "Rain falls in spring"]
        >>> example = Example("the middle value", positives=[corpus[1]], negatives=[])
        >>> unlabelled = FalseNegativeFilter(teacher=Bm25Teacher(Bm25(corpus), corpus), margin=0.1)
        >>> unlabelled.reasons(example, [corpus[0], corpus[2]])
        ['within margin', None]
    """

    teacher: Teacher
    max_probability: float | None = None
    """Drop candidates with a higher probability. Only for teachers whose log-odds are those of probabilities."""
    margin: float | None = None
    """Drop candidates with log-odds above the positive's minus this, in the teacher's units."""

    def __post_init__(self) -> None:
        if self.max_probability is None and self.margin is None:
            raise ArgumentError("a filter needs a bound: set max_probability, margin, or both")
        if self.max_probability is not None and not 0 < self.max_probability < 1:
            raise ArgumentError(f"max_probability lies between 0 and 1, not at {self.max_probability}")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ArgumentError(f"margin must be a finite number, found {self.margin}")

    def reasons(self, example: Example, candidates: Sequence[str]) -> list[Literal["probable", "within margin"] | None]:
        """The reason to drop each candidate, or None to keep it. The teacher judges them along with the positives."""
        texts = [*example.positives, *candidates]
        log_odds_K = self.teacher.judge(example.query, texts, example.task).log_odds_K
        positives, rest = log_odds_K[: len(example.positives)], log_odds_K[len(example.positives) :]
        no = torch.zeros_like(rest, dtype=torch.bool)
        probable = no if self.max_probability is None else rest.sigmoid() > self.max_probability
        near = no if self.margin is None else rest > positives.min() - self.margin
        return [
            "probable" if by_probability else "within margin" if by_margin else None
            for by_probability, by_margin in zip(probable.tolist(), near.tolist(), strict=True)
        ]


def mine(
    examples: Sequence[Example],
    corpus: Sequence[str],
    rankers: Sequence[Ranker],
    *,
    negatives: int = 15,
    depth: int = 100,
    skip: int = 0,
    false_negatives: FalseNegativeFilter | None = None,
    progress: bool = False,
) -> Mined:
    """Replace the negatives of each example by its `negatives` best candidates, best first.

    1. The candidates are the `depth` best passages of each ranker, interleaved by rank, without duplicates.
    2. Known positives are dropped: of every example with the same query, `Example.itself`, and in a symmetric task the
       query's own text.
    3. The first `skip` candidates are dropped.
    4. The candidates that `false_negatives` finds are dropped.

    Texts that differ only in white space or case are one passage, so a positive under another id is no negative.
    """
    keys = [_key(text) for text in corpus]
    positives: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        positives[_key(example.query)].update(map(_key, example.positives))
    mined, dropped, short = list[Example](), Counter[str | None](), 0
    with tqdm(total=len(examples), desc="mining", unit="query", disable=not progress) as bar:
        for start in range(0, len(examples), QUERIES):
            block = examples[start : start + QUERIES]
            rankings = [ranker([example.query for example in block], depth) for ranker in rankers]
            for example, *ranked in zip(block, *rankings, strict=True):
                found: dict[str, str] = {}
                for index in interleave(ranked):
                    found.setdefault(keys[index], corpus[index])
                query = _key(example.query)
                known = positives[query] | ({query} if example.task == "symmetric" else set())
                known |= {_key(example.itself)} if example.itself is not None else set()
                candidates = [text for key, text in found.items() if key not in known]
                dropped["positive"] += len(found) - len(candidates)
                candidates = candidates[skip:]
                if false_negatives is not None and candidates:
                    reasons = false_negatives.reasons(example, candidates)
                    dropped.update(reasons)
                    candidates = [text for text, reason in zip(candidates, reasons, strict=True) if reason is None]
                short += len(candidates) < negatives
                mined.append(replace(example, negatives=candidates[:negatives]))
                bar.update()
    return Mined(mined, dropped["positive"], dropped["probable"], dropped["within margin"], short)


def mine_negatives(examples: Sequence[Example], corpus: Sequence[str], ranker: Ranker, count: int) -> list[Example]:
    """The examples with the best `count` passages of `ranker` as their negatives."""
    depth = count + 20  # positives and copies of passages are among the best, and drop out
    return mine(examples, corpus, [ranker], negatives=count, depth=depth).examples


def interleave(rankings: Iterable[Sequence[int]]) -> list[int]:
    """The first of each ranking, then the second of each, and so on, without duplicates."""
    merged = dict.fromkeys(chain.from_iterable(zip_longest(*rankings)))
    merged.pop(None, None)  # zip_longest pads the shorter rankings with None
    return list(merged)


class BiEncoderRanker:
    """Ranks passages by a student's cosine.

    The passages are encoded once, on the student's device, and kept in main memory (4 E bytes each).
    """

    def __init__(self, student: Student, corpus: Sequence[str], *, progress: bool = False) -> None:
        self.student = student
        blocks = []
        with tqdm(total=len(corpus), desc="encoding", unit="passage", disable=not progress) as bar:
            for start in range(0, len(corpus), ENCODED):
                blocks.append(student.encode(corpus[start : start + ENCODED], "document").vectors_BE)
                bar.update(len(blocks[-1]))
        self.passages_NE = torch.cat(blocks)

    def rank(self, queries: Sequence[str], depth: int) -> list[list[int]]:
        """Indices of each query's min(depth, N) nearest passages, best first."""
        query_QE = self.student.encode(queries, "query").vectors_BE
        indices: list[list[int]] = nearest(query_QE, self.passages_NE, depth, self.student.device).tolist()
        return indices


class TokenStatesRanker:
    """Ranks passages by the cosine of a student whose token states are kept."""

    @torch.inference_mode()
    def __init__(self, states: TokenStates, corpus: Sequence[str]) -> None:
        self.states, self.passages_NE = states, states.encode_all(corpus, "document").vectors_BE

    @torch.inference_mode()
    def rank(self, queries: Sequence[str], depth: int) -> list[list[int]]:
        """Indices of each query's min(depth, N) nearest passages, best first."""
        query_QE = self.states.encode_all(queries, "query").vectors_BE
        indices: list[list[int]] = nearest(query_QE, self.passages_NE, depth).tolist()
        return indices


def load_bi_encoder(name: str) -> Student:
    """The student in the folder `name`, or an untrained student of the embedder `name` (see `create_student`).

    Raises:
        ModelError: it cannot be loaded.
    """
    return Student.load(Path(name)) if (Path(name) / STUDENT).is_file() else create_student(name)


@torch.inference_mode()
def nearest(query_QE: Tensor, passages_NE: Tensor, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices [Q, min(k, N)] int64, on the CPU, of the passages with the highest inner products, best first.

    Computed on `device` in blocks, so that no more than 64 MiB of scores are held at once.
    """
    found = []
    for block_QE in query_QE.to(device).split(QUERIES):
        scores_QK = block_QE.new_empty(len(block_QE), 0)
        indices_QK = scores_QK.long()
        for start in range(0, len(passages_NE), PASSAGES):
            scores_QM = block_QE @ passages_NE[start : start + PASSAGES].to(device).T
            best = scores_QM.topk(min(k, scores_QM.shape[1]))
            scores_QK = torch.cat([scores_QK, best.values], dim=1)
            scores_QK, order_QK = scores_QK.topk(min(k, scores_QK.shape[1]))
            indices_QK = torch.cat([indices_QK, best.indices + start], dim=1).gather(1, order_QK)
        found.append(indices_QK.cpu())
    return torch.cat(found)


def _key(text: str) -> str:
    """Equal for two copies of a passage."""
    return " ".join(text.split()).casefold()
