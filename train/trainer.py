"""The training run: the encoder learns recall, the teacher is measured, the student learns from it, dev decides."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from d2llm.backbone import check_length, pad
from d2llm.beir import write_run
from d2llm.errors import DataError, ModelError
from d2llm.metrics import evaluate
from d2llm.pairs import Pair, read_pairs
from d2llm.student import Encoded, Student
from d2llm.types import task_id

from . import losses
from .checkpoint import ENCODER, Checkpoint
from .config import Recipe
from .data import Example, batch_at
from .dev import Dev, judgements, measure_pairs, measure_retrieval, measure_teacher, score_pairs, teacher_run
from .hub_teachers import load_cross_encoder
from .journal import CARD, CURVES, LOG, Journal, draw_curves, model_card, read_log
from .mining import load_bi_encoder, nearest
from .precision import autocast, half_precision
from .run_data import TrainingData, mine_negatives, paired
from .teacher import (
    BiEncoder,
    Bm25Teacher,
    Cosine,
    CrossEncoder,
    Judgement,
    LateInteraction,
    Side,
    Stack,
    Teacher,
    TokenStates,
)

logger = logging.getLogger(__name__)

Losses = dict[str, Tensor]
TEACHER_RUN, BACKBONE_RUN = "teacher.dev.run", "backbone.dev.run"


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gives: the student, who taught it, and dev (nDCG@10; Spearman for pairs) of the fine-tuned cosine, of
    the teacher on the same candidates, and of the finished student by cosine and by IEM."""

    student: Student
    teacher: Teacher | None
    """None where there are pairs alone."""
    taught: bool
    """Whether the teacher ranked better than the cosine; if not, the student learned from labels alone."""
    dev: dict[str, float]


def train(recipe: Recipe, out: Path | None = None, *, progress: bool = False) -> Result:
    """Train a student and, if `out` is given, write it there, with log, curves and a model card.

    Beside it lie `teacher.dev.run` and `backbone.dev.run`, rankings of dev by the teacher (of the student's candidates)
    and by the untrained backbone, for `d2llm eval --run`. Until it is done the run lives in `OUT.run`; killed at any
    moment and called again, it goes on from the last checkpoint there, with the losses it would have had. Under
    `accelerate launch` each process takes its share of every batch, and the first one writes.

    Raises:
        DataError: the data is incomplete or has no training queries, or `OUT.run` belongs to another recipe.
        ModelError: the backbone cannot be loaded, or `out` exists.
        ArgumentError: the student's lengths or heads do not suit the backbone.
        DivergedError: a loss is not finite.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists already. Choose another folder or remove it first.")
    folder = None if out is None else out.with_name(out.name + ".run")
    torch.manual_seed(recipe.seed)
    run = _Run(recipe, folder, progress=progress)
    run.fit_encoder()
    result = run.distil()
    if out is not None and folder is not None:
        run.publish(result, folder, out)
    return result


class _Run:
    """The state of one run: data, student, and what is computed once."""

    def __init__(self, recipe: Recipe, folder: Path | None, *, progress: bool) -> None:
        self.recipe, self.began = recipe, time.monotonic()
        self.accelerator = Accelerator()
        first = self.accelerator.is_main_process
        self.progress = progress and first
        self.checkpoint = Checkpoint(folder, asdict(recipe))
        # First: what is wrong with the backbone is said before a corpus is read.
        self.student = Student.create(recipe.student).to(self.accelerator.device)
        if "cross-encoder" in recipe.teacher.members:
            length, tokenizer = recipe.teacher.max_length, self.student.tokenizer
            check_length("teacher.max_length", length, tokenizer, "", self.student.backbone)
        self._read_retrieval()
        self.pairs = [read_pairs(Path(path)) for path in recipe.data.pairs]
        self.dev_pairs = read_pairs(Path(recipe.data.dev_pairs)) if recipe.data.dev_pairs else []
        if recipe.gradient_checkpointing:
            self.student.backbone.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]  # a Module to torch's types
        self.device = self.student.device
        self.dtype = half_precision(recipe.precision, self.device)
        if self.student.lexical is not None:
            texts = self.corpus or [text for pair in chain(*self.pairs) for text in (pair.text_a, pair.text_b)]
            self.student.lexical.fit(self.student.encodings(texts, "document"), self._special())
        # Last: what is wrong with data or backbone has been said before anything is written.
        self.journal = Journal(folder if first else None, recipe.encoder_steps)

    def _read_retrieval(self) -> None:
        """Corpus, dev, and the training queries in three parts; nothing where there are pairs alone."""
        self.corpus, self.seen, self.apart, self.calibration = list[str](), *(list[Example]() for _ in range(3))
        if self.recipe.data.folder is None:
            return
        data = TrainingData.load(self.recipe)
        self.corpus, self.bm25, self.dev = data.corpus, data.bm25, data.dev
        self.seen, self.apart, self.calibration = data.seen, data.apart, data.calibration
        if self.recipe.distil_mining == "given":
            paired(self.apart, self.recipe.distil_negatives, self.recipe.seed)  # said before the first stage

    def _special(self) -> list[int]:
        """Token ids that are no words: the special ones and those of the prompts."""
        tokenizer, config = self.student.tokenizer, self.recipe.student
        special = [id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        return [*special, *chain(*(tokenizer.encode(p).ids for p in (config.query_prompt, config.document_prompt)))]

    # -- first stage ---------------------------------------------------------------------------------------------

    def fit_encoder(self) -> None:
        """The backbone learns recall: a query against one positive and one hard negative of each in the batch.

        Pooling that starts as the mean stays the mean; it moves in the second stage, where it measured better.
        """
        done = self.checkpoint.load(ENCODER)
        if done is not None:
            self.student.load_state_dict(done, strict=False)
            return
        if self.recipe.encoder_steps:
            learns = self.recipe.student.start == "paper"
            parts = ["backbone.", "recall_head.", *(["pma."] if learns else [])]
            self._stage(
                "encoder", self.recipe.encoder_steps, self._optimizer(*parts), self._encoder_losses, self._zero_shot
            )
        else:
            self.journal.rewind("encoder", -1)
            self._zero_shot(0)
        if self.accelerator.is_main_process:
            self.checkpoint.save(_state(self.student), ENCODER)

    def _zero_shot(self, done: int) -> None:
        """Before the first step: the untrained backbone on dev."""
        if done:
            return
        self.states = TokenStates(self.student, self.dtype, progress=self.progress)
        dev = self._measure()
        self.journal.write("encoder", 0, {f"dev {name}": value for name, value in dev.table("backbone").items()})
        self._write_run(
            BACKBONE_RUN, {q: {d: -float(r) for r, d in enumerate(found)} for q, found in dev.candidates.items()}
        )

    def _write_run(self, name: str, run: Mapping[str, Mapping[str, float]]) -> None:
        """Keep a ranking of dev in the run's folder, if there is one."""
        if self.checkpoint.folder is None or not run or not self.accelerator.is_main_process:
            return
        try:
            write_run(self.checkpoint.folder / name, run, name.split(".")[0])
        except DataError as error:  # an id that the format cannot hold is no reason to lose a student
            logger.warning("%s is not kept: %s", name, error)

    def _encoder_losses(self, step: int) -> Losses:
        recipe, found = self.recipe, Losses()
        if self.seen:
            batch = self._batch(self.seen, recipe.encoder_batch, step)
            texts = [
                text
                for e in batch
                for text in (random.choice(e.positives), *random.sample(e.negatives, min(1, len(e.negatives))))
            ]
            queries = self._encode([example.query for example in batch], "query", live=True)
            passages = self._encode(texts, "document", live=True)
            cosine_BN = queries.vectors_BE @ passages.vectors_BE.T
            positive_BN = _positives(batch, texts, self.device)
            found["recall"] = losses.recall_contrastive(cosine_BN, positive_BN, temperature=recipe.loss.temperature)
        if self.pairs:
            found["pairs"] = recipe.loss.pairs * self._pairs_loss(step, live=True)[0]
        return found

    # -- second stage --------------------------------------------------------------------------------------------

    def distil(self) -> Result:
        """The student learns from the teacher, if the teacher knows better; the best state on dev is kept."""
        recipe, student = self.recipe, self.student
        self.states = TokenStates(student, self.dtype, progress=self.progress)
        teacher, taught, lessons = None, False, list[_Lesson]()
        if self.corpus:
            self.states.compute(self.corpus, "document")
            self._mine_again()
            teacher = self._teacher()
        before = self._measure()
        measured = before.table("before distillation")
        if teacher is not None:
            measured["teacher"] = measure_teacher(teacher, self.dev, before.candidates)
            taught = measured["teacher"] > before.cosine
            if not taught:
                logger.warning(
                    "The teacher ranks no better than the fine-tuned cosine (nDCG@10 %.4f against %.4f): it has "
                    "nothing to teach. The student learns from labels alone.", measured["teacher"], before.cosine
                )  # fmt: skip
            lessons = self._lessons(teacher if taught else None)
            self._calibrate(lessons)
        self._reference = measured
        logger.info("dev: %s", measured)
        live = recipe.distil_backbone == "live"
        parts = ["pma.", "recall_head.", "iem.", *(["backbone."] if live else [])]
        self._best: tuple[float, dict[str, Tensor]] = (-1.0, {})

        def measure(done: int) -> None:
            # At the start, now and then, and at the end.
            if done % recipe.eval_every == 0 or done == recipe.distil_steps:
                if live and done:
                    self.states = TokenStates(student, self.dtype)
                self._keep_best(done)

        self._stage(
            "distillation", recipe.distil_steps, self._optimizer(*parts),
            lambda step: self._distil_losses(lessons, step, live=live), measure,
        )  # fmt: skip
        student.load_state_dict(self._best[1], strict=False)
        if live:
            self.states = TokenStates(student, self.dtype)
        final = self._measure()
        if not final.shown:
            logger.warning(
                "On dev the IEM's correction of the cosine is within its noise (nDCG@10 %.4f against %.4f): it is set "
                "to zero, and rescoring keeps the order of recall.", final.iem, final.cosine
            )  # fmt: skip
            student.iem.drop_correction()
            final = self._measure()
        student.eval()
        measured |= final.table("student")
        if teacher is not None:
            ranking = teacher_run(teacher, self.dev, final.candidates)
            measured["teacher on the student's candidates"] = evaluate(ranking, self.dev.qrels)["nDCG@10"]
            self._write_run(TEACHER_RUN, ranking)
        student.provenance = {"recipe": asdict(recipe), "dev": measured, "taught": taught}
        self.journal.close()
        return Result(student, teacher, taught, measured)

    @torch.inference_mode()
    def _mine_again(self) -> None:
        """Negatives from the student's own recall: what teacher and IEM will have to order when it serves."""
        corpus_NE = self._cached(self.corpus, "document").vectors_BE

        def recall(queries: Sequence[str], depth: int) -> list[list[int]]:
            found: list[list[int]] = nearest(self._cached(queries, "query").vectors_BE, corpus_NE, depth).tolist()
            return found

        count = self.recipe.distil_candidates
        # A positive that recall misses will not be among what a teacher reranks: it would only skew the weights.
        places = recall([example.query for example in self.calibration], count) if self.calibration else []
        found = [{self.corpus[i] for i in row} for row in places]
        kept = [e for e, texts in zip(self.calibration, found, strict=True) if texts.issuperset(e.positives)]
        self.calibration = mine_negatives(kept, self.corpus, recall, count)
        if self.recipe.distil_mining == "student":
            self.apart = mine_negatives(self.apart, self.corpus, recall, count)

    def _teacher(self) -> Teacher:
        config = self.recipe.teacher
        members: dict[str, Teacher] = {}
        for name in config.members:
            if name == "cosine":
                members[name] = Cosine(self.student, self.states)
            elif name == "late-interaction":
                members[name] = LateInteraction(self.states)
            elif name == "bm25":
                members[name] = Bm25Teacher(self.bm25, self.corpus)
            elif name == "bi-encoder":
                for place in config.bi_encoders:
                    other = load_bi_encoder(place).to(self.device)
                    members[f"{name} {place}"] = BiEncoder(other, self.dtype)
            elif name == "cross-encoder":
                members[name] = self._fitted_cross_encoder()
            else:
                members[name] = load_cross_encoder(config, self.device, self.dtype)
        if len(members) == 1 and members.keys() & {"cross-encoder", "llm", "reranker"}:
            return next(iter(members.values()))  # calibrated by itself, and alone it keeps its features
        if not self.calibration:
            raise DataError(
                "no query is left to weigh the teacher's members with (each needs its positives within the student's "
                f"first {self.recipe.distil_candidates}): raise teacher.calibration_queries or distil_candidates"
            )
        stack = Stack(members)
        stack.fit(self.calibration)
        return stack

    def _fitted_cross_encoder(self) -> CrossEncoder:
        config = self.recipe.teacher
        encoder = CrossEncoder(self.student, config.max_length, self.dtype)
        negatives = min(7, self.recipe.data.negatives)
        encoder.fit(
            [example for example in self.seen if len(example.negatives) >= negatives],
            steps=config.cross_encoder_steps,
            batch=config.cross_encoder_batch,
            negatives=negatives,
            seed=self.recipe.seed,
            progress=self.progress,
        )
        return encoder

    def _lessons(self, teacher: Teacher | None) -> list[_Lesson]:
        """Candidates of each held-apart query with the teacher's log-odds; without a teacher, with the labels'."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        lessons = list[_Lesson]()
        share = paired(self.apart, self.recipe.distil_negatives, self.recipe.seed)[rank::world]
        for example, positive in tqdm(
            share, desc="teacher", unit="query", disable=not self.progress or teacher is None
        ):
            candidates = [positive, *example.negatives]
            labels = torch.full((len(candidates),), -20.0)
            labels[0] = 20.0
            said = Judgement(labels) if teacher is None else teacher.judge(example.query, candidates, example.task)
            lessons.append(_Lesson(example, candidates, *said, ranked=teacher is not None))
        return lessons if world == 1 else list(gather_object(lessons))

    def _calibrate(self, lessons: Sequence[_Lesson]) -> None:
        """Set the scales of cosine and lexical match to what imitates the teacher best, over all lessons at once.

        Two numbers a branch, by L-BFGS: gradient descent would take its first hundreds of steps for them.
        """
        iem = self.student.iem
        if iem.scale is None or self.recipe.student.interaction == "cosine":
            return
        for task in sorted({lesson.example.task for lesson in lessons}):
            rows = [lesson for lesson in lessons if lesson.example.task == task]
            width = min(len(lesson.candidates) for lesson in rows)
            with torch.inference_mode():
                cosine_NK, matches_NK = (torch.cat(parts) for parts in zip(*self._evidence(rows, width), strict=True))
            teacher_NK = torch.stack([lesson.log_odds[:width] for lesson in rows]).to(self.device)
            start = torch.stack([iem.scale.detach(), torch.zeros_like(iem.scale)])
            scales = _fit_scales(start, cosine_NK.clone(), matches_NK.clone(), teacher_NK)  # out of inference mode
            with torch.no_grad():
                iem.scale.copy_(scales[0])
                if iem.lexical_scale is not None:
                    iem.lexical_scale[task_id(task)] = scales[1]
            logger.info("%s: cosine scaled by %.2f, lexical match by %.3f", task, *scales.tolist())

    def _evidence(self, lessons: Sequence[_Lesson], width: int) -> list[tuple[Tensor, Tensor]]:
        """Cosines and lexical matches [B, K] of each batch of lessons."""
        found = []
        for start in range(0, len(lessons), 32):
            rows = lessons[start : start + 32]
            queries = self._encode([lesson.example.query for lesson in rows], "query")
            passages = self._encode([text for lesson in rows for text in lesson.candidates[:width]], "document")
            shape = (len(rows), width, -1)
            cosine_BK = torch.einsum("be,bke->bk", queries.vectors_BE, passages.vectors_BE.view(shape))
            matches_BK = torch.zeros_like(cosine_BK)
            if self.student.lexical is not None:
                passage_BKH = passages.passage_features_BH.view(shape)
                matches_BK = self.student.iem.matches(queries.query_features_BH, passage_BKH)
            found.append((cosine_BK, matches_BK))
        return found

    def _distil_losses(self, lessons: Sequence[_Lesson], step: int, *, live: bool) -> Losses:
        found = Losses()
        if lessons:
            found = self._imitation(self._batch(lessons, self.recipe.distil_batch, step), live=live)
        if self.pairs:
            by_cosine, by_iem = self._pairs_loss(step, live=live)
            found["pairs"] = self.recipe.loss.pairs * (self.recipe.loss.recall * by_cosine + by_iem)
        return found

    def _imitation(self, batch: Sequence[_Lesson], *, live: bool) -> Losses:
        weights, device, count = self.recipe.loss, self.device, self.recipe.distil_negatives + 1
        picks = [[0, *random.sample(range(1, len(lesson.candidates)), count - 1)] for lesson in batch]
        texts = [lesson.candidates[i] for lesson, row in zip(batch, picks, strict=True) for i in row]
        log_odds_BK = torch.stack([lesson.log_odds[row] for lesson, row in zip(batch, picks, strict=True)]).to(device)
        teacher_BK = log_odds_BK.sigmoid()
        queries = self._encode([lesson.example.query for lesson in batch], "query", live=live)
        passages = self._encode(texts, "document", live=live)
        cosine_BN = queries.vectors_BE @ passages.vectors_BE.T
        positive_BN = _positives([lesson.example for lesson in batch], texts, device)
        task_B = torch.tensor([task_id(lesson.example.task) for lesson in batch], device=device)

        size = len(batch)
        own_BK = torch.arange(size * count, device=device).view(size, count)
        passage_BKH = passages.passage_features_BH.view(size, count, -1)
        cosine_BK = cosine_BN.gather(1, own_BK)
        scores_BK = self.student.iem(queries.query_features_BH, passage_BKH, cosine_BK, task_B)
        first_BK = torch.zeros_like(scores_BK, dtype=torch.bool)
        first_BK[:, 0] = True
        first_BB = torch.arange(size, device=device).expand(size, size) == 0
        scale = self.student.iem.scale if self.student.iem.scale is not None else 1 / weights.temperature
        easy_BI = cache(lambda: self._in_batch(queries, passages, cosine_BN, task_B, own_BK))
        # Each is computed only if it counts: some cost as much as the rest of the step.
        terms: dict[str, Callable[[], Tensor]] = {
            "recall": lambda: losses.recall_contrastive(cosine_BN, positive_BN, temperature=weights.temperature),
            "margin_mse": lambda: losses.margin_mse(scale * cosine_BK, log_odds_BK),
            "listwise_imitation": lambda: losses.listwise_imitation(scores_BK, log_odds_BK),
            "contrastive": lambda: losses.recall_contrastive(scores_BK, first_BK, temperature=1.0),
            "in_batch": lambda: losses.recall_contrastive(
                torch.cat([scores_BK[:, :1], easy_BI()], dim=1), first_BB, temperature=1.0
            ),
            "contrastive_imitation": lambda: losses.contrastive_imitation(
                scores_BK, teacher_BK, first_BK, positive_in_denominator=weights.ci_positive_in_denominator
            ),
        }
        if batch[0].ranked:
            imitated_BK = teacher_BK if weights.ph_on_probabilities else log_odds_BK
            terms["rank_imitation_ph"] = lambda: losses.rank_imitation_ph(scores_BK, imitated_BK)
            # Of another query's positive the teacher would say no: probability 0.
            terms["rank_imitation_hi"] = lambda: losses.rank_imitation_hi(
                scores_BK[:, 1:], easy_BI(), teacher_BK[:, 1:], torch.zeros_like(easy_BI()), weight=weights.hi_weight
            )
        if batch[0].features is not None:
            terms["feature_imitation"] = lambda: self._fi(batch, picks, queries, passage_BKH, task_B)
        return {name: getattr(weights, name) * loss() for name, loss in terms.items() if getattr(weights, name)}

    def _in_batch(
        self, queries: Encoded, passages: Encoded, cosine_BN: Tensor, task_B: Tensor, own_BK: Tensor
    ) -> Tensor:
        """IEM scores [B, B - 1] of each query with the other queries' positives."""
        size = len(own_BK)
        others_BI = own_BK[:, 0].expand(size, size)[~torch.eye(size, dtype=torch.bool, device=own_BK.device)]
        others_BI = others_BI.view(size, size - 1)
        features = queries.query_features_BH, passages.passage_features_BH[others_BI]
        scores_BI: Tensor = self.student.iem(*features, cosine_BN.gather(1, others_BI), task_B)
        return scores_BI

    def _fi(
        self, batch: Sequence[_Lesson], picks: Sequence[list[int]], queries: Encoded, passage_BKH: Tensor,
        task_B: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = [lesson.features[row] for lesson, row in zip(batch, picks, strict=True) if lesson.features is not None]
        student_BKF = self.student.iem.interact(queries.query_features_BH, passage_BKH, task_B)
        teacher_BKT = torch.stack(rows).to(self.device, torch.float32)
        return losses.feature_imitation(student_BKF, teacher_BKT, squared=self.recipe.loss.fi_squared)

    # -- both stages ---------------------------------------------------------------------------------------------

    def _pairs_loss(self, step: int, *, live: bool) -> tuple[Tensor, Tensor]:
        """RI_PH over a batch of judged pairs, by cosine and by IEM. A batch is of one file, whose scale is one."""
        turn, file = divmod(step, len(self.pairs))
        batch = self._batch(self.pairs[file], self.recipe.pairs_batch, turn)
        # The order of the two means nothing, the IEM must learn that.
        sides = [(p.text_a, p.text_b) if random.random() < 0.5 else (p.text_b, p.text_a) for p in batch]
        first = self._encode([a for a, _ in sides], "query", live=live)
        second = self._encode([b for _, b in sides], "document", live=live)
        gold_1N = judgements(batch).to(self.device).unsqueeze(0)
        by_iem_N, by_cosine_N = score_pairs(self.student.iem, first, second)
        by_cosine, by_iem = (losses.rank_imitation_ph(x.unsqueeze(0), gold_1N) for x in (by_cosine_N, by_iem_N))
        return by_cosine, by_iem

    def _stage(
        self, name: str, steps: int, optimizer: torch.optim.Optimizer,
        losses_of: Callable[[int], Losses], measure: Callable[[int], None] = lambda done: None,
    ) -> None:  # fmt: skip
        """Steps until `steps`, from the checkpoint if it is of this stage. What is random depends on the step alone.

        `measure` is called with the number of steps done, before the first one and after each.
        """
        first, kept = 0, self.checkpoint.load()
        if kept is not None and kept["stage"] == name:
            first = kept["step"]
            self.student.load_state_dict(kept["student"], strict=False)
            optimizer.load_state_dict(kept["optimizer"])
            self._best = kept["best"]
            logger.info("%s goes on at step %d of %d", name, first, steps)
        self.journal.rewind(name, first or -1)  # what was measured before the first step is measured again
        if not first:
            measure(0)
        self.student.train()
        bar = tqdm(total=steps, initial=first, desc=name, unit="step", disable=not self.progress)
        for step in range(first, steps):
            seed = f"{self.recipe.seed}/{name}/{step}/{self.accelerator.process_index}"
            random.seed(seed)
            torch.manual_seed(random.getrandbits(63))
            found = losses_of(step)
            total = self._update(optimizer, found, step, steps)
            terms = {key: value.item() for key, value in found.items()} if len(found) > 1 else {}
            self.journal.write(name, step + 1, {"loss": total, **terms})
            measure(step + 1)
            if (step + 1) % self.recipe.save_every == 0 and self.accelerator.is_main_process:
                best = getattr(self, "_best", None)
                state = {"stage": name, "step": step + 1, "student": _state(self.student), "best": best}
                self.checkpoint.save({**state, "optimizer": optimizer.state_dict()})
            bar.update()
        bar.close()

    def _update(self, optimizer: torch.optim.Optimizer, found: Mapping[str, Tensor], step: int, steps: int) -> float:
        """One step with linear warm-up over a tenth of the steps and linear decay; gives the loss."""
        loss = losses.total(found, step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
        if loss.requires_grad:
            loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.accelerator.num_processes > 1:
            # By hand: the student's parts are called one by one, where DistributedDataParallel wants one forward.
            for parameter in parameters:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def _optimizer(self, *parts: str) -> torch.optim.Optimizer:
        """Over the trainable parameters whose names start with one of `parts`."""
        recipe = self.recipe
        scales = ("iem.scale", "iem.lexical_scale")
        rates = {
            "backbone.": recipe.encoder_lr,
            # In the paper's form the pooling starts from nothing, as the IEM does.
            "pma.": recipe.pooling_lr if recipe.student.start == "mean" else recipe.iem_lr,
            "recall_head.": recipe.pooling_lr,
            "iem.": recipe.iem_lr,
        }
        trained = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        groups = []
        for part, rate in rates.items():
            chosen = [p for name, p in trained if name.startswith(part) and name not in scales]
            if part in parts and chosen:
                groups.append({"params": chosen, "lr": rate, "initial_lr": rate})
        chosen = [p for name, p in trained if name in scales and "iem." in parts]
        if chosen:
            groups.append({"params": chosen, "lr": recipe.scale_lr, "initial_lr": recipe.scale_lr, "weight_decay": 0.0})
        if not groups:
            raise DataError("the recipe leaves nothing to train: the backbone is frozen and there are no heads")
        return torch.optim.AdamW(groups, weight_decay=0.01)

    def _batch(self, items: Sequence[_Item], size: int, step: int) -> list[_Item]:
        """This process's share of a step's batch."""
        whole = batch_at(items, size, step, str(self.recipe.seed))
        return whole[self.accelerator.process_index :: self.accelerator.num_processes] or whole[:1]

    def _encode(self, texts: Sequence[str], side: Side, *, live: bool = False) -> Encoded:
        """Encode with gradients: through the backbone if `live`, else from its token states computed once."""
        if not live:
            return self.student.heads(*self.states.batch(texts, side))
        ids, mask = pad(self.student.encodings(texts, side), self.device)
        with autocast(self.device, self.dtype):
            tokens = self.student.tokens(ids, mask)
        return self.student.heads(tokens, mask, ids)

    def _cached(self, texts: Sequence[str], side: Side) -> Encoded:
        """Any number of texts from their token states, in pieces."""
        self.states.compute(texts, side)
        parts = [self._encode(texts[i : i + 256], side) for i in range(0, len(texts), 256)]
        return Encoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    # -- measuring and publishing --------------------------------------------------------------------------------

    @torch.inference_mode()
    def _measure(self) -> Dev:
        """The student on dev."""
        student = self.student
        was_training = student.training
        student.eval()
        by_cosine, by_iem, candidates = list[float](), list[float](), dict[str, list[str]]()
        if self.corpus:
            passages = self._cached([document.content for document in self.dev.documents.values()], "document")
            queries = self._cached(list(self.dev.queries.values()), "query")
            by_cosine, by_iem, candidates = measure_retrieval(student.iem, self.dev, queries, passages)
        pairs: tuple[float | None, float | None] = None, None
        if self.dev_pairs:
            first = self._cached([pair.text_a for pair in self.dev_pairs], "query")
            second = self._cached([pair.text_b for pair in self.dev_pairs], "document")
            pairs = measure_pairs(student.iem, self.dev_pairs, first, second)
        student.train(was_training)
        optional = student.config.start == "mean" and not self.pairs
        return Dev(by_cosine, by_iem, *pairs, optional and bool(by_iem), candidates)

    def _keep_best(self, step: int) -> None:
        """Measure, log, and keep the state if it is the best so far."""
        dev = self._measure()
        self.journal.write("distillation", step, {f"dev {name}": value for name, value in dev.table("student").items()})
        logger.info("step %d: %s", step, dev.table("student"))
        if dev.served > self._best[0]:
            self._best = dev.served, _state(self.student)

    def publish(self, result: Result, folder: Path, out: Path) -> None:
        """Write the student with its log, curves and card, and remove the run's folder."""
        if self.accelerator.is_main_process:
            reference = {name: value for name, value in self._reference.items() if name == "teacher"}
            draw_curves(read_log(folder / LOG) if (folder / LOG).is_file() else [], reference, folder / CURVES)
            minutes = (time.monotonic() - self.began) / 60
            facts = {"seed": str(self.recipe.seed), "minutes": f"{minutes:.1f}", "device": self.device.type}
            (folder / CARD).write_text(model_card(self.recipe, out.name, result.dev, facts), encoding="utf-8")
            left = (LOG, CURVES, CARD, TEACHER_RUN, BACKBONE_RUN)
            result.student.save(out, beside=[path for name in left if (path := folder / name).is_file()])
            self.checkpoint.remove()
        self.accelerator.wait_for_everyone()


@dataclass(frozen=True, slots=True)
class _Lesson:
    """A query's candidates, the positive first, with the teacher's log-odds [K] and, if any, features [K, T]."""

    example: Example
    candidates: list[str]
    log_odds: Tensor
    features: Tensor | None
    ranked: bool
    """Whether the order among the negatives means anything."""


_Item = TypeVar("_Item", Example, _Lesson, Pair)


def _fit_scales(start: Tensor, cosine_NK: Tensor, matches_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """The two factors whose weighted sum imitates the teacher's distribution best."""
    scales = start.requires_grad_()
    optimizer = torch.optim.LBFGS([scales], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses.listwise_imitation(scales[0] * cosine_NK + scales[1] * matches_NK, teacher_NK)
        loss.backward()
        return loss

    optimizer.step(closure)
    return scales.detach()


def _positives(batch: Sequence[Example], texts: Sequence[str], device: torch.device) -> Tensor:
    """Boolean [B, N]: which of the batch's passages are positives of which query, by text."""
    rows = [[text in known for text in texts] for known in (set(example.positives) for example in batch)]
    return torch.tensor(rows, device=device)


def _state(student: Student) -> dict[str, Tensor]:
    """A copy of what is trained."""
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    return {name: value.detach().clone() for name, value in student.state_dict().items() if name in trained}
