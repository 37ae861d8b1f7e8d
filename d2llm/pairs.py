"""Pairs of texts with a similarity score or an entailment label, one JSON object a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2llm.errors import DataError
from d2llm.rows import read_jsonl


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts and the judgement of the pair, one of two: a similarity `score`, or a `label`: entailment or not."""

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
"""What a label may be, in any case: `true`, `false`, 1 and 0 also without quotes."""


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a JSONL file: `text_a`, `text_b`, and on every line a `score` (a number) or on every line a `label`.

    Raises:
        DataError: no such file, no pairs, an empty text, a judgement that is none or an unknown word, or of the other
            kind than the lines before.
    """
    pairs: list[Pair] = []
    for where, row in read_jsonl(path):
        texts = [row.get("text_a"), row.get("text_b")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f'{where}: expected non-empty strings "text_a" and "text_b", found {texts!r}')
        if ("score" in row) == ("label" in row):
            raise DataError(f'{where}: expected either a "score" or a "label", found {sorted(row)}')
        pair = Pair(row["text_a"], row["text_b"], *_parse_judgement(row, where))
        if pairs and (pair.score is None) != (pairs[0].score is None):
            kinds = ("score", "label") if pair.label is None else ("label", "score")
            raise DataError(f'{where}: this pair has a "{kinds[0]}", those before it have a "{kinds[1]}"')
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{path}: no pairs")
    return pairs


def _parse_judgement(row: Mapping[str, Any], where: str) -> tuple[float | None, bool | None]:
    if "score" in row:
        score = row["score"]
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise DataError(f'{where}: expected "score" to be a number, found {score!r}')
        return float(score), None
    word = str(row["label"]).lower()
    if word not in LABELS:
        raise DataError(f"{where}: unknown label {row['label']!r}: known are {', '.join(LABELS)}")
    return None, LABELS[word]
