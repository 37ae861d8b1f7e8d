"""Adaptation of an embedder to a corpus without labels: `d2llm adapt`.

Queries are written for a sample of passages. A teacher scores each query's candidates, and the student's cosine learns
these scores. Passages that are held out decide whether the result is better than the embedder.

B queries of a batch, K candidates of a query (its own passage first), N passages of a batch, E recall width.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from d2llm.backbone import pad
from d2llm.calibration import Gain, tested
from d2llm.embedder import create_student
from d2llm.errors import DataError, ModelError
from d2llm.files import require_new
from d2llm.fitting import fit_vectors
from d2llm.settings import Count, Positive, Seed, Share, Weight, check_fields
from d2llm.student import Student
from d2llm.types import Document

from . import losses
from .checkpoint import Checkpoint
from .generator import STYLES, Generator, Style, read_written, write_queries
from .loop import Loop, Losses, make_optimizer
from .pool import Pool, Query, encode, iem_scores, own_dcg
from .precision import autocast, compute_dtype
from .run_log import LOG, RunLog
from .schedule import Batches
from .teacher import Teacher
from .token_states import Side

logger = logging.getLogger(__name__)

SMALLEST = 3000
"""Fewest passages of a corpus that an embedder is adapted to. In GPL's table (arXiv 2112.07577) a corpus of a thousand
passages made an embedder worse, and one of ten thousand better."""
FEWEST = 100
"""Fewest queries to learn from, and fewest to decide with."""
CERTAIN = 3
"""A held-out query decides if the teacher finds its own passage among the first so many. Of the other queries, many do
not ask for their passage: a student that finds it for them has learned the habits of the generator. The choice favours
the embedder, whose score the teacher is by default. So a gain is one in spite of it."""
DEPTH = 100
"""Candidates that are rescored for a held-out query."""
AT_ONCE = 64
"""Texts of one step that are padded to the same length: the longest of a step would make all of them long."""
SAVE_EVERY = 25
"""Steps between two checkpoints."""
LOG_STYLE = "log"
QUERIES, LESSONS = "queries.jsonl", "lessons.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptation:
    """The settings of an adaptation.

    Raises:
        ArgumentError: a value is out of range.

    Example:
        >>> Adaptation(steps=300).steps
        300
    """

    pool: Count = 5000
    """The documents that take part, drawn at random: candidates and held-out passages are theirs."""
    written: Count = 1500
    """The passages of the pool for which queries are written, one of each style."""
    styles: tuple[Style, ...] = STYLES
    """The styles of the queries."""
    candidates: Count = 30
    """The passages that the teacher scores for each query: the best by cosine and by BM25, interleaved."""
    held_out: Share = 0.25
    """Share of the documents with queries that nothing is learned from. They decide whether the student is better."""
    steps: Count = 150
    """Training steps."""
    batch: Count = 32
    """Queries in one step."""
    negatives: Count = 5
    """Candidates of each query that stand beside its own passage in one step. Each step draws them anew."""
    length: Count = 96
    """Tokens that are read of a passage in training."""
    lr: Positive = 2e-5
    """Peak learning rate. It rises over the first tenth of the steps, then falls to zero."""
    prior: Weight = 3.0
    """Log-odds that a passage gets on top of the teacher's score for a query that was written for it."""
    contrastive: Weight = 0.1
    """Weight of InfoNCE beside the listwise imitation of the teacher. Alone, it lowers strong embedders (CADET, arXiv
    2505.19274)."""
    temperature: Positive = 0.05
    """Temperature of the cosines."""
    way: Share = 0.5
    """How far the weights go from the embedder's to the trained ones. Half way keeps most of a gain, and little of a
    loss (WiSE-FT, arXiv 2109.01903)."""
    seed: Seed = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(slots=True)
class Report:
    """What an adaptation did, and whether its student is better than the embedder."""

    verdict: str = ""
    adapted: bool = False
    """Whether the student has trained weights. If not, it is the embedder as it was, with words and vectors."""
    written: dict[str, int] = field(default_factory=dict)
    """Queries by style."""
    kept: dict[str, int] = field(default_factory=dict)
    """Queries that are left: not empty, no copies, and the teacher puts their passage above the median candidate."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Some of the queries kept, by style."""
    teacher: dict[str, float] = field(default_factory=dict)
    """Mean reciprocal rank of the own passage among the candidates of held-out queries, by teacher and by cosine."""
    gain: Gain | None = None
    """nDCG@10 of the embedder on the held-out queries that decide, and what the adaptation adds. None if nothing was
    trained."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each part, since the run was started or resumed."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Note the time of a block."""
        began = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - began, 1)


class Lesson(NamedTuple):
    """A query with its candidates, rows of the pool (its own first), and what the teacher says of them."""

    query: Query
    rows: list[int]
    log_odds_K: Tensor


class Lessons(NamedTuple):
    """What is learned from, what decides, and how well the embedder does on what decides (nDCG@10 of each query)."""

    learned: list[Lesson]
    decisive: list[Query]
    before: list[float]


@dataclass(frozen=True, slots=True)
class AdaptationStage:
    """The cosines of a query with its candidates learn the teacher's distribution over them."""

    student: Student
    pool: Pool
    lessons: list[Lesson]
    settings: Adaptation
    batches: Batches

    name: ClassVar[str] = "adaptation"

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.settings.steps

    def losses(self, step: int) -> Losses:
        """Listwise imitation, and InfoNCE for the queries that were written for a passage."""
        batch, settings = self.batches.at(self.lessons, self.settings.batch, step), self.settings
        draws = [[0, *random.sample(range(1, len(lesson.rows)), settings.negatives)] for lesson in batch]
        rows = [lesson.rows[place] for lesson, draw in zip(batch, draws, strict=True) for place in draw]
        queries_BE = self._vectors([lesson.query.text for lesson in batch], "query")
        passages_NE = self._vectors([self.pool.texts[row] for row in rows], "document")
        cosine_BN = queries_BE @ passages_NE.T
        own_BK = torch.arange(len(rows), device=cosine_BN.device).view(len(batch), -1)
        log_odds_BK = torch.stack([lesson.log_odds_K[draw] for lesson, draw in zip(batch, draws, strict=True)])
        scores_BK = cosine_BN.gather(1, own_BK) / settings.temperature
        terms = {"listwise_imitation": losses.listwise_imitation(scores_BK, log_odds_BK.to(scores_BK.device))}
        known = [place for place, lesson in enumerate(batch) if lesson.query.own is not None]
        if known and settings.contrastive:
            positive_BN = torch.tensor([[row == batch[place].query.own for row in rows] for place in known])
            loss = losses.recall_contrastive(
                cosine_BN[known], positive_BN.to(cosine_BN.device), temperature=settings.temperature
            )
            terms["contrastive"] = settings.contrastive * loss
        return terms

    def measure(self, done: int) -> None:
        """Nothing is measured before the end: the held-out passages decide once."""

    def _vectors(self, texts: Sequence[str], side: Side) -> Tensor:
        """Recall vectors with gradients. Of long texts the first tokens are read, and the last one, which closes it."""
        length = self.settings.length
        ids = [
            row if len(row) <= length else [*row[: length - 1], row[-1]] for row in self.student.encodings(texts, side)
        ]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        parts = [self._of_ids([ids[place] for place in order[at : at + AT_ONCE]]) for at in range(0, len(ids), AT_ONCE)]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _of_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        student, (ids_BL, mask_BL) = self.student, pad(ids, self.student.device)
        with autocast(student.device, compute_dtype("auto", student.device)):
            tokens_BLD = student.tokens(ids_BL, mask_BL)
        return F.normalize(student.recall_head(student.pma(tokens_BLD.float(), mask_BL)), dim=-1)


def adapt(
    corpus: Mapping[str, Document],
    embedder: str,
    out: Path,
    *,
    generator: Generator | None = None,
    written: Path | None = None,
    log: Sequence[str] = (),
    teacher: Teacher | None = None,
    settings: Adaptation | None = None,
    progress: bool = False,
) -> Report:
    """Adapt an embedder to a corpus without labels, and write the student to the new folder `out`.

    1. Queries come from the `generator`, or from the file `written` that `write_queries` made earlier. Titles are
       queries for their documents. `log` are real queries, of which no passage is known.
    2. The teacher scores the candidates of each query: by default it is the untrained student's score of cosine, words
       and vectors. A query is dropped if the teacher puts its passage below the median candidate.
    3. The cosine learns the teacher's distribution over the candidates.
    4. Queries of documents held out decide. If the gain is not sure, `out` is the embedder as it was, with words and
       vectors fitted to the corpus.

    The run lives in `OUT.run` until it is done. After a kill, the same call continues there, with the same result.

    Raises:
        DataError: hardly a query is usable, or `OUT.run` belongs to another run.
        ModelError: the embedder cannot be loaded, or the teacher ranks no better than the embedder's cosine.
        OutputExistsError: `out` exists and is not an empty folder.
        DivergedError: a loss is not finite.
    """
    require_new(out)
    settings, report, accelerator = settings or Adaptation(), Report(), Accelerator()
    folder = out.with_name(out.name + ".run")
    checkpoint = Checkpoint(folder, {**asdict(settings), "embedder": embedder, "data": _digest(corpus, log)})
    student = create_student(embedder, corpus=[document.content for document in corpus.values()])
    student.to(accelerator.device)
    if len(corpus) < SMALLEST:
        report.verdict = (
            f"The corpus has {len(corpus):,} documents. Fewer than {SMALLEST:,} can make an embedder worse, so it "
            "stays as it was."
        )
        return _finish(student, report, out, checkpoint)
    pool = Pool.sample(corpus, student, settings.pool, settings.seed)
    checkpoint.save({}, "started.pt")
    with report.timed("queries"):
        queries = _queries(pool, generator, written, log, folder / QUERIES, settings, report, progress=progress)
    with report.timed("teacher"):
        lessons = _restored(checkpoint, report) or _taught(
            pool, queries, student, teacher, checkpoint, settings, report, progress=progress
        )
    with report.timed("training"):
        adapted = copy.deepcopy(student)
        adapted.config = replace(student.config, tuning="full")
        adapted.backbone.requires_grad_(True)
        run_log = RunLog(folder, stages=(AdaptationStage.name,))
        loop = Loop(adapted, accelerator, checkpoint, run_log, settings.seed, SAVE_EVERY, progress=progress)
        stage = AdaptationStage(adapted, pool, lessons.learned, settings, loop.batches)
        loop.run(stage, make_optimizer(adapted, {"backbone.": settings.lr}))
        run_log.close()
    with report.timed("decision"):
        _go_back(adapted, student, settings.way)
        fit_vectors(adapted, pool.texts)
        after = own_dcg(pool, adapted, lessons.decisive, pool.encode(adapted, progress=progress), DEPTH)
        gain = report.gain = tested(np.array([lessons.before, after]))
    report.adapted = gain.sure
    report.verdict = (
        f"nDCG@10 on {gain.queries} held-out queries: {gain.ndcg_10:.4f}, and {100 * gain.difference:+.1f} points by "
        f"adaptation ({100 * gain.low:+.1f} to {100 * gain.high:+.1f}). "
        + ("The student is adapted." if gain.sure else "That is not sure, so the embedder stays as it was.")
    )
    return _finish(adapted if gain.sure else student, report, out, checkpoint)


def _queries(
    pool: Pool,
    generator: Generator | None,
    written: Path | None,
    log: Sequence[str],
    path: Path,
    settings: Adaptation,
    report: Report,
    *,
    progress: bool,
) -> list[Query]:
    """The queries of all sources that have words, are no copies of their passage, and were written once."""
    rng = random.Random(f"{settings.seed}/queries")
    names = rng.sample(list(pool.names), min(settings.written, len(pool.names)))
    found = [Query(text, LOG_STYLE, None) for text in log]
    found += rng.sample(pool.titles, min(settings.written, len(pool.titles)))
    if written is None and generator is not None and not path.is_file():
        passages = {name: pool.texts[pool.names[name]] for name in names}
        write_queries(generator, passages, path, styles=settings.styles, seed=settings.seed, progress=progress)
    source = path if written is None else written
    rows = read_written(source) if source.is_file() else []
    found += [Query(row.text, row.style, pool.names[row.passage]) for row in rows if row.passage in pool.names]
    if not found:
        raise DataError(
            "there is nothing to make queries of: no document has a title. Name a generator, or a file of queries"
        )
    report.written = dict(Counter(query.style for query in found))
    times = Counter(query.text.casefold() for query in found)
    usable = [query for query in found if times[query.text.casefold()] == 1 and _is_usable(query, pool)]
    return usable or _too_few(found, [], [])


def _is_usable(query: Query, pool: Pool) -> bool:
    """Whether a query has a word, and is not most of its passage."""
    text = query.text.casefold().strip()
    if not any(character.isalnum() for character in text):
        return False
    passage = "" if query.own is None else pool.texts[query.own].casefold()
    return not (text in passage and 2 * len(text) > len(passage))


def _taught(
    pool: Pool,
    queries: Sequence[Query],
    student: Student,
    teacher: Teacher | None,
    checkpoint: Checkpoint,
    settings: Adaptation,
    report: Report,
    *,
    progress: bool,
) -> Lessons:
    """The teacher's scores of the candidates of all queries, and the queries that decide."""
    passages = pool.encode(student, progress=progress)
    encoded = encode(student, [query.text for query in queries], "query", progress=progress)
    owners = sorted({pool.documents[query.own] for query in queries if query.own is not None})
    rng = random.Random(f"{settings.seed}/held out")
    held_out = set(rng.sample(owners, round(settings.held_out * len(owners))))
    learned, decisive, ranks = list[Lesson](), list[Query](), list[tuple[int, int]]()
    for place, query in enumerate(tqdm(queries, desc="teacher", unit="query", disable=not progress)):
        cosine_N = passages.vectors_BE @ encoded.vectors_BE[place]
        rows = pool.candidates(query, cosine_N, settings.candidates)
        if len(rows) <= settings.negatives:
            continue
        if teacher is None:
            log_odds_K = iem_scores(student, encoded, place, passages, rows)
        else:
            log_odds_K = teacher.judge(query.text, [pool.texts[row] for row in rows]).log_odds_K
        if query.own is None:
            learned.append(Lesson(query, rows, log_odds_K))
            continue
        rank = int((log_odds_K > log_odds_K[0]).sum())
        if pool.documents[query.own] in held_out:
            ranks.append((rank, int((cosine_N[rows] > cosine_N[rows[0]]).sum())))
            if rank < CERTAIN:
                decisive.append(query)
        elif 2 * rank < len(rows):
            log_odds_K[0] += settings.prior
            learned.append(Lesson(query, rows, log_odds_K))
    report.kept = dict(Counter(lesson.query.style for lesson in learned))
    for style in report.kept:
        report.examples[style] = [lesson.query.text for lesson in learned if lesson.query.style == style][:3]
    _check(learned, decisive, ranks, queries, report)
    lessons = Lessons(learned, decisive, own_dcg(pool, student, decisive, passages, DEPTH))
    checkpoint.save(_packed(lessons, report), LESSONS)
    return lessons


def _check(
    learned: Sequence[Lesson],
    decisive: Sequence[Query],
    ranks: Sequence[tuple[int, int]],
    queries: Sequence[Query],
    report: Report,
) -> None:
    """Check that there is enough to learn and to decide, and that the teacher ranks better than the cosine."""
    if min(len(learned), len(decisive)) < FEWEST:
        _too_few(queries, learned, decisive)
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
        f"least {FEWEST} each): the others do not find the passage that they were written for. Read them; does the "
        "generator know the language of the corpus? More queries: --set written=N"
    )


def _packed(lessons: Lessons, report: Report) -> dict[str, Any]:
    """Lessons and report as values that a checkpoint holds."""
    return {
        "learned": [(tuple(query), rows, log_odds_K) for query, rows, log_odds_K in lessons.learned],
        "decisive": [tuple(query) for query in lessons.decisive],
        "before": lessons.before,
        "report": {"kept": report.kept, "examples": report.examples, "teacher": report.teacher},
    }


def _restored(checkpoint: Checkpoint, report: Report) -> Lessons | None:
    """What a killed run had saved."""
    saved = checkpoint.load(LESSONS)
    if saved is None:
        return None
    for name, value in saved["report"].items():
        setattr(report, name, value)
    learned = [Lesson(Query(*query), rows, log_odds_K) for query, rows, log_odds_K in saved["learned"]]
    return Lessons(learned, [Query(*query) for query in saved["decisive"]], saved["before"])


@torch.no_grad()
def _go_back(adapted: Student, start: Student, way: float) -> None:
    """Set the weights of the backbone to a point on the way from the start to where training ended."""
    for weight, first in zip(adapted.backbone.parameters(), start.backbone.parameters(), strict=True):
        weight.lerp_(first, 1 - way)


def _finish(student: Student, report: Report, out: Path, checkpoint: Checkpoint) -> Report:
    """Write the student, with the queries and the log beside it, and remove the run."""
    student.provenance |= {"trained": report.adapted, "adaptation": asdict(report)}
    folder = checkpoint.folder
    beside = [folder / name for name in (QUERIES, LOG) if folder is not None and (folder / name).is_file()]
    student.to("cpu").save(out, beside=beside)
    checkpoint.remove()
    return report


def _digest(corpus: Mapping[str, Document], log: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in (*(f"{id_}\n{document.content}" for id_, document in corpus.items()), *log):
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()[:32]
