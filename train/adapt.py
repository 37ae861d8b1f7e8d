"""Adaptation of an embedder to a corpus without labels: `d2llm adapt`.

Queries are written for a sample of passages. A teacher scores each query's candidates, and the student's cosine learns
these scores. Passages that are held out decide whether the result is better than the embedder.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from d2llm.calibration import FEWEST, SIGNIFICANT, Calibration, Evidence, Gain, calibrate, choices_around, ndcg, tested
from d2llm.embedder import create_student
from d2llm.errors import DataError
from d2llm.files import require_new, sha256_of
from d2llm.fitting import fit_vectors
from d2llm.saved import backbone_digest, sampled_digest
from d2llm.student import Encoded, Student
from d2llm.types import Document, StrPath

from .adaptation import Adaptation, Report
from .adaptation_stage import AdaptationStage, LinearMap, Vectors, encoded_vectors, go_back, mapped_vectors
from .checkpoint import Checkpoint
from .config import TeacherConfig
from .generator import Generator, Written, digest_of, read_written, write_queries
from .hub_loading import load_hub_teacher
from .loop import Loop, make_optimizer
from .mining import load_bi_encoder
from .on_stack import own_weights
from .pool import Pool, Query, evidence_of
from .precision import compute_dtype
from .run_log import LOG, RunLog
from .teacher import Bm25Teacher, Teacher
from .written_lessons import DEPTH, Lesson, Lessons, check_number, queries_of, restored, taught_by

logger = logging.getLogger(__name__)

SMALLEST = 3000
"""Fewest documents of a corpus that an embedder is adapted to. In GPL's table (arXiv 2112.07577) a corpus of a thousand
passages made an embedder worse, and one of ten thousand better."""
RERANKED_TOKENS = 256
"""Tokens of query and passage that a reranker reads."""
SAVE_EVERY = 25
"""Steps between two checkpoints."""
QUERIES = "queries.jsonl"


def adapt(
    corpus: Mapping[str, Document],
    embedder: StrPath,
    out: StrPath,
    *,
    generator: Generator | None = None,
    written: StrPath | None = None,
    log: Sequence[str] = (),
    reranker: str | None = None,
    teacher: str | None = None,
    max_length: int | None = None,
    settings: Adaptation | None = None,
    progress: bool = False,
) -> Report:
    """Adapt an embedder to a corpus without labels, and write the student to the new folder `out`.

    1. Queries come from the `generator`, or from the file `written` that `write_queries` made earlier. Titles and
       headings are queries for their documents. `log` are real queries, of which no passage is known.
    2. A teacher scores the candidates of each query: the untrained student, by cosine, words and vectors, and by the
       cosine of a larger embedder if there is a `teacher` (hub id or folder). Or a `reranker`, a hub id or a folder
       (also one that `d2llm teach --finetune` made), scores alone. A query is dropped if the teacher puts its passage
       below the median candidate.
    3. The cosine learns the teacher's distribution over the candidates: by a linear map of the recall vectors, which is
       trained in seconds and becomes the student's recall head, or by all weights of the backbone (`settings.tuning`).
    4. Queries of documents that were held out of a training decide (`settings.folds`). Unless the cosine or a hybrid
       search is sure to gain, and neither seems to lose, `out` is the embedder as it was. It has words and vectors of
       the corpus in either case.

    `max_length` is the limit of queries and passages in tokens; None keeps the embedder's own.

    The run lives in `OUT.run` until it is done, and the queries of the generator in a file beside it. After a kill, the
    same call continues with them, with the same result.

    Raises:
        DataError: there is nothing to make queries of, hardly a query is usable, or `OUT.run` belongs to another run.
        ModelError: the embedder cannot be loaded or ends with a tanh, or the teacher ranks no better than its cosine.
        ArgumentError: `max_length` does not suit the embedder.
        OutputExistsError: `out` exists and is not an empty folder.
        DivergedError: a loss is not finite.
    """
    embedder, out = str(embedder), Path(out)
    require_new(out)
    settings, report, accelerator = settings or Adaptation(), Report(), Accelerator()
    written = None if written is None else Path(written)
    rows = [] if written is None else _for_corpus(written, corpus)
    source = {
        "embedder": embedder,
        "corpus and log": _digest(corpus, log),
        "generator": None if generator is None else generator.identity,
        "written queries": None if written is None else sha256_of(written),
        "reranker": reranker,
        "teacher": teacher,
        "max_length": max_length,
    }
    student = create_student(embedder, max_length=max_length, corpus=[document.content for document in corpus.values()])
    source["weights of the embedder"] = backbone_digest(student.backbone)
    checkpoint = Checkpoint(out.with_name(out.name + ".run"), {**asdict(settings), **source})
    if settings.tuning == "head":
        LinearMap(student.embedding_dim).over(student)  # raises before the work, not after it, if there can be no map
    student.to(accelerator.device)
    if len(corpus) < SMALLEST:
        report.verdict = (
            f"The corpus has {len(corpus):,} documents. Fewer than {SMALLEST:,} can make an embedder worse, so it "
            "stays as it was."
        )
        return _finish(student, report, out, checkpoint, written)
    wanted = {row.passage.rpartition("#")[0] for row in rows} | {row.passage for row in rows}
    pool = Pool.sample(corpus, student, settings.pool, settings.written, settings.seed, wanted)
    if not (rows or generator or pool.titles):
        raise DataError(
            "there is nothing to decide with: no document has a title and a text, or headings. Name a generator, or a "
            "file of queries that were written for passages"
        )
    to_write = 0 if generator is None else min(settings.written, len(pool.names)) * len(settings.styles)
    check_number(len(pool.titles) + len(rows) + to_write)
    lessons = restored(checkpoint, report)
    # A wrong name of a teacher is reported before queries are written for an hour.
    judge = _teacher(reranker, teacher, pool, student)
    checkpoint.add_digest("teacher", _identity(judge))
    with report.timed("queries"):
        if generator is not None:
            written = _written_by(generator, pool, settings, out, progress=progress)
            rows = read_written(written)
        queries = queries_of(pool, rows, log, report)
    with report.timed("teacher"):
        if lessons is None:
            lessons = taught_by(pool, queries, student, judge, checkpoint, settings, report, progress=progress)
    with report.timed("training"):
        training = _Training(student, pool, lessons, settings, accelerator, checkpoint, progress)
        after = list[list[Evidence]]()
        for fold, queries in enumerate(lessons.decisive):
            adapted, encoded = training.run(f"part {fold + 1}", lessons.without(fold))
            after.append(evidence_of(pool, adapted, queries, encoded, DEPTH))
        report.verdict = _decide(report, lessons.before, after, student.iem.scales_of("asymmetric"))
        if report.adapted and settings.tuning == "head":
            adapted, _ = training.run("whole", lessons.learned)
        training.log.close()
    if not report.adapted:
        adapted, after = student, lessons.before
    report.scales = calibrated(adapted, lessons.decisive, after)
    report.verdict += _said(report.scales)
    _finish(adapted, report, out, checkpoint, written)
    if generator is not None and written is not None:
        written.unlink()  # the student's folder has a copy
    return report


def _decide(
    report: Report,
    before: Sequence[Sequence[Evidence]],
    after: Sequence[Sequence[Evidence]],
    scales: dict[str, float],
) -> str:
    """Measure the gains of an adaptation, decide whether it stays, and tell why.

    It stays if the ranking by cosine or that of a hybrid search is sure to gain, and neither seems to lose. A hybrid
    search alone would miss gains: on written queries, words and vectors leave it little to gain. Two rankings are two
    chances to be sure of what is not there, so each must be sure at half the level (Bonferroni).
    """
    alone = {part: float(part == "cosine") for part in scales}
    gains = report.cosine_gain, report.gain = _gain(before, after, alone), _gain(before, after, scales)
    sure = any(gain.sure and gain.p < SIGNIFICANT / len(gains) for gain in gains)
    report.adapted = sure and all(gain.difference >= 0 for gain in gains)
    told = (
        f"{name} {gain.ndcg_10:.4f}, and {100 * gain.difference:+.2f} points by adaptation (95 % interval "
        f"{100 * gain.low:+.2f} to {100 * gain.high:+.2f}, p {gain.p:.2g})"
        for name, gain in zip(("by cosine", "in a hybrid search"), gains, strict=True)
    )
    verdict = f"nDCG@10 on the {gains[0].queries:,} held-out queries that decide: {'; '.join(told)}. "
    if report.adapted:
        return verdict + "The student is adapted. "
    why = "One of the two loses" if sure else f"Neither is sure at p < {SIGNIFICANT / len(gains):g}"
    return verdict + f"{why}, so the embedder stays as it was. "


def _gain(before: Sequence[Sequence[Evidence]], after: Sequence[Sequence[Evidence]], scales: dict[str, float]) -> Gain:
    """What the scores after an adaptation gain over those before it."""
    scales_1C = np.array([list(scales.values())], np.float32)
    return tested(np.concatenate([ndcg(list(chain(*evidence)), scales_1C) for evidence in (before, after)]))


def calibrated(
    student: Student, decisive: Sequence[Sequence[Query]], evidence: Sequence[Sequence[Evidence]]
) -> Calibration | None:
    """Choose the scales of the student's score by the queries that decide, and set them if they are sure to gain.

    Each style of queries must gain, of which there are enough to say: what helps questions may hurt keywords. None if
    there are too few of every style.
    """
    families: dict[str, list[Evidence]] = {}
    for query, of_query in zip(chain(*decisive), chain(*evidence), strict=True):
        families.setdefault(query.style, []).append(of_query)
    families = {style: rows for style, rows in families.items() if len(rows) >= 2 * FEWEST}
    if not families:
        return None
    current = student.iem.scales_of("asymmetric")
    found = calibrate(families, current, choices_around(current))
    student.iem.set_scales("asymmetric", found.scales)
    return found


def _said(scales: Calibration | None) -> str:
    if scales is None:
        return f"The scales of the score stay: no style has {2 * FEWEST} queries that decide."
    if not scales.accepted:
        return "The scales of the score stay: no others are sure to gain with each style of queries."
    gains = ", ".join(f"{100 * gain.difference:+.1f} points ({style})" for style, gain in scales.gains.items())
    changed = (f"{part} {scales.current[part]:.3g} to {scale:.3g}" for part, scale in scales.chosen.items()
               if scale != scales.current[part])  # fmt: skip
    return f"The scales of the score change: {', '.join(changed)}; {gains}."


class _Training:
    """The trainings of one adaptation."""

    def __init__(
        self,
        student: Student,
        pool: Pool,
        lessons: Lessons,
        settings: Adaptation,
        accelerator: Accelerator,
        checkpoint: Checkpoint,
        progress: bool,
    ) -> None:
        self.student, self.pool, self.lessons, self.settings = student, pool, lessons, settings
        self.accelerator, self.checkpoint, self.progress = accelerator, checkpoint, progress
        names = [*(f"part {fold + 1}" for fold in range(len(lessons.decisive))), "whole"]
        self.log = RunLog(checkpoint.folder, stages=names)

    def run(self, name: str, learned: list[Lesson]) -> tuple[Student, Encoded]:
        """Train from the start. Gives the adapted student, and its encoding of the pool."""
        settings = self.settings
        trained, vectors = self._trainable()
        start = copy.deepcopy(trained)
        loop = Loop(
            trained, self.accelerator, self.checkpoint, self.log, settings.seed, SAVE_EVERY, progress=self.progress
        )
        stage = AdaptationStage(name, vectors, learned, settings, settings.schedule, loop.batches)
        loop.run(stage, make_optimizer(trained, {"": settings.schedule.lr}))
        go_back(trained, start, settings.way)
        return self._with_trained(trained)

    def _trainable(self) -> tuple[nn.Module, Vectors]:
        """What is trained, and the recall vectors that it gives in a step."""
        student = self.student
        if self.settings.tuning == "head":
            linear_map = LinearMap(student.embedding_dim).to(student.device)
            return linear_map, mapped_vectors(linear_map, self.lessons.passages.vectors_BE)
        trained = copy.deepcopy(student).requires_grad_(False)
        trained.config = replace(student.config, tuning="full")
        trained.backbone.requires_grad_(True)
        return trained, encoded_vectors(trained, self.pool.texts, self.settings.length)

    @torch.no_grad()
    def _with_trained(self, trained: nn.Module) -> tuple[Student, Encoded]:
        if isinstance(trained, LinearMap):
            passages = self.lessons.passages
            mapped_NE = trained(passages.vectors_BE.to(self.student.device)).cpu()
            return trained.over(self.student), passages._replace(vectors_BE=mapped_NE)
        assert isinstance(trained, Student)
        fit_vectors(trained, self.pool.texts)
        return trained, self.pool.encode(trained, progress=self.progress)


def _written_by(generator: Generator, pool: Pool, settings: Adaptation, out: Path, *, progress: bool) -> Path:
    """The file of the generator's queries beside `out`. What a killed run wrote of it is kept."""
    passages = pool.drawn(settings.written, settings.seed)
    digest = digest_of(generator, passages, settings.styles, settings.seed)
    path = out.with_name(f"{out.name}.{digest}.queries.jsonl")
    if not path.is_file():
        write_queries(generator, passages, path, styles=settings.styles, seed=settings.seed, progress=progress)
    return path


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


def _teacher(reranker: str | None, embedder: str | None, pool: Pool, student: Student) -> Teacher | Student | None:
    if embedder is not None:
        return load_bi_encoder(embedder).eval().to(student.device)
    if reranker is None:
        return None
    config, device = TeacherConfig(members=("reranker",), model=reranker, max_length=RERANKED_TOKENS), student.device
    return load_hub_teacher(config, device, compute_dtype("auto", device), Bm25Teacher(pool.bm25, pool.texts))


def _identity(teacher: Teacher | Student | None) -> str:
    """A digest of the weights that a teacher has of its own."""
    if isinstance(teacher, Student):
        return sampled_digest(teacher.named_parameters())
    return "" if teacher is None else own_weights(teacher)


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
