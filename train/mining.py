"""Hard negatives: passages that rankers take for answers and that, as far as labels and a teacher tell, are none.

Q queries, N passages, M passages of a block, K found, E vector width.
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

from d2llm.errors import ArgumentError
from d2llm.student import STUDENT, Student, StudentConfig

from .examples import Example
from .teacher import Teacher
from .token_states import TokenStates

Ranker: TypeAlias = Callable[[Sequence[str], int], list[list[int]]]
"""Takes queries and a depth, gives each query's best passages of a corpus, by index, best first, `depth` of them or
fewer: `Bm25.rank`, `BiEncoderRanker.rank`."""

ENCODED = 2048
"""Passages that are encoded at once."""
QUERIES, PASSAGES = 256, 65_536
"""Queries and passages that are compared at once: 64 MiB of scores."""


@dataclass(frozen=True, slots=True)
class Mined:
    """Examples with their hard negatives, and what was left out."""

    examples: list[Example]
    positives: int
    """Candidates that were known positives."""
    probable: int
    """Candidates beyond the filter's `max_probability`."""
    within_margin: int
    """Candidates that came too near to the positive, or passed it, and were not yet counted as probable."""
    short: int
    """Examples with fewer negatives than asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FalseNegativeFilter:
    """Finds candidates that are answers nobody labelled, by a teacher's word.

    Either bound may stand alone. The relative one is the TopK-MarginPos of NV-Retriever (arXiv:2407.15831), in
    log-odds; of several positives the one that the teacher scores lowest counts.
    """

    teacher: Teacher
    max_probability: float | None = None
    """A candidate with a higher P(yes) is dropped. Only for teachers whose log-odds are probabilities'."""
    margin: float | None = None
    """A candidate with log-odds above the positive's minus this is dropped. In the teacher's own units."""

    def __post_init__(self) -> None:
        if self.max_probability is None and self.margin is None:
            raise ArgumentError("a filter needs a bound: set max_probability, margin, or both")
        if self.max_probability is not None and not 0 < self.max_probability < 1:
            raise ArgumentError(f"max_probability lies between 0 and 1, not at {self.max_probability}")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ArgumentError(f"margin must be a finite number, found {self.margin}")

    def reasons(self, example: Example, candidates: Sequence[str]) -> list[Literal["probable", "within margin"] | None]:
        """Why each candidate is dropped; None keeps it. All are judged in one call, with the positives."""
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
    """Give each example its best `negatives` candidates, best first, in place of the negatives it has.

    Candidates are the `depth` best passages of each ranker, interleaved by rank, each once. Known positives are taken
    out: those of every example with this query, and the passage that is the query itself: `Example.itself` and, of a
    symmetric task, one with the query's text. Then the first `skip` are
    passed over, and last those that `false_negatives` finds.

    Texts that differ in white space or case alone are one passage: a positive under another id is no negative.
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
    """Everyone's first, then everyone's second, and so on; what comes again is left out."""
    merged = dict.fromkeys(chain.from_iterable(zip_longest(*rankings)))
    merged.pop(None, None)  # fills up the shorter rankings
    return list(merged)


class BiEncoderRanker:
    """Ranks passages by a student's cosine. They are encoded once, on the student's device, and kept in main memory
    (4 E bytes each)."""

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
    """The student of a folder or, by any other name, that backbone (hub id or folder) with mean pooling.

    Raises:
        ModelError: neither can be loaded.
    """
    if (Path(name) / STUDENT).is_file():
        return Student.load(Path(name))
    return Student.create(StudentConfig(backbone=name, tuning="frozen"))


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
    """What two copies of a passage have in common."""
    return " ".join(text.split()).casefold()
