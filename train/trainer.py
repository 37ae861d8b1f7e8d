"""The training run: the encoder learns recall, the teacher is measured, the student learns from it, dev decides."""

from __future__ import annotations

import logging
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from d2llm.data import RetrievalData
from d2llm.errors import DataError
from d2llm.lexical import Bm25
from d2llm.metrics import evaluate, per_query
from d2llm.modeling import Encoded, Student, pad
from d2llm.types import task_id

from . import losses
from .config import Recipe
from .data import Example, examples_of, with_negatives
from .teacher import (
    Cosine,
    CrossEncoder,
    Judgement,
    LateInteraction,
    Lexical,
    Side,
    Stack,
    Teacher,
    TokenStates,
    autocast,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

RERANKED = 100
"""Candidates that student and teacher rerank when they are measured."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gives: the student, who taught it, and nDCG@10 on dev of the fine-tuned cosine, of the teacher on the
    same candidates, and of the finished student by cosine and by IEM."""

    student: Student
    teacher: Teacher
    taught: bool
    """Whether the teacher ranked better than the cosine; if not, the student learned from labels alone."""
    dev: dict[str, float]


def train(recipe: Recipe, out: Path | None = None, *, progress: bool = False) -> Result:
    """Train a student and, if `out` is given, write it there.

    Raises:
        DataError: the data folder is incomplete or has no training queries.
        ModelError: the backbone cannot be loaded, or `out` exists.
    """
    torch.manual_seed(recipe.seed)
    run = _Run(recipe, progress=progress)
    run.fit_encoder()
    result = run.distil()
    if out is not None:
        result.student.save(out)
    return result


class _Run:
    """The state of one run: data, student, and what is computed once."""

    def __init__(self, recipe: Recipe, *, progress: bool) -> None:
        self.recipe, self.progress = recipe, progress
        self.rng = random.Random(recipe.seed)
        folder = Path(recipe.data.folder)
        data, dev = RetrievalData.load(folder, "train"), RetrievalData.load(folder, "dev")
        self.corpus = list(dict.fromkeys(document.content for document in data.documents.values()))
        self.bm25 = Bm25(self.corpus)
        examples = with_negatives(examples_of(data), self.corpus, self.bm25.top, recipe.data.negatives)
        if not examples:
            raise DataError(f"{folder}: the train split has no query with a positive passage")
        self.rng.shuffle(examples)
        calibration = min(recipe.teacher.calibration_queries, len(examples) // 4)
        apart = int((len(examples) - calibration) * recipe.held_apart)
        self.calibration, rest = examples[:calibration], examples[calibration:]
        self.apart, self.seen = rest[:apart] or rest, rest[apart:] or rest
        self.dev = _sample(dev, recipe.data.dev_queries, recipe.data.dev_documents, self.rng)
        self.student = Student.create(recipe.student)
        if torch.cuda.is_available():
            self.student.cuda()
        self.dtype = _dtype(recipe, self.student.device)

    # -- first stage ---------------------------------------------------------------------------------------------

    def fit_encoder(self) -> None:
        """The backbone learns recall: a query against one positive and one hard negative of each in the batch.

        Pooling that starts as the mean stays the mean; it moves in the second stage, where it measured better.
        """
        recipe, student = self.recipe, self.student
        if not recipe.encoder_steps:
            return
        student.train()
        pooling = ["recall_head."] if recipe.student.start == "mean" else ["recall_head.", "pma."]
        optimizer = self._optimizer("backbone.", *pooling)
        stream = _Stream(self.seen, self.rng)
        for step in self._steps(recipe.encoder_steps, "encoder"):
            batch = stream.take(recipe.encoder_batch)
            texts = [
                text
                for example in batch
                for text in (
                    self.rng.choice(example.positives),
                    *self.rng.sample(example.negatives, min(1, len(example.negatives))),
                )
            ]
            queries = self._encode([example.query for example in batch], "query", live=True)
            passages = self._encode(texts, "document", live=True)
            loss = losses.recall_contrastive(
                queries.vectors_BE @ passages.vectors_BE.T,
                _positives(batch, texts, student.device),
                temperature=recipe.loss.temperature,
            )
            self._update(optimizer, loss, step, recipe.encoder_steps)

    # -- second stage --------------------------------------------------------------------------------------------

    def distil(self) -> Result:
        """The student learns from the teacher, if the teacher knows better; the best state on dev is kept."""
        recipe, student = self.recipe, self.student
        states = TokenStates(student, self.dtype, progress=self.progress)
        states.compute(self.corpus, "document")
        self.states = states
        self._mine_again()
        teacher = self._teacher(states)
        baseline = self._dev_scores()
        measured = {"cosine before distillation": baseline.cosine, "teacher": self._measure(teacher)}
        taught = measured["teacher"] > baseline.cosine
        logger.info("dev nDCG@10: %s", measured)
        if not taught:
            logger.warning(
                "The teacher ranks no better than the fine-tuned cosine (nDCG@10 %.4f against %.4f): it has nothing to "
                "teach. The student learns from labels alone.", measured["teacher"], baseline.cosine
            )  # fmt: skip
        lessons = self._lessons(teacher if taught else None)
        best, best_state = baseline.served, _state(student)
        live = recipe.distil_backbone == "live"
        optimizer = self._optimizer("pma.", "recall_head.", "iem.", *(["backbone."] if live else []))
        stream = _Stream(lessons, self.rng)
        student.train()
        for step in self._steps(recipe.distil_steps, "distillation"):
            loss = self._distil_loss(stream.take(recipe.distil_batch), live=live)
            self._update(optimizer, loss, step, recipe.distil_steps)
            # Measured now and then, and at the end.
            if (step + 1) % recipe.eval_every == 0 or step + 1 == recipe.distil_steps:
                if live:
                    self.states = TokenStates(student, self.dtype)
                scores = self._dev_scores()
                logger.info("step %d: dev nDCG@10 %.4f by cosine, %.4f by IEM", step + 1, scores.cosine, scores.iem)
                if scores.served > best:
                    best, best_state = scores.served, _state(student)
        student.load_state_dict(best_state, strict=False)
        if live:
            self.states = TokenStates(student, self.dtype)
        final = self._dev_scores()
        if not final.shown:
            logger.warning(
                "On dev the IEM's correction of the cosine is within its noise (nDCG@10 %.4f against %.4f): it is set "
                "to zero, and rescoring keeps the order of recall.", final.iem, final.cosine
            )  # fmt: skip
            student.iem.drop_correction()
            final = self._dev_scores()
        student.eval()
        measured |= {"student by cosine": final.cosine, "student by IEM": final.iem}
        student.provenance = {"recipe": asdict(recipe), "dev_ndcg@10": measured, "taught": taught}
        return Result(student, teacher, taught, measured)

    @torch.inference_mode()
    def _mine_again(self) -> None:
        """Negatives from the student's own recall: what teacher and IEM will have to order when it serves."""
        corpus = _cat([self._encode(self.corpus[i : i + 256], "document") for i in range(0, len(self.corpus), 256)])

        def recall(query: str, k: int) -> list[int]:
            cosine_1N = self._encode([query], "query").vectors_BE @ corpus.vectors_BE.T
            best: list[int] = cosine_1N[0].topk(min(k, len(self.corpus))).indices.tolist()
            return best

        self.states.compute([example.query for example in (*self.calibration, *self.apart)], "query")
        count = self.recipe.distil_candidates
        # A positive that recall misses will not be among what a teacher reranks: it would only skew the weights.
        self.calibration = [
            example
            for example in self.calibration
            if {self.corpus[i] for i in recall(example.query, count)}.issuperset(example.positives)
        ]
        self.calibration = with_negatives(self.calibration, self.corpus, recall, count)
        self.apart = with_negatives(self.apart, self.corpus, recall, count)

    def _teacher(self, states: TokenStates) -> Teacher:
        config = self.recipe.teacher
        members: dict[str, Teacher] = {}
        for name in config.members:
            if name == "cosine":
                members[name] = Cosine(self.student, states)
            elif name == "late-interaction":
                members[name] = LateInteraction(states)
            elif name == "bm25":
                members[name] = Lexical(self.bm25, self.corpus)
            else:
                encoder = CrossEncoder(self.student, config.max_length, self.dtype)
                encoder.fit(
                    self.seen,
                    steps=config.cross_encoder_steps,
                    batch=config.cross_encoder_batch,
                    negatives=min(7, self.recipe.data.negatives),
                    seed=self.recipe.seed,
                    progress=self.progress,
                )
                members[name] = encoder
        if len(members) == 1 and isinstance(encoder_alone := next(iter(members.values())), CrossEncoder):
            return encoder_alone  # alone it keeps its features
        stack = Stack(members)
        stack.fit(self.calibration)
        return stack

    def _lessons(self, teacher: Teacher | None) -> list[_Lesson]:
        """Candidates of each held-apart query with the teacher's log-odds; without a teacher, with the labels'."""
        lessons = []
        for example in tqdm(self.apart, desc="teacher", unit="query", disable=not self.progress or teacher is None):
            candidates = [self.rng.choice(example.positives), *example.negatives]
            labels = torch.full((len(candidates),), -20.0)
            labels[0] = 20.0
            said = Judgement(labels) if teacher is None else teacher.judge(example.query, candidates, example.task)
            lessons.append(_Lesson(example, candidates, *said, ranked=teacher is not None))
        count = self.recipe.distil_negatives + 1
        enough = [lesson for lesson in lessons if len(lesson.candidates) >= count]
        if not enough:
            raise DataError(
                f"no query has {count - 1} hard negatives: lower distil_negatives or raise distil_candidates"
            )
        return enough

    def _distil_loss(self, batch: Sequence[_Lesson], *, live: bool) -> Tensor:
        weights, device = self.recipe.loss, self.student.device
        count = self.recipe.distil_negatives + 1
        picks = [[0, *self.rng.sample(range(1, len(lesson.candidates)), count - 1)] for lesson in batch]
        texts = [lesson.candidates[i] for lesson, row in zip(batch, picks, strict=True) for i in row]
        log_odds_BK = torch.stack([lesson.log_odds[row] for lesson, row in zip(batch, picks, strict=True)]).to(device)
        teacher_BK = log_odds_BK.sigmoid()
        queries = self._encode([lesson.example.query for lesson in batch], "query", live=live)
        passages = self._encode(texts, "document", live=live)
        cosine_BN = queries.vectors_BE @ passages.vectors_BE.T
        positive_BN = _positives([lesson.example for lesson in batch], texts, device)
        task_B = torch.tensor([task_id(lesson.example.task) for lesson in batch], device=device)

        size = len(batch)
        own = torch.arange(size * count, device=device).view(size, count)
        cosine_BK = cosine_BN.gather(1, own)
        passage_BKH = passages.passage_features_BH.view(size, count, -1)
        scores_BK = self.student.iem(queries.query_features_BH, passage_BKH, cosine_BK, task_B)
        first_BK = torch.zeros_like(scores_BK, dtype=torch.bool)
        first_BK[:, 0] = True
        total = weights.recall * losses.recall_contrastive(cosine_BN, positive_BN, temperature=weights.temperature)
        total = total + weights.listwise_imitation * losses.listwise_imitation(scores_BK, log_odds_BK)
        total = total + weights.contrastive_imitation * losses.contrastive_imitation(scores_BK, teacher_BK, first_BK)
        if batch[0].ranked:
            total = total + weights.rank_imitation_ph * losses.rank_imitation_ph(scores_BK, log_odds_BK)
            total = total + weights.rank_imitation_hi * self._hi(
                queries, passages, cosine_BN, scores_BK, teacher_BK, task_B, own
            )
        if batch[0].features is not None:
            teacher_BKT = torch.stack([les.features[row] for les, row in zip(batch, picks, strict=True)])  # type: ignore[index]
            student_BKH = self.student.iem.interact(queries.query_features_BH, passage_BKH, task_B)
            total = total + weights.feature_imitation * losses.feature_imitation(student_BKH, teacher_BKT.to(device))
        return total

    def _hi(
        self, queries: Encoded, passages: Encoded, cosine_BN: Tensor, scores_BK: Tensor, teacher_BK: Tensor,
        task_B: Tensor, own_BK: Tensor,
    ) -> Tensor:  # fmt: skip
        """Hard negatives against the other queries' positives, to which the teacher would say no (probability 0)."""
        size = len(own_BK)
        if size < 2:
            return scores_BK.sum() * 0.0
        others = torch.stack([own_BK[torch.arange(size, device=own_BK.device) != i, 0] for i in range(size)])
        easy_BI = self.student.iem(
            queries.query_features_BH, passages.passage_features_BH[others], cosine_BN.gather(1, others), task_B
        )
        return losses.rank_imitation_hi(scores_BK[:, 1:], easy_BI, teacher_BK[:, 1:], torch.zeros_like(easy_BI))

    # -- measuring -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _dev_scores(self) -> _Dev:
        """Measure cosine and IEM on dev; remembers the candidates for `_measure`."""
        student, dev = self.student, self.dev
        was_training = student.training
        student.eval()
        ids = list(dev.documents)
        texts = [dev.documents[id_].content for id_ in ids]
        passages = _cat([self._encode(texts[i : i + 256], "document") for i in range(0, len(texts), 256)])
        cosine_run: dict[str, dict[str, float]] = {}
        iem_run: dict[str, dict[str, float]] = {}
        self.states.compute(list(dev.queries.values()), "query")
        task_1 = torch.tensor([task_id("asymmetric")], device=student.device)
        for query_id, text in dev.queries.items():
            query = self._encode([text], "query")
            scores_K, best_K = (query.vectors_BE @ passages.vectors_BE.T)[0].topk(min(RERANKED, len(ids)))
            found = [ids[i] for i in best_K.tolist()]
            features_1KH = passages.passage_features_BH[best_K].unsqueeze(0)
            iem_K = student.iem(query.query_features_BH, features_1KH, scores_K.unsqueeze(0), task_1)[0]
            cosine_run[query_id] = dict(zip(found, scores_K.tolist(), strict=True))
            iem_run[query_id] = dict(zip(found, iem_K.tolist(), strict=True))
        self._candidates = {query_id: list(run) for query_id, run in cosine_run.items()}
        student.train(was_training)
        cosine, iem = (per_query(run, dev.qrels, "nDCG@10") for run in (cosine_run, iem_run))
        return _Dev([cosine[q] for q in dev.queries], [iem[q] for q in dev.queries], student.config.start == "mean")

    def _measure(self, teacher: Teacher) -> float:
        """nDCG@10 of the teacher on dev, reranking the student's own candidates."""
        run = {}
        for query_id, found in self._candidates.items():
            texts = [self.dev.documents[id_].content for id_ in found]
            log_odds_K = teacher.judge(self.dev.queries[query_id], texts).log_odds_K
            run[query_id] = dict(zip(found, log_odds_K.tolist(), strict=True))
        return evaluate(run, self.dev.qrels)["nDCG@10"]

    # -- machinery -----------------------------------------------------------------------------------------------

    def _encode(self, texts: Sequence[str], side: Side, *, live: bool = False) -> Encoded:
        """Encode with gradients: through the backbone if `live`, else from its token states computed once."""
        if not live:
            return self.student.heads(*self.states.batch(texts, side))
        ids, mask = pad(self.student.encodings(texts, side), self.student.device)
        with autocast(self.student.device, self.dtype):
            tokens = self.student.tokens(ids, mask)
        return self.student.heads(tokens, mask)

    def _optimizer(self, *parts: str) -> torch.optim.Optimizer:
        """Over the trainable parameters whose names start with one of `parts`."""
        recipe = self.recipe
        rates = {
            "backbone.": recipe.encoder_lr,
            # In the paper's form the pooling starts from nothing, as the IEM does.
            "pma.": recipe.pooling_lr if recipe.student.start == "mean" else recipe.iem_lr,
            "recall_head.": recipe.pooling_lr,
            "iem.": recipe.iem_lr,
        }
        groups = []
        for part, rate in rates.items():
            chosen = [p for name, p in self.student.named_parameters() if name.startswith(part) and p.requires_grad]
            if part in parts and chosen:
                groups.append({"params": chosen, "lr": rate, "initial_lr": rate})
        return torch.optim.AdamW(groups, weight_decay=0.01)

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, step: int, steps: int) -> None:
        """One step with linear warm-up over a tenth of the steps and linear decay."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower the learning rates or use fp32")
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def _steps(self, count: int, name: str) -> tqdm[int]:
        return tqdm(range(count), desc=name, unit="step", disable=not self.progress)


@dataclass(frozen=True, slots=True)
class _Dev:
    """nDCG@10 of each dev query, by cosine and by IEM."""

    by_cosine: list[float]
    by_iem: list[float]
    optional: bool
    """Whether the IEM is the cosine plus a correction, which can be left out."""

    @property
    def cosine(self) -> float:
        """The mean by cosine."""
        return statistics.fmean(self.by_cosine)

    @property
    def iem(self) -> float:
        """The mean by IEM."""
        return statistics.fmean(self.by_iem)

    @property
    def shown(self) -> bool:
        """Whether the IEM's gain over the cosine is more than one standard error of the paired differences."""
        if not self.optional:
            return True
        gains = [iem - cosine for iem, cosine in zip(self.by_iem, self.by_cosine, strict=True)]
        return statistics.fmean(gains) > statistics.pstdev(gains) / math.sqrt(len(gains))

    @property
    def served(self) -> float:
        """What a search would reach: by IEM if its correction shows, else by cosine."""
        return self.iem if self.shown else self.cosine


@dataclass(frozen=True, slots=True)
class _Lesson:
    """A query's candidates, the positive first, with the teacher's log-odds [K] and, if any, features [K, T]."""

    example: Example
    candidates: list[str]
    log_odds: Tensor
    features: Tensor | None
    ranked: bool
    """Whether the order among the negatives means anything."""


class _Stream(Generic[T]):
    """Endless shuffled passes over some items."""

    def __init__(self, items: Sequence[T], rng: random.Random) -> None:
        self.items, self.rng, self.left = list(items), rng, list[T]()

    def take(self, count: int) -> list[T]:
        """The next `count` items (fewer if there are fewer in all); no item twice in one batch."""
        count = min(count, len(self.items))
        if len(self.left) < count:
            self.left = self.rng.sample(self.items, len(self.items))
        batch, self.left = self.left[:count], self.left[count:]
        return batch


def _positives(batch: Sequence[Example], texts: Sequence[str], device: torch.device) -> Tensor:
    """Boolean [B, N]: which of the batch's passages are positives of which query, by text."""
    rows = [[text in known for text in texts] for known in (set(example.positives) for example in batch)]
    return torch.tensor(rows, device=device)


def _cat(parts: Sequence[Encoded]) -> Encoded:
    return Encoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _state(student: Student) -> dict[str, Tensor]:
    """A copy of what is trained."""
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    return {name: value.detach().clone() for name, value in student.state_dict().items() if name in trained}


def _sample(data: RetrievalData, queries: int, documents: int, rng: random.Random) -> RetrievalData:
    """A smaller data set: some queries, their judged passages, and some others."""
    chosen = rng.sample(sorted(data.queries), min(queries, len(data.queries)))
    judged = {document for query in chosen for document in data.qrels[query]}
    others = sorted(data.documents.keys() - judged)
    kept = sorted(judged | set(rng.sample(others, min(documents, len(others)))))
    return replace(
        data,
        documents={id_: data.documents[id_] for id_ in kept},
        queries={query: data.queries[query] for query in chosen},
        qrels={query: data.qrels[query] for query in chosen},
    )


def _dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    if recipe.precision == "auto":
        fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if recipe.precision == "bf16" else None
