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
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from d2llm.backbone import pad
from d2llm.calibration import tested
from d2llm.embedder import create_student
from d2llm.errors import DataError
from d2llm.files import require_new, sha256_of
from d2llm.fitting import fit_vectors
from d2llm.student import Student
from d2llm.types import Document

from . import losses
from .adaptation import Adaptation, Report
from .checkpoint import Checkpoint
from .config import TeacherConfig
from .generator import Generator, Written, digest_of, read_written, write_queries
from .hub_loading import load_hub_teacher
from .loop import Loop, Losses, make_optimizer
from .pool import Pool, own_dcg
from .precision import autocast, compute_dtype
from .run_log import LOG, RunLog
from .schedule import Batches
from .teacher import Bm25Teacher, Teacher
from .token_states import Side
from .written_lessons import DEPTH, Lesson, queries_of, restored, taught_by

logger = logging.getLogger(__name__)

SMALLEST = 3000
"""Fewest documents of a corpus that an embedder is adapted to. In GPL's table (arXiv 2112.07577) a corpus of a thousand
passages made an embedder worse, and one of ten thousand better."""
RERANKED_TOKENS = 256
"""Tokens of query and passage that a reranker reads."""
AT_ONCE = 64
"""Texts of one step that are padded to the same length: the longest of a step would make all of them long."""
SAVE_EVERY = 25
"""Steps between two checkpoints."""
QUERIES = "queries.jsonl"


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
    reranker: str | None = None,
    settings: Adaptation | None = None,
    progress: bool = False,
) -> Report:
    """Adapt an embedder to a corpus without labels, and write the student to the new folder `out`.

    1. Queries come from the `generator`, or from the file `written` that `write_queries` made earlier. Titles are
       queries for their documents. `log` are real queries, of which no passage is known.
    2. The teacher scores the candidates of each query. It is the `reranker`, a hub id or a folder (also one that
       `d2llm teach --finetune` made), or else the untrained student's score of cosine, words and vectors. A query is
       dropped if the teacher puts its passage below the median candidate.
    3. The cosine learns the teacher's distribution over the candidates.
    4. Queries of documents held out decide. If the gain is not sure, `out` is the embedder as it was, with words and
       vectors fitted to the corpus.

    The run lives in `OUT.run` until it is done, and the queries of the generator in a file beside it. After a kill, the
    same call continues with them, with the same result.

    Raises:
        DataError: there is nothing to make queries of, hardly a query is usable, or `OUT.run` belongs to another run.
        ModelError: the embedder cannot be loaded, or the teacher ranks no better than the embedder's cosine.
        OutputExistsError: `out` exists and is not an empty folder.
        DivergedError: a loss is not finite.
    """
    require_new(out)
    settings, report, accelerator = settings or Adaptation(), Report(), Accelerator()
    rows = [] if written is None else _for_corpus(written, corpus)
    if not (rows or generator or any(document.title.strip() and document.text.strip() for document in corpus.values())):
        raise DataError(
            "there is nothing to decide with: no document has a title and a text. Name a generator, or a file of "
            "queries that were written for passages"
        )
    source = {
        "embedder": embedder,
        "corpus and log": _digest(corpus, log),
        "generator": None if generator is None else generator.identity,
        "written queries": None if written is None else sha256_of(written),
        "reranker": reranker,
    }
    checkpoint = Checkpoint(out.with_name(out.name + ".run"), {**asdict(settings), **source})
    student = create_student(embedder, corpus=[document.content for document in corpus.values()])
    student.to(accelerator.device)
    if len(corpus) < SMALLEST:
        report.verdict = (
            f"The corpus has {len(corpus):,} documents. Fewer than {SMALLEST:,} can make an embedder worse, so it "
            "stays as it was."
        )
        return _finish(student, report, out, checkpoint, written)
    wanted = {row.passage.partition("#")[0] for row in rows} | {row.passage for row in rows}
    pool = Pool.sample(corpus, student, settings.pool, settings.seed, wanted)
    with report.timed("queries"):
        if generator is not None:
            passages = pool.drawn(settings.written, settings.seed)
            digest = digest_of(generator, passages, settings.styles, settings.seed)
            written = out.with_name(f"{out.name}.{digest}.queries.jsonl")
            if not written.is_file():
                write_queries(
                    generator, passages, written, styles=settings.styles, seed=settings.seed, progress=progress
                )
            rows = read_written(written)
        queries = queries_of(pool, rows, log, settings, report)
    with report.timed("teacher"):
        teacher = _teacher(reranker, pool, student.device)
        lessons = restored(checkpoint, report) or taught_by(
            pool, queries, student, teacher, checkpoint, settings, report, progress=progress
        )
    with report.timed("training"):
        adapted = copy.deepcopy(student)
        adapted.config = replace(student.config, tuning="full")
        adapted.backbone.requires_grad_(True)
        run_log = RunLog(checkpoint.folder, stages=(AdaptationStage.name,))
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
    _finish(adapted if gain.sure else student, report, out, checkpoint, written)
    if generator is not None and written is not None:
        written.unlink()  # the student's folder has a copy
    return report


def _for_corpus(written: Path, corpus: Mapping[str, Document]) -> list[Written]:
    """The queries of a file that were written for documents of the corpus."""
    rows = read_written(written)
    known = [row for row in rows if row.passage in corpus or row.passage.rpartition("#")[0] in corpus]
    if not known:
        raise DataError(
            f"{written}: none of {len(rows):,} queries was written for a document of this corpus; the first one is for "
            f"{rows[0].passage!r}"
        )
    if len(known) < len(rows):
        logger.warning("%s: %d of %d queries are for documents that the corpus does not have", written,
                       len(rows) - len(known), len(rows))  # fmt: skip
    return known


def _teacher(reranker: str | None, pool: Pool, device: torch.device) -> Teacher | None:
    if reranker is None:
        return None
    config = TeacherConfig(members=("reranker",), model=reranker, max_length=RERANKED_TOKENS)
    return load_hub_teacher(config, device, compute_dtype("auto", device), Bm25Teacher(pool.bm25, pool.texts))


@torch.no_grad()
def _go_back(adapted: Student, start: Student, way: float) -> None:
    """Set the weights of the backbone to a point on the way from the start to where training ended."""
    for weight, first in zip(adapted.backbone.parameters(), start.backbone.parameters(), strict=True):
        weight.lerp_(first, 1 - way)


def _finish(student: Student, report: Report, out: Path, checkpoint: Checkpoint, written: Path | None) -> Report:
    """Write the student, with the queries and the log of the training, and remove the run."""
    student.provenance |= {"trained": report.adapted, "adaptation": asdict(report)}
    files = [] if checkpoint.folder is None else [checkpoint.folder / LOG]
    with tempfile.TemporaryDirectory() as temporary:
        if written is not None and written.is_file():
            files.append(Path(shutil.copy(written, Path(temporary) / QUERIES)))
        student.to("cpu").save(out, beside=[path for path in files if path.is_file()])
    checkpoint.remove()
    return report


def _digest(corpus: Mapping[str, Document], log: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in (*(f"{id_}\n{document.content}" for id_, document in corpus.items()), *log):
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()[:32]
