"""Token ids of texts of any length. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding, Tokenizer

WINDOW = 64
"""Characters of a text that are read at first, for each token of the limit. Few texts need more than these."""


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> list[Encoding]:
    """`tokenizer.encode_batch`, for a tokenizer that truncates to `limit` tokens. A tokenizer reads a whole text before
    it truncates; this reads a long text up to a space only, and twice as far each time until more than `limit` tokens
    overflow. A cut may change the tokens just before it, which are not among those that are kept.
    """
    starts = [_start(text, WINDOW * limit) for text in texts]
    encodings: list[Encoding] = tokenizer.encode_batch(starts)
    for row, text in enumerate(texts):
        size = WINDOW * limit
        while size < len(text) and len(encodings[row].overflowing) < 2:  # each holds `limit` tokens at most
            size *= 2
            encodings[row] = tokenizer.encode(_start(text, size))
    return encodings


def _start(text: str, size: int) -> str:
    """The first `size` characters at most, without a word that would be cut in two."""
    if len(text) <= size:
        return text
    space = text.rfind(" ", size // 2, size)
    return text[: size if space < 0 else space]
