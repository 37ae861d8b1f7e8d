"""Alignment of a small query encoder to a student (KALE, arXiv 2304.01016), from queries without judgements.

The student's vectors and features of each query are computed once and kept. The small encoder learns both, and the
scores that follow from them against a sample of passages that the student encoded.

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
from typing import Annotated

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from d2llm.backbone import pad
from d2llm.errors import DataError
from d2llm.files import require_new
from d2llm.metrics import overlap
from d2llm.pseudo_queries import made_up_queries
from d2llm.settings import Count, Positive, Range, Seed, Weight, Whole, check_fields
from d2llm.small_encoder import SmallEncoder, SmallTransformer, StaticTable
from d2llm.student import Student
from d2llm.types import Document, StrPath, Task, task_id

from . import losses
from .checkpoint import Checkpoint
from .mining import nearest
from .precision import ComputeDtype, autocast, compute_dtype
from .schedule import batch_at
from .targets import NEAREST, Targets, compute_targets

logger = logging.getLogger(__name__)

WARM_UP = 50
"""Steps over which the learning rates rise."""
DEALT = 8
"""Batches that are drawn, sorted by length and dealt out together."""
TABLE = 4096
"""Embeddings with at least this many rows have sparse gradients."""
WARM_BATCH = 256
"""Queries encoded at a time for the warm start."""
HELD_OUT = 500
"""At most this many queries are held out to measure on."""
RECALLED = 100
"""Passages that are rescored for each of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """The settings of an alignment.

    Raises:
        ArgumentError: a value is out of range.

    Example:
        >>> Alignment(steps=2000, score=0.0).steps
        2000
    """

    steps: Count = 4000
    """Training steps."""
    batch: Count = 64
    """Queries in one step."""
    lr: Positive = 4e-4
    """Peak learning rate for layers, pooling and maps. All rates fall to zero over the run."""
    embedding_lr: Positive = 1e-3
    """Peak learning rate for a transformer's token embeddings, few of which move in one step."""
    table_lr: Positive = 3e-3
    """Peak learning rate for the rows of a static table."""
    vector: Weight = 1.0
    """Weight of the squared distance of recall vectors: LEAF's loss (arXiv 2509.12539), for unit vectors the same as
    the cosine's."""
    features: Weight = 1.0
    """Weight of the squared distance of query features, relative to their mean square."""
    score: Weight = 1.0
    """Weight of the KL divergence between the IEM scores that both encoders give a query's candidates."""
    embedding_kl: Weight = 0.0
    """Weight of KALE's own loss, the KL divergence of softmaxed recall vectors."""
    embedding_temperature: Positive = 0.1
    """Temperature of this softmax. Coordinates of unit vectors are small: at 1, all softmaxes are flat."""
    warm_start: bool = True
    """Before the first step, solve in closed form (ridge regression) for maps that start at random and for the rows of
    a static table. Maps that come from the student stay: solved anew they measured worse (docs/results.md)."""
    ridge: Positive = 1e-3
    """Penalty of this regression, for each query."""
    passages: Whole = 16_384
    """Number of passages sampled from the corpus for the score term and for made-up queries."""
    near: Annotated[int, Range(1, NEAREST)] = 32
    """Candidates that a step draws for each query from its 64 nearest passages in the sample."""
    far: Whole = 32
    """Candidates that a step draws for each query from the whole sample."""
    texts: Whole = 20_000
    """If there are fewer queries than this, more are made up from the corpus."""
    held_out: Annotated[float, Range(0, 1, exclusive=True)] = 0.05
    """Share of the queries, at most 500, to measure the encoder on. It does not learn from them."""
    task: Task = "asymmetric"
    """IEM branch of the score term."""
    save_every: Count = 500
    """Steps between two checkpoints of the run. A killed run goes on from the last one."""
    precision: ComputeDtype = "auto"
    """`auto`: bf16 on a GPU or a CPU with instructions for it (AMX, AVX-512 BF16), else fp32."""
    seed: Seed = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check_fields(self)


@torch.no_grad()
def warm_start(encoder: SmallEncoder, queries: Sequence[str], targets: Targets, ridge: float) -> None:
    """Set the output maps by ridge regression: the best maps for the rest of the encoder as it is.

    A static table has no maps, so its rows are mapped.
    """
    encoder.eval()  # dropout would add noise to the inputs
    ids = encoder.encodings(queries)
    parts = []
    for start in range(0, len(ids), WARM_BATCH):
        batch = pad(ids[start : start + WARM_BATCH], _device(encoder))
        if isinstance(encoder, SmallTransformer):
            parts.append(encoder.states(*batch)[1])
        else:
            parts.append(encoder.project(*batch)[0])
    inputs_ND = torch.cat(parts)  # of length 1, like the vectors
    layout = encoder.config.query_layout
    wanted = layout.split(targets.features_NH[: len(ids)].float())
    vectors_NE, features_NF = targets.vectors_NE[: len(ids)], wanted.projection
    if isinstance(encoder, SmallTransformer):
        recall_ED = solve_ridge(inputs_ND, vectors_NE, ridge)
        encoder.recall.weight.copy_(recall_ED / _length(inputs_ND @ recall_ED.T))
        if encoder.query is not None:
            encoder.query.weight.copy_(solve_ridge(inputs_ND * inputs_ND.shape[1] ** 0.5, features_NF, ridge))
        if encoder.token_vectors is not None:  # token states have no targets of their own: their mean has one
            encoder.token_vectors.project.weight.copy_(solve_ridge(inputs_ND, wanted.vectors.mean(1), ridge))
    elif isinstance(encoder, StaticTable):
        recall_EE, query_FE = solve_ridge(inputs_ND, vectors_NE, ridge), solve_ridge(inputs_ND, features_NF, ridge)
        vectors_VE = encoder.table.weight[:, : encoder.config.embedding_dim]
        tokens_Vd = encoder.table.weight[:, encoder.table.weight.shape[1] - layout.dim :]
        # The encoder divides a sum by the length of its first part, which regression has made too short.
        length = _length(inputs_ND @ recall_EE.T)
        rows = [vectors_VE @ recall_EE.T, vectors_VE @ query_FE.T * length, tokens_Vd]
        encoder.table.weight.copy_(torch.cat(rows, dim=-1))


def _length(rows_NE: Tensor) -> float:
    """The mean length of rows."""
    return float(rows_NE.norm(dim=-1).mean())


def solve_ridge(inputs_ND: Tensor, targets_NO: Tensor, ridge: float) -> Tensor:
    """The map W [O, D] that minimises `sum |W x - y|^2 + ridge N s |W|^2`, s the mean square of the inputs.

    Solved in float64 from the normal equations.
    """
    inputs_ND, targets_NO = inputs_ND.double(), targets_NO.to(inputs_ND.device).double()
    penalty = ridge * float(inputs_ND.pow(2).sum()) / inputs_ND.shape[1]
    gram_DD = inputs_ND.T @ inputs_ND
    gram_DD.diagonal().add_(penalty)
    solved_DO: Tensor = torch.linalg.solve(gram_DD, inputs_ND.T @ targets_NO)
    return solved_DO.T.float()


def align(
    student: Student,
    encoder: SmallEncoder,
    queries: Sequence[str],
    documents: Sequence[Document] = (),
    *,
    settings: Alignment | None = None,
    out: StrPath | None = None,
    cache: StrPath | None = None,
    progress: bool = False,
) -> SmallEncoder:
    """Align `encoder` to `student` (LoRA merged) on the student's device, and write it into the new folder `out`.

    `queries` are texts without judgements. A sample of `documents` serves the score term, and more queries are made up
    from it if there are few. Without documents the encoder learns vectors and features alone. The folder `cache` keeps
    the targets for the next alignment.

    The run lives in `OUT.run` until it is done. After a kill, the same call continues from the last checkpoint.
    `provenance["held_out"]` holds the agreement with the student on held-out queries.

    Raises:
        DataError: fewer than two queries, no loss with a weight, or `OUT.run` belongs to another run.
        MismatchError: the encoder was made from another student.
        OutputExistsError: `out` exists and is not an empty folder.
        DivergedError: a loss is not finite.
    """
    settings = settings or Alignment()
    out, cache = (None if path is None else Path(path) for path in (out, cache))
    if out is not None:
        require_new(out)
    encoder.config.require_student(student, "the query encoder", "the student")
    if not (settings.vector or settings.features or settings.embedding_kl or (settings.score and documents)):
        raise DataError("nothing to align: vector, features and embedding_kl are 0, and score needs documents too")
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
    """An alignment: its texts, targets and optimizers."""

    def __init__(
        self,
        student: Student,
        encoder: SmallEncoder,
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
            raise DataError(f"an alignment needs two or more different queries, found {len(texts)}")
        rng.shuffle(texts)
        held = min(HELD_OUT, max(1, round(settings.held_out * len(texts))))
        self.held_out, self.real = texts[:held], texts[held:]
        sample = rng.sample(list(documents), min(settings.passages, len(documents)))
        known = set(texts)
        made_up = made_up_queries(sample, max(0, settings.texts - len(self.real)), settings.seed)
        self.learned = [*self.real, *(text for text in made_up if text not in known)]
        about = {"student": encoder.config.student, "encoder": asdict(encoder.config), **asdict(settings)}
        passages = [document.content for document in sample]
        about["texts"] = hashlib.sha256(json.dumps([self.held_out, self.learned, passages]).encode()).hexdigest()
        self.checkpoint = Checkpoint(None if out is None else out.with_name(out.name + ".run"), about)
        self.device = student.device
        every = [*self.learned, *self.held_out]
        student.requires_grad_(False)
        self.targets = compute_targets(student, every, passages, cache, precision=settings.precision, progress=progress)
        encoder.to(self.device)
        if settings.warm_start and encoder.config.kind != "layers":
            warm_start(encoder, self.learned, self.targets, settings.ridge)
        self.ids, self.words = encoder.encodings(self.learned), encoder.student_encodings(self.learned)
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """One for tables, of which a step moves a few hundred rows, and one for the rest."""
        tables = [m for m in self.encoder.modules() if isinstance(m, nn.Embedding) and m.num_embeddings >= TABLE]
        for table in tables:
            table.sparse = True
        rows = [table.weight for table in tables]
        rest = [p for p in self.encoder.parameters() if all(p is not row for row in rows)]
        static = isinstance(self.encoder, StaticTable)
        found: list[torch.optim.Optimizer] = []
        if rest:
            found.append(torch.optim.AdamW(rest, lr=self.settings.lr, weight_decay=0.0))
        if rows:
            lr = self.settings.table_lr if static else self.settings.embedding_lr
            found.append(torch.optim.SparseAdam(rows, lr=lr))
        return found

    def fit(self) -> float:
        """Do the steps that are left. Gives the seconds of the whole run."""
        self.checkpoint.hold()
        settings, done, seconds = self.settings, 0, 0.0
        if (kept := self.checkpoint.load()) is not None:
            self.encoder.load_state_dict(kept["encoder"])
            for optimizer, state in zip(self.optimizers, kept["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            done, seconds = kept["step"], kept["seconds"]
            logger.info("going on from step %d of %d", done, settings.steps)
        began = time.monotonic() - seconds
        self.encoder.eval()  # no dropout: the targets have no noise
        with tqdm(total=settings.steps, initial=done, desc="alignment", unit="step", disable=not self.progress) as bar:
            for step in range(done, settings.steps):
                share = min(1.0, (step + 1) / WARM_UP) * max(0.02, 1 - step / settings.steps)
                for optimizer in self.optimizers:
                    optimizer.param_groups[0]["lr"] = share * optimizer.defaults["lr"]
                found = self._losses(step)
                self.encoder.zero_grad()
                torch.stack(list(found.values())).sum().backward()
                for optimizer in self.optimizers:
                    if isinstance(optimizer, torch.optim.AdamW):  # gradients of tables are sparse and not clipped
                        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
                    optimizer.step()
                bar.update()
                if step + 1 == settings.steps or (step + 1) % settings.save_every == 0:
                    losses.total(found, step)  # raises before NaNs are saved
                    bar.set_postfix({name: f"{value.item():.3f}" for name, value in found.items()})
                    self.checkpoint.save(
                        {
                            "encoder": self.encoder.state_dict(),
                            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                            "step": step + 1,
                            "seconds": time.monotonic() - began,
                        }
                    )
        return time.monotonic() - began

    def _losses(self, step: int) -> dict[str, Tensor]:
        """The loss terms of a step. The step decides the batch, so a resumed run repeats it."""
        settings, config = self.settings, self.encoder.config
        # Another tokenizer has its tokens at other places: their vectors have no target, only scores.
        width = config.query_layout.projection if config.own_tokenizer else config.query_layout.learned
        rows = self._batch(step)
        dtype = compute_dtype(settings.precision, self.device)
        # bf16 saves nothing for a table: its output is a sum of few rows.
        transformer = isinstance(self.encoder, SmallTransformer)
        with autocast(self.device, dtype if transformer else None):
            found = self.encoder(*self._padded(self.ids, rows), *self._padded(self.words, rows))
        vectors_BE, features_BH = found.vectors_BE.float(), found.features_BH.float()
        wanted_BE, wanted_BH = (
            part[rows].to(self.device).float() for part in (self.targets.vectors_NE, self.targets.features_NH)
        )
        values = {}
        if settings.vector:
            values["vector"] = settings.vector * losses.vector_alignment(vectors_BE, wanted_BE)
        if settings.features and width:
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

    def _batch(self, step: int) -> list[int]:
        """Indices of queries of similar length, so that little is padding.

        Some batches are drawn together, sorted by length, and dealt out.
        """
        size, seed = min(self.settings.batch, len(self.learned)), self.settings.seed
        dealt = min(DEALT, len(self.learned) // size)
        together, turn = divmod(step, dealt)
        drawn = batch_at(range(len(self.learned)), size * dealt, together, str(seed))
        drawn.sort(key=lambda row: len(self.ids[row]))
        place = size * batch_at(range(dealt), dealt, together, f"{seed}/deal")[turn]
        return drawn[place : place + size]

    def _padded(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return pad([ids[row] for row in rows], self.device)

    def _candidates(self, rows: Sequence[int], step: int) -> Tensor:
        """Indices [B, K] of passages: some of each query's nearest, and some of the whole sample."""
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
        """Agreement with the student on held-out queries: the mean cosine of the vectors, and `overlap@10`.

        `overlap@10` is the share of the student's ten best passages of the sample that are among the encoder's.
        """
        targets, first = self.targets, len(self.learned)
        found = self.encoder.encode(self.held_out)
        wanted_QE, wanted_QH = targets.vectors_NE[first:], targets.features_NH[first:].float()
        measured = {"cosine": float((found.vectors_BE * wanted_QE).sum(-1).mean())}
        if len(targets.passages_ME):
            rankings = [
                self._rank(vectors.to(self.device), features.to(self.device))
                for vectors, features in ((wanted_QE, wanted_QH), found)
            ]
            measured["overlap@10"] = overlap(rankings[1], rankings[0])
        return measured

    def _rank(self, vectors_QE: Tensor, features_QH: Tensor) -> list[list[str]]:
        """The ten best passages of each query by recall and IEM, as indices in text form."""
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
