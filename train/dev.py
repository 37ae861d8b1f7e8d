"""Measuring student and teacher on dev, on the same queries and candidates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2llm.beir import RetrievalData
from d2llm.evaluate import MAIN_MEASURE
from d2llm.metrics import Run, classification, correlations, evaluate, itself, per_query
from d2llm.pairs import Pair
from d2llm.student import Encoded, Student
from d2llm.types import Task, task_id

from .data import TrainingData
from .teacher import Teacher
from .token_states import TokenStates

RERANKED = 100
"""The number of candidates that student and teacher rerank for each dev query."""


@dataclass(frozen=True, slots=True)
class Dev:
    """A student on dev: nDCG@10 of each query by cosine and by IEM, and a figure for judged pairs if there are any.

    That figure is Spearman for scored pairs, and average precision for labelled pairs.
    """

    by_cosine: list[float]
    by_iem: list[float]
    pairs_by_cosine: float | None
    pairs_by_iem: float | None
    correction_can_be_dropped: bool
    """Whether the IEM is the cosine plus a correction that can be dropped."""
    candidates: dict[str, list[str]] = field(default_factory=dict, repr=False)
    """The ids that were reranked, best cosine first, for each query id."""

    @property
    def cosine(self) -> float:
        """Mean nDCG@10 by cosine."""
        return statistics.fmean(self.by_cosine)

    @property
    def iem(self) -> float:
        """Mean nDCG@10 by IEM."""
        return statistics.fmean(self.by_iem)

    @property
    def correction_helps(self) -> bool:
        """Whether the IEM's gain over the cosine is more than one standard error of the paired differences."""
        if not self.correction_can_be_dropped:
            return True
        gains = [iem - cosine for iem, cosine in zip(self.by_iem, self.by_cosine, strict=True)]
        return statistics.fmean(gains) > statistics.pstdev(gains) / math.sqrt(len(gains))

    @property
    def search_score(self) -> float:
        """What searches will reach: nDCG@10 by IEM if its correction helps, else by cosine.

        With judged pairs it is the mean of nDCG@10 and of the pairs' figure by IEM.
        """
        parts = [] if self.pairs_by_iem is None else [self.pairs_by_iem]
        if self.by_iem:
            parts.append(self.iem if self.correction_helps else self.cosine)
        return statistics.fmean(parts)

    def table(self, prefix: str) -> dict[str, float]:
        """The figures that exist, of queries and pairs, by cosine and by IEM, with names that start with `prefix`."""
        table = {f"{prefix} by cosine": self.cosine, f"{prefix} by IEM": self.iem} if self.by_iem else {}
        if self.pairs_by_cosine is not None and self.pairs_by_iem is not None:
            table |= {
                f"{prefix} by cosine, pairs": self.pairs_by_cosine,
                f"{prefix} by IEM, pairs": self.pairs_by_iem,
            }
        return table


@torch.inference_mode()
def measure_student(student: Student, states: TokenStates, data: TrainingData) -> Dev:
    """Measure the student on the dev queries and the dev pairs that there are."""
    was_training = student.training
    student.eval()
    by_cosine, by_iem, candidates = list[float](), list[float](), dict[str, list[str]]()
    if data.retrieval is not None:
        dev = data.retrieval.dev
        passages = states.encode_all([document.content for document in dev.documents.values()], "document")
        queries = states.encode_all(list(dev.queries.values()), "query")
        by_cosine, by_iem, candidates = measure_retrieval(student.iem, dev, queries, passages)
    pairs: tuple[float | None, float | None] = None, None
    if data.dev_pairs:
        pairs = measure_pairs(student.iem, data.dev_pairs, *encode_pairs(states, data.dev_pairs))
    student.train(was_training)
    optional = student.config.start == "mean" and not data.pairs
    return Dev(by_cosine, by_iem, *pairs, optional and bool(by_iem), candidates)


def measure_retrieval(
    iem: torch.nn.Module, data: RetrievalData, queries: Encoded, passages: Encoded
) -> tuple[list[float], list[float], dict[str, list[str]]]:
    """nDCG@10 of each query by cosine and by IEM, both over the `RERANKED` best by cosine; and these candidates.

    The document that is the query itself is no candidate (see `metrics.itself`).
    """
    ids = list(data.documents)
    task_1 = torch.tensor([task_id("asymmetric")], device=queries.vectors_BE.device)
    cosine_run, iem_run = {}, {}
    for row, query_id in enumerate(data.queries):
        cosine_N = passages.vectors_BE @ queries.vectors_BE[row]
        own = itself(query_id, data.qrels)
        best = [i for i in cosine_N.topk(min(RERANKED + 1, len(ids))).indices.tolist() if ids[i] != own][:RERANKED]
        scores_K, found = cosine_N[best], [ids[i] for i in best]
        features = queries.query_features_BH[row : row + 1], passages.passage_features_BH[best].unsqueeze(0)
        iem_K = iem(*features, scores_K.unsqueeze(0), task_1)[0]
        cosine_run[query_id] = dict(zip(found, scores_K.tolist(), strict=True))
        iem_run[query_id] = dict(zip(found, iem_K.tolist(), strict=True))
    cosine, by_iem = (per_query(run, data.qrels, MAIN_MEASURE) for run in (cosine_run, iem_run))
    candidates = {query_id: list(run) for query_id, run in cosine_run.items()}
    return [cosine[q] for q in data.queries], [by_iem[q] for q in data.queries], candidates


def measure_pairs(iem: torch.nn.Module, pairs: Sequence[Pair], first: Encoded, second: Encoded) -> tuple[float, float]:
    """Agreement with the judgements, of the cosine and of the IEM's symmetric branch.

    It is the Spearman correlation with scores, and the average precision with labels.
    """
    gold_N = gold_scores(pairs).numpy()

    def agreement(values_N: Tensor) -> float:
        if pairs[0].label is None:
            return correlations(values_N.cpu().numpy(), gold_N)["Spearman"]
        return classification(values_N.cpu().numpy(), gold_N, threshold=0.0)["AP"]  # AP does not depend on it

    scores_N, cosine_N = score_pairs(iem, first, second)
    return agreement(cosine_N), agreement(scores_N)


def score_pairs(iem: torch.nn.Module, first: Encoded, second: Encoded) -> tuple[Tensor, Tensor]:
    """IEM scores [N] on the symmetric branch and cosines [N] of N pairs of texts."""
    inputs = symmetric_inputs(first, second)
    return iem(*inputs).squeeze(1), inputs[2].squeeze(1)


def symmetric_inputs(first: Encoded, second: Encoded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the IEM reads of N pairs of texts: features [N, H] and [N, 1, H], cosines [N, 1], and the task [N]."""
    cosine_N = (first.vectors_BE * second.vectors_BE).sum(-1)
    task_N = torch.full((len(cosine_N),), task_id("symmetric"), device=cosine_N.device)
    return first.query_features_BH, second.passage_features_BH.unsqueeze(1), cosine_N.unsqueeze(1), task_N


def encode_pairs(states: TokenStates, pairs: Sequence[Pair]) -> tuple[Encoded, Encoded]:
    """The first texts of the pairs as queries, and the second ones as passages."""
    first = states.encode_all([pair.text_a for pair in pairs], "query")
    return first, states.encode_all([pair.text_b for pair in pairs], "document")


def gold_scores(pairs: Sequence[Pair]) -> Tensor:
    """The judgements of N pairs, float32 [N]: their scores, or their labels as 1 and 0."""
    return torch.tensor([float(p.label) if p.score is None else p.score for p in pairs])  # type: ignore[arg-type]  # a pair has a label if it has no score


def measure_teacher(
    teacher: Teacher, data: RetrievalData, candidates: Mapping[str, Sequence[str]], task: Task = "asymmetric"
) -> tuple[float, Run]:
    """nDCG@10 of the teacher, reranking these candidates; and its log-odds, `{query id: {document id: log-odds}}`."""
    run = {}
    for query_id, ids in candidates.items():
        texts = [data.documents[id_].content for id_ in ids]
        log_odds_K = teacher.judge(data.queries[query_id], texts, task).log_odds_K
        run[query_id] = dict(zip(ids, log_odds_K.tolist(), strict=True))
    return evaluate(run, data.qrels)[MAIN_MEASURE], run
