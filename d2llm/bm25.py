"""BM25, the lexical baseline and the source of hard negatives.

`bm25s` is the engine; `rank-bm25` is the reference it is tested against: the same scores from a Python loop over every
document for each query token.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from d2llm.errors import DataError, import_extra
from d2llm.types import Floats, strings

Engine = Literal["bm25s", "rank-bm25"]
K1, B = 1.5, 0.75

# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, Japanese, Chinese.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30fa\u30fc-\u30ff"
    r"\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Combining marks (accents apart from their letters; Hebrew and Arabic points; the vowel signs of India's scripts)
# are no letters to `re`, but no ends of a word either.
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0970-\u0de5\u0df2\u0df3"
_LETTERS = rf"[^\W_{_UNSPACED}]"
_TOKENS = re.compile(rf"([{_UNSPACED}]+)|{_LETTERS}+(?:[{_MARKS}]+{_LETTERS}*)*")
_STOPWORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)


def tokenize_words(text: str) -> list[str]:
    """Lower-case words in Unicode's NFKC, without English stop words; a text of stop words alone keeps them.

    Where a script has no spaces, single characters and overlapping pairs of them stand for words: pairs tell a word
    from its characters scattered over a text, single characters find a word of one.
    """
    tokens: list[str] = []
    for match in _TOKENS.finditer(unicodedata.normalize("NFKC", text).lower()):
        if run := match[1]:
            tokens += [*run, *map("".join, pairwise(run))]
        else:
            tokens.append(match[0])
    return [token for token in tokens if token not in _STOPWORDS] or tokens


class Bm25:
    """BM25 over N texts, k1 1.5 and b 0.75, with Robertson's idf not below zero.

    That idf is negative for a word in more than half of the texts, as if having it spoke against a text. Both engines
    give such a word no weight; left alone, rank-bm25 would give it a quarter of the mean idf.

    Raises:
        DataError: no text has a word.
    """

    def __init__(self, texts: Sequence[str], engine: Engine = "bm25s") -> None:
        corpus = [tokenize_words(text) for text in strings(texts)]
        if not any(corpus):
            raise DataError(f"BM25 needs words, and none of {len(corpus)} texts has any")
        self.engine, self.size = engine, len(corpus)
        if engine == "rank-bm25":
            self._ranker = import_extra("rank_bm25", "train").BM25Okapi(corpus, k1=K1, b=B, epsilon=0.0)
        else:
            # With ATIRE's term weights (Robertson's times k1 + 1), as rank-bm25 has them, the scores are the same too.
            self._ranker = import_extra("bm25s", "eval").BM25(method="atire", idf_method="robertson", k1=K1, b=B)
            logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG when imported
            self._ranker.index(corpus, show_progress=False)

    def scores(self, query: str) -> Floats:
        """Scores [N] of every text for `query`; higher is better, 0 without a common word."""
        tokens = tokenize_words(query)
        if self.engine == "bm25s":
            tokens = [token for token in tokens if token in self._ranker.vocab_dict]
            if not tokens:
                return np.zeros(self.size, np.float32)
        scores: Floats = np.asarray(self._ranker.get_scores(tokens), np.float32)
        return scores

    def rank(self, queries: Sequence[str], k: int) -> list[list[int]]:
        """Indices of each query's k best texts, best first, equal scores in order of the texts.

        Texts without a word of the query are no match: a row may be shorter than k, or empty.
        """
        ranked = []
        for query in strings(queries):
            scores_N = self.scores(query)
            matches = np.flatnonzero(scores_N)
            ranked.append(matches[_top(scores_N[matches], k)].tolist())
        return ranked

    def top(self, query: str, k: int) -> list[int]:
        """Indices of the min(k, N) best texts, best first; equal scores, 0 among them, in order of the texts."""
        best: list[int] = _top(self.scores(query), k).tolist()
        return best


def _top(scores_N: Floats, k: int) -> npt.NDArray[np.int64]:
    """The min(k, N) best places. Only what reaches the k-th score is sorted: sorting it all took 80 % of a search."""
    reached = np.arange(len(scores_N))
    if k < len(scores_N):
        reached = np.flatnonzero(scores_N >= np.partition(scores_N, -k)[-k])
    best: npt.NDArray[np.int64] = reached[np.argsort(-scores_N[reached], kind="stable")[:k]]
    return best
