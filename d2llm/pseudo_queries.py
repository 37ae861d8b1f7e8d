"""Texts that look like queries, made of passages: for small query encoders to learn from, and for calibration where
nobody has judged a query.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

from d2llm.bm25 import tokenize_words
from d2llm.types import Document

WORD = re.compile(r"\w[\w'.-]*\w|\w")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])\s*|\n+")
"""What ends a sentence. In Chinese and Japanese no space has to follow its mark."""
QUESTIONS = ("what is", "how does", "why", "when did", "where is", "who", "which")
FEWEST_WORDS = 3
"""Words of the shortest part of a passage that is used as a query, or left as a passage."""


class PseudoQuery(NamedTuple):
    """A query whose one relevant document is known, since it was made of it."""

    text: str
    document: Document
    passage: str
    """The text to search for in the document's place: its content, without `text` if that was taken out."""


def hard_queries(documents: Sequence[Document], count: int, seed: int = 0) -> list[PseudoQuery]:
    """Take a title or a sentence out of each document, in order: at most `count` queries.

    A text without two sentences that are long enough is cut in two halves.

    A hard query repeats nothing of what is left of its passage. So words count less in hard queries than in real ones.
    Documents that are too short for two texts of `FEWEST_WORDS` words are left out.
    """
    rng = random.Random(f"{seed}/hard")
    made = (PseudoQuery(text, document, rest) for document in documents for text, rest in _taken_out(document, rng))
    return [query for query, _ in zip(made, range(count), strict=False)]


def easy_queries(documents: Sequence[Document], count: int, seed: int = 0) -> list[PseudoQuery]:
    """Make keywords or a run of words of each document in turn, in order: at most `count` queries.

    An easy query repeats words of its passage. So words count more in easy queries than in real ones. Documents of less
    than `FEWEST_WORDS` words are left out.
    """
    rng = random.Random(f"{seed}/easy")
    long = [document for document in documents if _is_long(document.content)]
    words = [WORD.findall(document.content) for document in long]
    frequency = _frequency(words)
    made = (
        PseudoQuery(text, document, document.content)
        for document, line, form in zip(long, words, cycle((_keywords, _run_of_words)), strict=False)
        if (text := form(document, line, frequency, rng))
    )
    return [query for query, _ in zip(made, range(count), strict=False)]


def made_up_queries(documents: Sequence[Document], count: int, seed: int = 0) -> list[str]:
    """Make `count` texts that look like queries, from documents in random order; fewer if the corpus gives no more.

    The texts have four forms in turn: the title or first sentence, a run of words, keywords (the rarest words in their
    order), and a question with keywords. An encoder that learns from one form alone stays weak at the others.
    """
    rng = random.Random(f"{seed}/queries")
    words = [WORD.findall(document.content) for document in documents]
    frequency = _frequency(words)
    made: dict[str, None] = {}
    for turn in range(len(FORMS)):
        order = list(range(len(documents)))
        rng.shuffle(order)
        for place, index in enumerate(order):
            if len(made) >= count:
                return list(made)
            form = FORMS[(place + turn) % len(FORMS)]
            text = form(documents[index], words[index], frequency, rng)
            if text.strip():
                made[text] = None
    return list(made)


def _frequency(words: Sequence[Sequence[str]]) -> Counter[str]:
    """Return the number of texts that have each word."""
    return Counter(word for line in words for word in {word.lower() for word in line})


def _taken_out(document: Document, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield one part of a document and the rest of it, or nothing if one of them would be too short."""
    title, text = document.title.strip(), document.text.strip()
    sentences = [sentence for sentence in SENTENCE_END.split(text) if sentence.strip()]
    found = [next(_parts(title, part, rng), None) for part in (sentences, _halves(text))]
    pairs = [(title, text), found[0] or found[1]]
    if usable := [pair for pair in pairs if pair and all(map(_is_long, pair))]:
        yield rng.choice(usable)


def _parts(title: str, texts: Sequence[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield each of the texts and what is left without it, in random order, if both are long enough."""
    for place in rng.sample(range(len(texts)), len(texts)):
        pair = texts[place], " ".join(filter(None, [title, *texts[:place], *texts[place + 1 :]]))
        if all(map(_is_long, pair)):
            yield pair


def _halves(text: str) -> list[str]:
    """Cut a text between words; in scripts without spaces between characters."""
    units, space = (text.split(), " ") if " " in text else (list(text), "")
    return [space.join(units[: len(units) // 2]), space.join(units[len(units) // 2 :])]


def _is_long(text: str) -> bool:
    return len(tokenize_words(text)) >= FEWEST_WORDS


def _heading(document: Document, words: list[str], frequency: Counter[str], rng: random.Random) -> str:
    return document.title or SENTENCE_END.split(document.text.strip(), maxsplit=1)[0]


def _run_of_words(document: Document, words: list[str], frequency: Counter[str], rng: random.Random) -> str:
    length = rng.randint(4, 24)
    start = rng.randint(0, max(0, len(words) - length))
    return " ".join(words[start : start + length])


def _keywords(document: Document, words: list[str], frequency: Counter[str], rng: random.Random) -> str:
    known = dict.fromkeys(word.lower() for word in words)
    rarest = set(sorted(known, key=lambda word: (frequency[word], word))[: rng.randint(2, 6)])
    return " ".join(word for word in known if word in rarest)


def _question(document: Document, words: list[str], frequency: Counter[str], rng: random.Random) -> str:
    keywords = _keywords(document, words, frequency, rng)
    return f"{rng.choice(QUESTIONS)} {keywords}?" if keywords else ""


FORMS = (_heading, _run_of_words, _keywords, _question)
