"""How good a ranking is: the measures of trec_eval through ir-measures, and how much of the exact ranking is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from d2llm.errors import import_extra

Run: TypeAlias = Mapping[str, Mapping[str, float]]
"""`{query id: {document id: score}}`."""
Qrels: TypeAlias = Mapping[str, Mapping[str, int]]

MEASURES = {"MRR@10": "RR@10", "nDCG@10": "nDCG@10", "Recall@100": "R@100"}
"""Our names (BEIR's) and those of ir-measures."""


def evaluate(run: Run, qrels: Qrels) -> dict[str, float]:
    """Mean MRR@10, nDCG@10 and Recall@100 over the queries of `qrels`; a query missing from `run` counts as 0."""
    ir_measures = import_extra("ir_measures", "eval")
    measures = {name: ir_measures.parse_measure(text) for name, text in MEASURES.items()}
    found = ir_measures.calc_aggregate(list(measures.values()), qrels, {q: dict(docs) for q, docs in run.items()})
    return {name: float(found[measure]) for name, measure in measures.items()}


def per_query(run: Run, qrels: Qrels, measure: str) -> dict[str, float]:
    """One of `MEASURES` for each query of `qrels`; a query missing from `run` has 0."""
    ir_measures = import_extra("ir_measures", "eval")
    parsed = ir_measures.parse_measure(MEASURES[measure])
    found = ir_measures.iter_calc([parsed], qrels, {q: dict(docs) for q, docs in run.items()})
    return dict.fromkeys(qrels, 0.0) | {value.query_id: float(value.value) for value in found}


def overlap(found: Sequence[Sequence[str]], exact: Sequence[Sequence[str]], k: int = 10) -> float:
    """Mean share of the first `k` ids of the exact rankings that the found rankings have among their first `k`."""
    shares = [len(set(a[:k]) & set(b[:k])) / len(b[:k]) for a, b in zip(found, exact, strict=True) if b]
    return sum(shares) / len(shares)
