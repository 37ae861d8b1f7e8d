"""BM25, the lexical baseline and a source of hard negatives.

`bm25s` is the engine. `rank-bm25` is the reference that tests compare it with: it gives the same scores, but loops over
every document for each query token in Python.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from d2llm.errors import ArgumentError, DataError, import_extra
from d2llm.types import Floats, strings

Engine = Literal["bm25s", "rank-bm25"]
K1, B = 1.5, 0.75

# The scripts without spaces between words: Thai, Lao, Myanmar, Khmer, Japanese, Chinese.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30fa\u30fc-\u30ff"
    r"\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# `re` does not count combining marks as letters, but they must not end a word. These are accents apart from their
# letters, Hebrew and Arabic points, and the vowel signs of India's scripts.
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0970-\u0de5\u0df2\u0df3"
_LETTERS = rf"[^\W_{_UNSPACED}]"
_TOKENS = re.compile(rf"([{_UNSPACED}]+)|{_LETTERS}+(?:[{_MARKS}]+{_LETTERS}*)*")
_STOPWORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)


def tokenize_words(text: str) -> list[str]:
    """Split a text as `split_words` does, and leave out English stop words. A text that has only these keeps them."""
    tokens = split_words(text)
    return [token for token in tokens if token not in _STOPWORDS] or tokens


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words in Unicode's NFKC form.

    In scripts without spaces, the tokens are single characters and overlapping pairs of characters. A pair tells a word
    from its characters scattered over the text; a single character finds a word of one character.
    """
    tokens: list[str] = []
    for match in _TOKENS.finditer(unicodedata.normalize("NFKC", text).lower()):
        if run := match[1]:
            tokens += [*run, *map("".join, pairwise(run))]
        else:
            tokens.append(match[0])
    return tokens


class Bm25:
    """BM25 over N texts, with k1 = 1.5, b = 0.75 and Robertson's idf, cut off at zero.

    Robertson's idf is negative for a word in more than half of the texts, so a text would lose score by having the
    word. Both engines give such a word no weight. (By default, rank-bm25 gives it a quarter of the mean idf.)

    `stems` is a language, such as "english": its word forms count as one word. None keeps words as they are.

    Raises:
        DataError: no text has a word.
        ArgumentError: there are no stems of this language.
        MissingExtraError: `stems` is given, and the extra `eval` is not installed.

    Example:
        >>> from d2llm.bm25 import Bm25
        >>> bm25 = Bm25(["Refunds take five days.", "We ship on Mondays.", "Ask us anything."])
        >>> bm25.rank(["how many days does a refund take?", "who knows"], k=2)
        [[0], []]
    """

    def __init__(self, texts: Sequence[str], engine: Engine = "bm25s", *, stems: str | None = None) -> None:
        self._stem = list if stems is None else stemmer(stems)
        corpus = [self._stem(tokenize_words(text)) for text in strings(texts)]
        if not any(corpus):
            raise DataError(f"BM25 needs words, and none of {len(corpus)} texts has any: check the corpus")
        self.engine, self.size = engine, len(corpus)
        if engine == "rank-bm25":
            self._ranker = import_extra("rank_bm25", "train").BM25Okapi(corpus, k1=K1, b=B, epsilon=0.0)
        else:
            # rank-bm25 uses ATIRE's term weights (Robertson's times k1 + 1): the same weights give the same scores.
            self._ranker = import_extra("bm25s", "eval").BM25(method="atire", idf_method="robertson", k1=K1, b=B)
            logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets DEBUG on import
            self._ranker.index(corpus, show_progress=False)

    def scores(self, query: str) -> Floats:
        """Return the score of every text for `query`, [N] float32.

        Higher is better. A text that shares no word with the query has score 0.
        """
        tokens = self._stem(tokenize_words(query))
        if self.engine == "bm25s":
            tokens = [token for token in tokens if token in self._ranker.vocab_dict]
            if not tokens:
                return np.zeros(self.size, np.float32)
        scores: Floats = np.asarray(self._ranker.get_scores(tokens), np.float32)
        return scores

    def rank(self, queries: Sequence[str], k: int) -> list[list[int]]:
        """Return the indices of the `k` best texts for each query, best first. Equal scores keep the texts' order.

        A text that shares no word with the query is not returned, so a list may be shorter than `k`, or empty.
        """
        ranked = []
        for query in strings(queries):
            scores_N = self.scores(query)
            matches = np.flatnonzero(scores_N)
            ranked.append(matches[_top(scores_N[matches], k)].tolist())
        return ranked

    def top(self, query: str, k: int) -> list[int]:
        """Return the indices of the min(k, N) best texts for one query, best first.

        Equal scores, including 0, keep the order of the texts.
        """
        best: list[int] = _top(self.scores(query), k).tolist()
        return best


def stemmer(language: str) -> Callable[[list[str]], list[str]]:
    """A function that gives the stem of each word of a list.

    Raises:
        ArgumentError: there are no stems of this language.
        MissingExtraError: the extra `eval` is not installed.
    """
    snowball = import_extra("Stemmer", "eval")
    if language not in snowball.algorithms():
        raise ArgumentError(f"no stems of the language {language!r}: choose one of {', '.join(snowball.algorithms())}")
    stem: Callable[[list[str]], list[str]] = snowball.Stemmer(language).stemWords
    return stem


def _top(scores_N: Floats, k: int) -> npt.NDArray[np.int64]:
    """Return the indices of the min(k, N) highest scores, highest first.

    Only the scores that reach the k-th highest are sorted: sorting all of them took 80 % of a search.
    """
    indices = np.arange(len(scores_N))
    if k < len(scores_N):
        indices = np.flatnonzero(scores_N >= np.partition(scores_N, -k)[-k])
    best: npt.NDArray[np.int64] = indices[np.argsort(-scores_N[indices], kind="stable")[:k]]
    return best
