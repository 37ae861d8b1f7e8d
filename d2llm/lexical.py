"""BM25, the lexical baseline and the source of hard negatives.

`bm25s` is the engine; `rank-bm25` is the reference it is tested against: the same formula (Robertson's, k1 1.5, b 0.75)
in a Python loop over every document for each query token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from d2llm.errors import import_extra
from d2llm.types import Floats

Engine = Literal["bm25s", "rank-bm25"]
K1, B = 1.5, 0.75

# Words, and single characters of scripts that are written without spaces (Chinese, Japanese, Thai, Khmer, Lao).
_SINGLE = r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
_TOKENS = re.compile(rf"{_SINGLE}|(?:(?!{_SINGLE})[^\W_])+")
_STOPWORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)


def words(text: str) -> list[str]:
    """Lower-case words without English stop words; a text of stop words alone keeps them."""
    tokens = _TOKENS.findall(text.lower())
    return [token for token in tokens if token not in _STOPWORDS] or tokens


class Bm25:
    """BM25 over N texts."""

    def __init__(self, texts: Sequence[str], engine: Engine = "bm25s") -> None:
        corpus = [words(text) for text in texts]
        self.engine, self.size = engine, len(corpus)
        if engine == "rank-bm25":
            self._ranker = import_extra("rank_bm25", "train").BM25Okapi(corpus, k1=K1, b=B)
        else:
            self._ranker = import_extra("bm25s", "eval").BM25(method="robertson", k1=K1, b=B)
            self._ranker.index(corpus, show_progress=False)

    def scores(self, query: str) -> Floats:
        """Scores [N] of every text for `query`; higher is better, 0 without a common word."""
        tokens = words(query)
        if self.engine == "bm25s":
            tokens = [token for token in tokens if token in self._ranker.vocab_dict]
            if not tokens:
                return np.zeros(self.size, np.float32)
        scores: Floats = np.asarray(self._ranker.get_scores(tokens), np.float32)
        return scores

    def top(self, query: str, k: int) -> list[int]:
        """Indices of the `k` best texts, best first; equal scores in order of the texts."""
        best: list[int] = np.argsort(-self.scores(query), kind="stable")[:k].tolist()
        return best
