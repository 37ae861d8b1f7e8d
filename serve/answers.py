"""Results of the library as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from d2llm.reasons import Reason
from d2llm.search import Explanation


def search_answer(explanation: Explanation) -> dict[str, Any]:
    """Return the answer to one query; each hit is as `d2llm search --json` prints it.

    If the search was explained, the hits are all candidates in the order of recall, each with its reasons.
    """
    reasons = explanation.reasons
    hits = [asdict(hit) for hit in explanation.hits] if reasons is None else [*map(_explained, reasons.candidates)]
    return {
        "hits": hits,
        "candidates": explanation.candidates,
        "truncated": explanation.truncated,
        "seconds": explanation.seconds,
        **({} if reasons is None else {"scales": reasons.scales}),
    }


def _explained(reason: Reason) -> dict[str, Any]:
    why = {name: getattr(reason, name) for name in ("parts", "values", "words", "marks")}
    return {**asdict(reason.hit), **why}
