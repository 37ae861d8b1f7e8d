"""Results of the library as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from d2llm.search import Explanation


def search_answer(explanation: Explanation) -> dict[str, Any]:
    """Return the answer to one query; each hit is as `d2llm search --json` prints it."""
    return {
        "hits": [asdict(hit) for hit in explanation.hits],
        "candidates": explanation.candidates,
        "truncated": explanation.truncated,
        "seconds": explanation.seconds,
    }
