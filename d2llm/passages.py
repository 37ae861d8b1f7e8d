"""Split a document that is longer than the encoder's limit into passages, and join passages to the document again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from semantic_text_splitter import MarkdownSplitter, TextSplitter

from d2llm.types import Document, Passage

OVERLAP = 1 / 8
"""The share of a passage that the next one repeats at most."""
FILL = 0.95
"""How much of the limit a passage may take, by the mean length of a token in its document. A passage that is too long
nevertheless is split again."""
SLACK = 1.25
"""How much longer than usual a passage may become that takes headings in. Below 1 / `SHRINK`: what was split because it
was too long is never put together again."""
SHRINK = 0.75
"""A passage that is split again is cut to at most so much of its length."""
SHORTEST = 16
"""A passage of so few characters is not split again."""
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*?)[ \t#]*")
_FENCE = re.compile(r" {0,3}(```|~~~)")


def split(document: Document, count_tokens: Callable[[Sequence[str]], list[int]], limit: int) -> list[Passage]:
    """Split a document into passages whose content (`content_of`) has at most `limit` tokens.

    The text is cut at the largest units that fit: Markdown sections, paragraphs, sentences, words, characters. The
    passages cover the whole text, and a passage repeats up to an eighth (`OVERLAP`) of the one before it.

    `count_tokens` returns the number of tokens of each text. The splitter measures characters, and the tokens of its
    passages are counted afterwards. A splitter that counts tokens itself calls the tokenizer again and again, and needs
    a tenth of the time that the encoder needs.
    """
    text, outline = document.text, list(_outline(document.text))
    splitter = MarkdownSplitter if outline else TextSplitter

    def passages(start: int, end: int, characters: float) -> Iterator[Passage]:
        """Cut a part of the text into passages of at most so many characters."""
        size = max(SHORTEST, int(characters))
        pieces = splitter(size, overlap=int(OVERLAP * size), trim=False).chunk_indices(text[start:end])
        spans = _with_bare_ones_joined(text, [(start + at, start + at + len(piece)) for at, piece in pieces], size)
        cut = [Passage(0, 1, *span, _path(outline, span[0])) for span in spans]
        counts = count_tokens([content_of(document, passage, limit, count_tokens) for passage in cut])
        for passage, tokens in zip(cut, counts, strict=True):
            length = passage.end - passage.start
            if tokens <= limit or length <= SHORTEST:
                yield passage
            elif length < end - start:
                yield from passages(passage.start, passage.end, length * min(SHRINK, FILL * limit / tokens))
            else:  # nothing was cut off, or blanks that were cut off were joined again
                middle = passage.start + length // 2
                yield from passages(passage.start, middle, length / 2)
                yield from passages(middle, passage.end, length / 2)

    (tokens,) = count_tokens([document.content])
    cut: list[Passage] = []
    for passage in passages(0, len(text), FILL * len(text) * min(1.0, limit / tokens)):
        # Neighbours overlap. So a piece of a passage that was split again may be a part of a neighbour.
        while cut and passage.start <= cut[-1].start and passage.end >= cut[-1].end:
            cut.pop()
        if not cut or passage.end > cut[-1].end:
            cut.append(passage)
    return [
        Passage(number, len(cut), passage.start, passage.end, passage.heading) for number, passage in enumerate(cut)
    ]


def content_of(
    document: Document, passage: Passage, limit: int, count_tokens: Callable[[Sequence[str]], list[int]]
) -> str:
    """Return the text that the encoder reads of a passage: title and headings of the document, then the passage.

    Title and headings are cut to half as many characters as the passage may have tokens, and to half as many tokens.
    """
    context = " ".join(filter(None, [document.title, passage.heading]))[: limit // 2]
    while not context.isascii():  # beyond ASCII, a character may be several tokens
        (tokens,) = count_tokens([context])
        if tokens <= limit // 2:
            break
        context = context[: min(len(context) - 1, len(context) * (limit // 2) // tokens)]
    text = document.text[passage.start : passage.end]
    return f"{context} {text}" if context else text


def leading_heading(text: str) -> tuple[str, str]:
    """Return the Markdown heading that a passage begins with, and the text behind it. Without one, `"", text`."""
    line, _, rest = text.lstrip("\n").partition("\n")
    heading = _HEADING.fullmatch(line.rstrip())
    return (heading[2], rest) if heading else ("", text)


def joined(parts: Sequence[tuple[Passage | None, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the payload of a document, with its whole text, from those of its passages, in any order."""
    text = ""
    for passage, payload in sorted(parts, key=lambda part: part[0].number if part[0] else 0):
        if passage is None:
            return dict(payload)
        text += payload["text"][len(text) - passage.start :]
    return {**parts[0][1], "text": text}


def _outline(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield the Markdown headings outside of fenced code, each with its place in the text and its level."""
    place, fence, begins = 0, "", True
    for line in text.splitlines(keepends=True):
        bare = line.rstrip()
        heading = _HEADING.fullmatch(bare)
        if mark := _FENCE.match(line):
            fence = "" if fence == mark[1] else fence or mark[1]
        elif not fence and heading and begins:
            yield place, len(heading[1]), heading[2]
        place += len(line)
        # A heading has a blank line before it, or another heading. Else it may be a comment in a file that is quoted.
        begins = not bare or (begins and heading is not None)


def _path(outline: Sequence[tuple[int, int, str]], start: int) -> str:
    """Return the headings of the sections that a passage begins in, `Install > Linux`, without those it contains."""
    path: list[tuple[int, str]] = []
    for place, level, heading in outline:
        if place >= start:
            break
        path = [*(above for above in path if above[0] < level), (level, heading)]
    return " > ".join(heading for _, heading in path)


def _with_bare_ones_joined(text: str, spans: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Join each span of headings or blanks alone to the span after it, or else to the one before it.

    A joined span is hardly longer than `size`: there are texts of many headings and little else.
    """
    forward: list[tuple[int, int]] = []
    for start, end in spans:
        if forward and _is_bare(text[slice(*forward[-1])]) and end - forward[-1][0] <= SLACK * size:
            forward[-1] = (forward[-1][0], end)
        else:
            forward.append((start, end))
    full: list[tuple[int, int]] = []
    for start, end in forward:
        if full and _is_bare(text[start:end]) and end - full[-1][0] <= SLACK * size:
            full[-1] = (full[-1][0], end)
        else:
            full.append((start, end))
    return full


def _is_bare(text: str) -> bool:
    return all(not line.strip() or _HEADING.fullmatch(line.rstrip()) for line in text.splitlines())
