"""Pairs of texts with a similarity score or an entailment label, one JSON object a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2llm.errors import DataError
from d2llm.readers import read_jsonl


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts with one judgement: either a similarity `score`, or a `label` (True for entailment)."""

    text_a: str
    text_b: str
    score: float | None = None
    label: bool | None = None


LABELS = {
    "entailment": True,
    "neutral": False,
    "contradiction": False,
    "true": True,
    "false": False,
    "1": True,
    "0": False,
}
"""The labels of a file and their meaning. Case does not matter; `true`, `false`, 1 and 0 need no quotes."""


def read_pairs(path: Path) -> list[Pair]:
    """Read the pairs of a JSONL file with `text_a`, `text_b`, and either a `score` (a number) or a `label`.

    All pairs of a file have the same kind of judgement.

    Raises:
        DataError: the file is missing or has no pairs, a text is empty, a judgement is missing or unknown, or a line
            has another kind of judgement than the lines before it.
    """
    pairs: list[Pair] = []
    for where, row in read_jsonl(path):
        texts = [row.get("text_a"), row.get("text_b")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f'{where}: expected non-empty strings "text_a" and "text_b", found {texts!r}')
        if ("score" in row) == ("label" in row):
            raise DataError(f'{where}: expected either a "score" or a "label", found the fields {sorted(row)}')
        pair = Pair(row["text_a"], row["text_b"], *_parse_judgement(row, where))
        if pairs and (pair.score is None) != (pairs[0].score is None):
            kinds = ("score", "label") if pair.label is None else ("label", "score")
            raise DataError(
                f'{where}: this pair has a "{kinds[0]}", the pairs before it have a "{kinds[1]}": use one of the two'
            )
        pairs.append(pair)
    if not pairs:
        raise DataError(f'{path}: no pairs. Expected lines such as {{"text_a": "...", "text_b": "...", "score": 1.0}}')
    return pairs


def _parse_judgement(row: Mapping[str, Any], where: str) -> tuple[float | None, bool | None]:
    if "score" in row:
        score = row["score"]
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise DataError(f'{where}: expected "score" to be a number, found {score!r}')
        return float(score), None
    label = str(row["label"]).lower()
    if label not in LABELS:
        raise DataError(f"{where}: unknown label {row['label']!r}: choose one of {', '.join(LABELS)}")
    return None, LABELS[label]
