"""What an adaptation learns from, and what decides on it: queries without labels, and a teacher's view of each.

K candidates of a query, N rows of the pool.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from d2llm.bm25 import split_words
from d2llm.calibration import Evidence
from d2llm.errors import DataError, ModelError
from d2llm.iem import COSINE_SCALE
from d2llm.student import Encoded, Student

from .adaptation import Adaptation, Report
from .checkpoint import Checkpoint
from .generator import Written
from .pool import Pool, Query, Scoring, evidence_of
from .styles import SHOWN, STYLES
from .teacher import Teacher

FEWEST = 100
"""Fewest queries to learn from, and fewest to decide with."""
DEPTH = 100
"""Candidates that are rescored for a held-out query."""
LOOP, DISTINCT = 6, 0.6
"""A written query of `LOOP` words or more is not used if a smaller share of its words than this is distinct: small
language models fall into loops. Titles and queries of a log are people's own."""
COPIED = frozenset(query.casefold() for _, queries in SHOWN for query in queries.values())
"""Queries of the examples that a language model is shown. Small ones write them for passages of their own too."""
LOG_STYLE = "log"
LESSONS = "lessons.pt"


class Lesson(NamedTuple):
    """A query with its candidates, rows of the pool (its own first), and what the teacher says of them."""

    query: Query
    rows: list[int]
    log_odds_K: Tensor
    vector_E: Tensor
    """The recall vector that the embedder gives the query."""
    fold: int | None
    """The part of the documents that its own passage belongs to. None for a query of a log."""


class Lessons(NamedTuple):
    """What is learned from, and what decides."""

    learned: list[Lesson]
    decisive: list[list[Query]]
    """The queries that decide, by the part that is held out."""
    before: list[list[Evidence]]
    """What each of them says of the embedder."""
    passages: Encoded
    """The embedder's encoding of the pool."""

    def without(self, fold: int) -> list[Lesson]:
        """What is learned from while a part is held out."""
        return [lesson for lesson in self.learned if lesson.fold != fold]


def queries_of(pool: Pool, written: Sequence[Written], log: Sequence[str], report: Report) -> list[Query]:
    """The queries of all sources that are usable, and were written once."""
    found = [Query(text, LOG_STYLE, None) for text in log]
    found += pool.titles
    found += [Query(row.text, row.style, pool.names[row.passage]) for row in written if row.passage in pool.names]
    report.written = dict(Counter(query.style for query in found))
    times = Counter(query.text.casefold() for query in found)
    usable = [query for query in found if times[query.text.casefold()] == 1 and _is_usable(query, pool)]
    return usable or _too_few(found, [], [])


def check_number(most: int) -> None:
    """Check that `most` queries can be enough, before anybody writes them.

    Raises:
        DataError: they cannot.
    """
    if most < FEWEST:
        raise DataError(
            f"there will be {most:,} queries at most, and an adaptation needs {FEWEST} that decide: write more (d2llm "
            "generate --passages N, or with a generator --set written=N)"
        )


def _is_usable(query: Query, pool: Pool) -> bool:
    """Whether a query has a word, is no loop or copy that a language model wrote, and is not most of its passage."""
    text, words = query.text.casefold().strip(), split_words(query.text)
    is_loop = len(words) >= LOOP and len(set(words)) < DISTINCT * len(words)
    if not words or (query.style in STYLES and (is_loop or text in COPIED)):
        return False
    passage = "" if query.own is None else pool.texts[query.own].casefold()
    return not (text in passage and 2 * len(text) > len(passage))


def taught_by(
    pool: Pool,
    queries: Sequence[Query],
    student: Student,
    teacher: Teacher | Student | None,
    checkpoint: Checkpoint,
    settings: Adaptation,
    report: Report,
    *,
    progress: bool,
) -> Lessons:
    """The teacher's scores of the candidates of all queries, and the queries that decide."""
    own = Scoring.of(student, queries, pool.encode(student, progress=progress), progress=progress)
    judge = _judge(pool, queries, own, teacher, progress=progress)
    owners = sorted({pool.documents[query.own] for query in queries if query.own is not None})
    shuffled = random.Random(f"{settings.seed}/held out").sample(owners, len(owners))
    folds = {document: place % settings.folds for place, document in enumerate(shuffled)}
    held_out = settings.folds if settings.tuning == "head" else 1
    learned, ranks = list[Lesson](), list[tuple[float, float]]()
    decisive: list[list[Query]] = [[] for _ in range(held_out)]
    for place, query in enumerate(tqdm(queries, desc="teacher", unit="query", disable=not progress)):
        cosine_N = own.cosines(place)
        rows = pool.candidates(query, cosine_N, settings.candidates)
        if len(rows) < 2:
            continue
        log_odds_K = judge(place, rows)
        fold = None if query.own is None else folds[pool.documents[query.own]]
        if fold is not None:
            rank = _own_rank(log_odds_K)
            if fold < held_out:
                ranks.append((rank, _own_rank(cosine_N[rows])))
                if rank < settings.certain:
                    decisive[fold].append(query)
            if 2 * rank >= len(rows):
                continue
            log_odds_K[0] += settings.prior
        learned.append(Lesson(query, rows, log_odds_K, own.queries.vectors_BE[place], fold))
    report.kept = dict(Counter(lesson.query.style for lesson in learned))
    for style in report.kept:
        report.examples[style] = [lesson.query.text for lesson in learned if lesson.query.style == style][:3]
    _check(learned, decisive, ranks, queries, report)
    before = [evidence_of(pool, student, part, own.passages, DEPTH) for part in decisive]
    lessons = Lessons(learned, decisive, before, own.passages)
    checkpoint.save(_packed(lessons, report), LESSONS)
    return lessons


def _judge(
    pool: Pool, queries: Sequence[Query], own: Scoring, teacher: Teacher | Student | None, *, progress: bool
) -> Callable[[int, list[int]], Tensor]:
    """Gives the log-odds [K] of the query at some place for K rows.

    Without a teacher they are the student's `own` scores. To these, the cosines of another student are added.
    """
    if teacher is None:
        return own.log_odds
    if isinstance(teacher, Student):
        other = Scoring.of(teacher, queries, pool.encode(teacher, progress=progress), progress=progress)
        return lambda place, rows: own.log_odds(place, rows) + COSINE_SCALE * other.cosines(place)[rows]
    texts = pool.texts
    return lambda place, rows: teacher.judge(queries[place].text, [texts[row] for row in rows]).log_odds_K.clone()


def _own_rank(scores_K: Tensor) -> float:
    """How many candidates score above the first one. Those that score the same count half."""
    return float((scores_K > scores_K[0]).sum() + ((scores_K == scores_K[0]).sum() - 1) / 2)


def _check(
    learned: Sequence[Lesson],
    decisive: Sequence[Sequence[Query]],
    ranks: Sequence[tuple[float, float]],
    queries: Sequence[Query],
    report: Report,
) -> None:
    """Check that there is enough to learn and to decide, and that the teacher ranks better than the cosine."""
    deciding = [query for part in decisive for query in part]
    if min(len(learned), len(deciding)) < FEWEST:
        _too_few(queries, learned, deciding)
    by_teacher, by_cosine = (float(np.mean([1 / (1 + rank) for rank in column])) for column in zip(*ranks, strict=True))
    report.teacher = {"teacher": by_teacher, "cosine": by_cosine}
    if by_teacher <= by_cosine:
        raise ModelError(
            f"the teacher ranks no better than the embedder's cosine (mean reciprocal rank {by_teacher:.3f} against "
            f"{by_cosine:.3f} on held-out queries): it has nothing to teach. Name another one, or none"
        )


def _too_few(queries: Sequence[Query], learned: Sequence[Lesson], decisive: Sequence[Query]) -> NoReturn:
    raise DataError(
        f"of {len(queries):,} queries {len(learned):,} are left to learn from and {len(decisive):,} to decide with (at "
        f"least {FEWEST} each). The others have no words, are copies, or do not find the passage that they were "
        "written for: read them (those of a generator are in a file beside the student's folder). Does the generator "
        "know the language of the corpus? What helps: more queries (d2llm generate --passages N, or with a generator "
        "--set written=N)"
    )


def _packed(lessons: Lessons, report: Report) -> dict[str, Any]:
    """Lessons and report as values that a checkpoint holds."""
    return {
        "learned": [(tuple(lesson.query), *lesson[1:]) for lesson in lessons.learned],
        "decisive": [[tuple(query) for query in part] for part in lessons.decisive],
        "before": [[tuple(map(torch.as_tensor, query)) for query in part] for part in lessons.before],
        "passages": tuple(lessons.passages),
        "report": {"kept": report.kept, "examples": report.examples, "teacher": report.teacher},
    }


def restored(checkpoint: Checkpoint, report: Report) -> Lessons | None:
    """What a killed run had saved."""
    saved = checkpoint.load(LESSONS)
    if saved is None:
        return None
    for name, value in saved["report"].items():
        setattr(report, name, value)
    learned = [Lesson(Query(*query), *rest) for query, *rest in saved["learned"]]
    decisive = [[Query(*query) for query in part] for part in saved["decisive"]]
    before = [[Evidence(parts.numpy(), grades.numpy(), float(ideal)) for parts, grades, ideal in part]
              for part in saved["before"]]  # fmt: skip
    return Lessons(learned, decisive, before, Encoded(*saved["passages"]))
