"""Teachers: models that score a query's candidates, for the student to learn from. `Stack` combines them.

A teacher gives log-odds that a passage answers the query. A small cross-encoder alone needs more steps than a laptop
can afford before it passes a fine-tuned bi-encoder. Late interaction over the student's token states and BM25 add at
once what pooling loses.

K candidates of a query, B batch, L tokens, D backbone width, E recall width, T width of a teacher's features, M members
of a stack, N passages of the corpus.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.backbone import pad
from d2llm.bm25 import Bm25
from d2llm.saved import sampled_digest
from d2llm.student import Student
from d2llm.types import Task

from .examples import Example
from .precision import autocast
from .ranking import CandidateList, Drawn, RankingStage, learn
from .run_log import RunLog
from .schedule import Batches
from .token_states import Side, TokenStates

logger = logging.getLogger(__name__)

CROSS_ENCODER_LR = 5e-5


class Judgement(NamedTuple):
    """The teacher's output for K candidates of one query."""

    log_odds_K: Tensor
    """Float32, on the CPU. For teachers that give no probabilities, only order and spacing mean something."""
    features_KT: Tensor | None = None
    """Features of the query with each candidate, such as an LLM's last hidden state. None if there are none."""


class Teacher(Protocol):
    """Anything that scores the candidates of a query."""

    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """Judge whether each candidate answers `query` (asymmetric task) or means the same (symmetric task)."""


class Cosine:
    """The student's own cosine. Its pooling and recall head are copied when the teacher is made."""

    def __init__(self, student: Student, states: TokenStates) -> None:
        self.states, self.pma = states, copy.deepcopy(student.pma).eval()
        self.recall_head = copy.deepcopy(student.recall_head)

    @torch.inference_mode()
    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """Cosines."""
        query_1E = self._vectors([query], "query")
        return Judgement((self._vectors(candidates, "document") @ query_1E[0]).cpu())

    def _vectors(self, texts: Sequence[str], side: Side) -> Tensor:
        tokens_BLD, mask_BL, _ = self.states.batch(texts, side)
        return F.normalize(self.recall_head(self.pma(tokens_BLD, mask_BL)), dim=-1)


class BiEncoderTeacher:
    """The cosine of another bi-encoder. Each text is encoded once and its vector kept, 4 E bytes."""

    def __init__(self, student: Student, dtype: torch.dtype | None) -> None:
        self.student, self.dtype = student.eval(), dtype
        self._vectors: dict[tuple[Side, str], Tensor] = {}

    @property
    def identity(self) -> str:
        """A name made from the weights."""
        return sampled_digest(self.student.named_parameters())

    @torch.inference_mode()
    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """Cosines."""
        self._encode([query], "query")
        self._encode(candidates, "document")
        vectors_KE = torch.stack([self._vectors["document", text] for text in candidates])
        return Judgement(vectors_KE @ self._vectors["query", query])

    def _encode(self, texts: Sequence[str], side: Side) -> None:
        missing = sorted({text for text in texts if (side, text) not in self._vectors}, key=len)
        for chunk in _slices(missing, 64):
            batch = pad(self.student.encodings(chunk, side), self.student.device)
            with autocast(self.student.device, self.dtype):
                vectors_BE = self.student(*batch).vectors_BE.float().cpu()
            self._vectors.update(zip([(side, text) for text in chunk], vectors_BE, strict=True))


class LateInteraction:
    """MaxSim over the student's token states: each query token's best cosine with a passage token, averaged."""

    def __init__(self, states: TokenStates) -> None:
        self.states = states

    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """Mean maximal cosines, in [-1, 1]."""
        query_LD = F.normalize(self.states.of(query, "query"), dim=-1)
        tokens_KLD, mask_KL, _ = self.states.batch(candidates, "document")
        cosine_KQL = torch.einsum("qd,kld->kql", query_LD, F.normalize(tokens_KLD, dim=-1))
        return Judgement(cosine_KQL.masked_fill(mask_KL.unsqueeze(1) == 0, -1.0).amax(-1).mean(-1).cpu())


class Bm25Teacher:
    """BM25 over the corpus, which sees the exact words that an embedding blurs."""

    def __init__(self, bm25: Bm25, corpus: Sequence[str]) -> None:
        self.bm25, self._place = bm25, {text: index for index, text in enumerate(corpus)}

    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """BM25 scores. Every candidate must be a passage of the corpus."""
        scores_N = self.bm25.scores(query)
        return Judgement(torch.tensor([float(scores_N[self._place[text]]) for text in candidates]))


class BackboneCrossEncoder(nn.Module):
    """A copy of the student's backbone that reads query and passage together. `fit` fine-tunes it.

    The score is late interaction between the two texts, plus a linear layer on the mean state that starts at zero. A
    score of the linear layer alone would need thousands of steps before it ranks at all.
    """

    def __init__(self, student: Student, max_length: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(student.backbone)
        if student.config.tuning == "lora":
            self.backbone = self.backbone.merge_and_unload()
        self.backbone.requires_grad_(True)
        self.tokenizer, self.max_length, self.dtype = student.tokenizer, max_length, dtype
        self.head = nn.Linear(student.dim, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(student.device)

    def forward(self, queries: Sequence[str], passages: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-odds [B] and features [B, D] of B queries, each with one passage. The longer text is cut."""
        self.tokenizer.enable_truncation(self.max_length, strategy="longest_first")
        encodings = self.tokenizer.encode_batch(list(zip(queries, passages, strict=True)))
        ids_BL, mask_BL = pad([encoding.ids for encoding in encodings], self.head.weight.device)
        second_BL, _ = pad([[int(s == 1) for s in encoding.sequence_ids] for encoding in encodings], ids_BL.device)
        first_BL, _ = pad([[int(s == 0) for s in encoding.sequence_ids] for encoding in encodings], ids_BL.device)
        with autocast(self.head.weight.device, self.dtype):
            tokens_BLD = self.backbone(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        tokens_BLD = tokens_BLD.float()
        unit_BLD = F.normalize(tokens_BLD, dim=-1)
        cosine_BLL = (unit_BLD @ unit_BLD.transpose(1, 2)).masked_fill(second_BL.unsqueeze(1) == 0, -1.0)
        interaction_B = (cosine_BLL.amax(-1) * first_BL).sum(-1) / first_BL.sum(-1).clamp(min=1)
        pooled_BD = (tokens_BLD * mask_BL.unsqueeze(-1)).sum(1) / mask_BL.sum(-1, keepdim=True)
        return 20 * interaction_B + self.head(pooled_BD).squeeze(-1), pooled_BD

    def fit(
        self, examples: Sequence[Example], *, steps: int, batch: int, negatives: int, seed: int, progress: bool = False
    ) -> None:
        """Fine-tune on labels by listwise cross-entropy: one positive against `negatives` hard negatives."""
        lists = [CandidateList.labelled(example) for example in examples]
        stage = RankingStage(
            lists, self._passes, steps, batch, negatives, "listwise", Batches(seed), RunLog(None), "cross-encoder"
        )
        learn(self, stage, CROSS_ENCODER_LR, seed=seed, progress=progress)

    def _passes(self, lists: Sequence[Drawn]) -> Iterator[tuple[list[int], Sequence[Tensor]]]:
        """All lists in one pass."""
        log_odds_B, _ = self([x.query for x in lists for _ in x.texts], [text for x in lists for text in x.texts])
        yield list(range(len(lists))), log_odds_B.split([len(x.texts) for x in lists])

    @torch.inference_mode()
    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """Log-odds, and the mean states [K, D] as features."""
        parts = [self([query] * len(part), part) for part in _slices(candidates, 32)]
        return Judgement(*(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)))


class Stack:
    """Several teachers as one. Their scores are standardised within a query and weighted by logistic regression."""

    def __init__(self, members: dict[str, Teacher]) -> None:
        self.members = members
        self.weights = torch.zeros(len(members))
        self.bias = torch.zeros(())

    def fit(self, examples: Sequence[Example]) -> None:
        """Fit weights and bias on labelled candidates. No member may have been trained on these queries."""
        features, labels = [], []
        for example in examples:
            candidates = [*example.positives, *example.negatives]
            features.append(self._features(example.query, candidates, example.task))
            labels.append(torch.tensor([1.0] * len(example.positives) + [0.0] * len(example.negatives)))
        x_NM, y_N = torch.cat(features), torch.cat(labels)
        weights = self.weights.clone().requires_grad_()
        bias = self.bias.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(x_NM @ weights + bias, y_N) + 1e-4 * weights.pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.weights, self.bias = weights.detach(), bias.detach()
        logger.info("teacher weights: %s", dict(zip(self.members, self.weights.tolist(), strict=True)))

    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """Log-odds. They are calibrated for candidates that are drawn like those of `fit`."""
        return Judgement(self._features(query, candidates, task) @ self.weights + self.bias)

    def _features(self, query: str, candidates: Sequence[str], task: Task) -> Tensor:
        columns = [member.judge(query, candidates, task).log_odds_K for member in self.members.values()]
        return torch.stack([standardise(column) for column in columns], dim=-1)


def standardise(scores_K: Tensor) -> Tensor:
    """Scores with zero mean and unit variance over a query's candidates; zeros if all are equal."""
    centred_K = scores_K - scores_K.mean()
    spread = centred_K.pow(2).mean().sqrt()
    return centred_K / spread if spread > 1e-9 else torch.zeros_like(centred_K)


def _slices(items: Sequence[str], size: int) -> list[list[str]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
