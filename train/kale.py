"""Alignment of a small query encoder to a student (KALE, arXiv 2304.01016): queries alone, no judgements.

What the student makes of each query is computed once and kept. The small encoder learns both things that a query
yields, and the scores that follow from them against a sample of passages as the student encoded them.

N queries, M passages, K candidates of a query, B batch, E recall width, H feature width, D width of the small encoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from d2llm.errors import DataError, ModelError
from d2llm.metrics import overlap
from d2llm.modeling import Student, pad
from d2llm.query_encoder import QueryEncoder, StaticQueryEncoder, TransformerQueryEncoder
from d2llm.types import Document, Task, task_id

from . import losses
from .checkpoint import Checkpoint
from .data import batch_at
from .mining import nearest
from .precision import Precision, autocast, half_precision
from .targets import Targets, compute_targets, made_up_queries

logger = logging.getLogger(__name__)

WARM_UP = 50
"""Steps in which the learning rates rise."""
WARM_BATCH = 256
"""Queries encoded at a time for the warm start."""
HELD_OUT = 500
RECALLED = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """How a small query encoder is aligned."""

    steps: int = 1500
    batch: int = 64
    lr: float = 2e-4
    """Of layers, pooling and maps; falls to zero over the run."""
    table_lr: float = 1e-3
    """Of token embeddings and of a static table: each row is seen rarely."""
    vector: float = 1.0
    """Weight of the squared distance of recall vectors: LEAF's loss (arXiv 2509.12539), which for unit vectors is the
    cosine's."""
    features: float = 1.0
    """Weight of the squared distance of query features, relative to their mean square."""
    score: float = 1.0
    """Weight of the KL divergence between the IEM scores that both encoders give a query's candidates."""
    embedding_kl: float = 0.0
    """Weight of KALE's own loss, the KL divergence of softmaxed recall vectors."""
    embedding_temperature: float = 0.1
    """Of that softmax: coordinates of unit vectors are small, and at 1 all softmaxes are flat."""
    warm_start: bool = True
    """Solve for the output maps in closed form (ridge regression) before the first step."""
    ridge: float = 1e-3
    """Its penalty, for each query."""
    passages: int = 16_384
    """Passages sampled from the corpus for the score term and for made-up queries."""
    near: int = 32
    """Of a query's 64 nearest passages in the sample, how many a step takes as candidates, drawn anew."""
    far: int = 32
    """And how many of all others."""
    texts: int = 20_000
    """Where there are fewer queries than this, more are made up from the corpus."""
    held_out: float = 0.05
    """Share of the queries, at most 500, that are not learned from: the encoder is measured on them."""
    task: Task = "asymmetric"
    """IEM branch of the score term."""
    save_every: int = 250
    """Steps between two checkpoints of the run."""
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.save_every) < 1:
            raise ValueError(f"steps, batch and save_every are at least 1, found {self.steps}, {self.batch}, "
                             f"{self.save_every}")  # fmt: skip
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a share between 0 and 1, not {self.held_out}")
        task_id(self.task)


@torch.no_grad()
def warm_start(encoder: QueryEncoder, queries: Sequence[str], targets: Targets, ridge: float) -> None:
    """Set the output maps by ridge regression: the best that they can do before anything else learns.

    Maps that come from the student are drawn towards what they were; those that start at random, towards zero. A static
    table has no maps: its rows are mapped instead.
    """
    ids, own = (
        encoder.encodings(queries),
        isinstance(encoder, TransformerQueryEncoder) and encoder.config.kind == "layers",
    )
    parts = []
    for start in range(0, len(ids), WARM_BATCH):
        batch = pad(ids[start : start + WARM_BATCH], _device(encoder))
        if isinstance(encoder, TransformerQueryEncoder):
            parts.append(encoder.pooled(*batch))
        else:
            parts.append(encoder.project(*batch)[0])
    inputs_ND = torch.cat(parts)
    width = encoder.config.feature_width
    wanted = targets.vectors_NE[: len(ids)], targets.features_NH[: len(ids), :width]
    if isinstance(encoder, TransformerQueryEncoder):
        for layer, target in zip((encoder.recall, encoder.query), wanted, strict=True):
            prior = layer.weight if own else torch.zeros_like(layer.weight)
            layer.weight.copy_(solve_ridge(inputs_ND, target, ridge, prior))
    elif isinstance(encoder, StaticQueryEncoder):
        vectors_VE = encoder.table.weight[:, : encoder.config.embedding_dim]
        recall, query = (solve_ridge(inputs_ND, target, ridge) for target in wanted)
        # The sum is divided by the length of its first part, which regression towards the mean has made too short.
        mapped_NE = inputs_ND @ recall.T
        table_VO = torch.cat([vectors_VE @ recall.T, vectors_VE @ query.T * mapped_NE.norm(dim=-1).mean()], dim=-1)
        encoder.table.weight.copy_(table_VO)


def solve_ridge(inputs_ND: Tensor, targets_NO: Tensor, ridge: float, prior_OD: Tensor | None = None) -> Tensor:
    """The map W [O, D] that minimises `sum |W x - y|^2 + ridge N s |W - prior|^2`, s the mean square of the inputs.

    Solved in float64 from the normal equations.
    """
    inputs_ND, targets_NO = inputs_ND.double(), targets_NO.to(inputs_ND.device).double()
    penalty = ridge * float(inputs_ND.pow(2).sum()) / inputs_ND.shape[1]
    gram_DD = inputs_ND.T @ inputs_ND
    gram_DD.diagonal().add_(penalty)
    right_DO = inputs_ND.T @ targets_NO
    if prior_OD is not None:
        right_DO += penalty * prior_OD.to(inputs_ND.device).double().T
    solved_DO: Tensor = torch.linalg.solve(gram_DD, right_DO)
    return solved_DO.T.float()


def align(
    student: Student,
    encoder: QueryEncoder,
    queries: Sequence[str],
    documents: Sequence[Document] = (),
    *,
    settings: Alignment | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> QueryEncoder:
    """Align `encoder` to `student` (LoRA merged) on the student's device; write it to the new folder `out`, if given.

    `queries` are texts without judgements. From `documents` a sample is encoded for the score term, and more queries
    are made up where there are few; without them the encoder learns vectors and features alone. Targets are kept in
    the folder `cache`. Until it is done the run lives in `OUT.run`; killed and called again, it goes on from the last
    checkpoint there. `provenance["held_out"]` tells how near it comes on queries that it was not shown.

    Raises:
        DataError: no query, an empty one, or `OUT.run` belongs to another run.
        MismatchError: the encoder was made from another student.
        ModelError: `out` exists.
    """
    settings = settings or Alignment()
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists already. Choose another folder or remove it first.")
    encoder.config.require_student(student, "the query encoder", "the student")
    run = _Run(student, encoder, queries, documents, settings, out, cache, progress=progress)
    before = run.measure()
    seconds = run.fit()
    after = run.measure()
    encoder.eval().cpu()
    encoder.provenance = {
        "alignment": asdict(settings),
        "queries": len(run.real),
        "made up": len(run.learned) - len(run.real),
        "passages": len(run.targets.passages_ME),
        "seconds": round(seconds, 1),
        "held_out": {"queries": len(run.held_out), "before": before, "after": after},
    }
    if out is not None:
        encoder.save(out)
        run.checkpoint.remove()
    return encoder


class _Run:
    """One alignment: texts, targets, and the state that a checkpoint keeps."""

    def __init__(
        self,
        student: Student,
        encoder: QueryEncoder,
        queries: Sequence[str],
        documents: Sequence[Document],
        settings: Alignment,
        out: Path | None,
        cache: Path | None,
        *,
        progress: bool,
    ) -> None:
        self.student, self.encoder, self.settings, self.progress = student, encoder, settings, progress
        rng = random.Random(settings.seed)
        texts = list(dict.fromkeys(text for text in queries if text.strip()))
        if len(texts) < 2:
            raise DataError(f"an alignment needs two or more different queries, found {len(texts)} in {len(queries)}")
        rng.shuffle(texts)
        held = min(HELD_OUT, max(1, round(settings.held_out * len(texts))))
        self.held_out, self.real = texts[:held], texts[held:]
        sample = rng.sample(list(documents), min(settings.passages, len(documents)))
        known = set(texts)
        made_up = made_up_queries(sample, max(0, settings.texts - len(self.real)), settings.seed)
        self.learned = [*self.real, *(text for text in made_up if text not in known)]
        about = {"student": encoder.config.student, "encoder": asdict(encoder.config), **asdict(settings)}
        about["texts"] = hashlib.sha256(json.dumps([self.held_out, self.learned]).encode()).hexdigest()
        self.checkpoint = Checkpoint(None if out is None else out.with_name(out.name + ".run"), about)
        self.device = student.device
        every = [*self.learned, *self.held_out]
        passages = [document.content for document in sample]
        student.requires_grad_(False)
        self.targets = compute_targets(student, every, passages, cache, precision=settings.precision, progress=progress)
        encoder.to(self.device)
        if settings.warm_start:
            warm_start(encoder, self.learned, self.targets, settings.ridge)
        self.ids, self.words = encoder.encodings(self.learned), encoder.word_encodings(self.learned)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.AdamW:
        tables = {id(m.weight) for m in self.encoder.modules() if isinstance(m, nn.Embedding)}
        rows = [p for p in self.encoder.parameters() if id(p) in tables]
        rest = [p for p in self.encoder.parameters() if id(p) not in tables]
        groups = [{"params": rows, "lr": self.settings.table_lr}, {"params": rest, "lr": self.settings.lr}]
        return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)

    def fit(self) -> float:
        """All steps that are still to be done; gives the seconds that the run took altogether."""
        settings, done, seconds = self.settings, 0, 0.0
        if (kept := self.checkpoint.load()) is not None:
            self.encoder.load_state_dict(kept["encoder"])
            self.optimizer.load_state_dict(kept["optimizer"])
            done, seconds = kept["step"], kept["seconds"]
            logger.info("going on from step %d of %d", done, settings.steps)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        began = time.monotonic() - seconds
        self.encoder.train()
        with tqdm(total=settings.steps, initial=done, desc="alignment", unit="step", disable=not self.progress) as bar:
            for step in range(done, settings.steps):
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * min(1.0, (step + 1) / WARM_UP) * max(0.02, 1 - step / settings.steps)
                found = self._losses(step)
                self.optimizer.zero_grad()
                torch.stack(list(found.values())).sum().backward()
                nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
                self.optimizer.step()
                bar.update()
                if (step + 1) % settings.save_every == 0:
                    bar.set_postfix({name: f"{value.item():.3f}" for name, value in found.items()})
                    self.checkpoint.save(
                        {
                            "encoder": self.encoder.state_dict(),
                            "optimizer": self.optimizer.state_dict(),
                            "step": step + 1,
                            "seconds": time.monotonic() - began,
                        }
                    )
        return time.monotonic() - began

    def _losses(self, step: int) -> dict[str, Tensor]:
        """Depends on nothing but the step, so that a resumed run goes on as it would have."""
        settings, width = self.settings, self.encoder.config.feature_width
        rows = batch_at(range(len(self.learned)), settings.batch, step, str(settings.seed))
        dtype = half_precision(settings.precision, self.device)
        # A table's gradient is a sum of few rows: bf16 would save nothing.
        transformer = isinstance(self.encoder, TransformerQueryEncoder)
        with autocast(self.device, dtype if transformer else None):
            found = self.encoder(*self._padded(self.ids, rows), *self._padded(self.words, rows))
        vectors_BE, features_BH = found.vectors_BE.float(), found.features_BH.float()
        wanted_BE, wanted_BH = (
            part[rows].to(self.device).float() for part in (self.targets.vectors_NE, self.targets.features_NH)
        )
        values = {}
        if settings.vector:
            values["vector"] = settings.vector * losses.vector_alignment(vectors_BE, wanted_BE)
        if settings.features:
            values["features"] = settings.features * losses.feature_alignment(
                features_BH[:, :width], wanted_BH[:, :width]
            )
        if settings.embedding_kl:
            values["embedding KL"] = settings.embedding_kl * losses.embedding_kl(
                vectors_BE, wanted_BE, temperature=settings.embedding_temperature
            )
        if settings.score and len(self.targets.passages_ME):
            candidates_BK = self._candidates(rows, step)
            passages_BKE = self.targets.passages_ME[candidates_BK].to(self.device)
            features_BKH = self.targets.passage_features_MH[candidates_BK].to(self.device).float()
            scores_BK = self._scores(vectors_BE, features_BH, passages_BKE, features_BKH)
            with torch.no_grad():
                wanted_BK = self._scores(wanted_BE, wanted_BH, passages_BKE, features_BKH)
            values["score"] = settings.score * losses.listwise_imitation(scores_BK, wanted_BK)
        return values

    def _padded(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return pad([ids[row] for row in rows], self.device)

    def _candidates(self, rows: Sequence[int], step: int) -> Tensor:
        """Indices [B, K] of passages: some of each query's nearest, and some of all."""
        draw = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        near_BK = self.targets.near_NK[rows]
        order = torch.randperm(near_BK.shape[1], generator=draw)[: self.settings.near]
        many = len(self.targets.passages_ME)
        far_BK = torch.randint(many, (len(rows), self.settings.far), generator=draw)
        return torch.cat([near_BK[:, order], far_BK], dim=1)

    def _scores(self, vectors_BE: Tensor, features_BH: Tensor, passages_BKE: Tensor, features_BKH: Tensor) -> Tensor:
        cosine_BK = torch.einsum("be,bke->bk", vectors_BE, passages_BKE)
        task_B = torch.full((len(vectors_BE),), task_id(self.settings.task), device=self.device)
        scores_BK: Tensor = self.student.iem(features_BH, features_BKH, cosine_BK, task_B)
        return scores_BK

    @torch.inference_mode()
    def measure(self) -> dict[str, float]:
        """On held-out queries: mean cosine with the student's vectors and, given passages, `overlap@10`, the share of
        the student's ten best passages of the sample that are among its own ten best."""
        targets, first = self.targets, len(self.learned)
        found = self.encoder.encode(self.held_out)
        wanted_QE, wanted_QH = targets.vectors_NE[first:], targets.features_NH[first:].float()
        measured = {"cosine": float((found.vectors_BE.cpu() * wanted_QE).sum(-1).mean())}
        if len(targets.passages_ME):
            rankings = [
                self._rank(vectors.to(self.device), features.to(self.device))
                for vectors, features in ((wanted_QE, wanted_QH), found)
            ]
            measured["overlap@10"] = overlap(rankings[1], rankings[0])
        return measured

    def _rank(self, vectors_QE: Tensor, features_QH: Tensor) -> list[list[str]]:
        """The ten best passages of each query: recall, then IEM."""
        passages_ME = self.targets.passages_ME
        near_QK = nearest(vectors_QE, passages_ME, RECALLED, self.device)
        ranking = []
        for vector_E, feature_H, near_K in zip(vectors_QE, features_QH, near_QK, strict=True):
            candidates = passages_ME[near_K][None].to(self.device), self.targets.passage_features_MH[near_K][None]
            scores_1K = self._scores(
                vector_E[None], feature_H[None], candidates[0], candidates[1].to(self.device).float()
            )
            best = scores_1K[0].argsort(descending=True, stable=True)[:10].cpu()
            ranking.append([str(int(near_K[place])) for place in best])
        return ranking


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


__all__ = ["Alignment", "align", "solve_ridge", "warm_start"]
