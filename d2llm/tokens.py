"""Token ids of texts of any length, with a tokenizer alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Encoding, Tokenizer

WINDOW = 64
"""`encode_batch` first reads this many characters for each token of the limit. That is enough for almost all texts."""
NAMES = 2**16
"""Names that a word can have: two bytes. In a larger vocabulary a few words share a name."""
QUERY_WORDS = 32
"""Words of a query's features, which are their last columns. A query of more words has those of the highest idf."""


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], prompt: str, max_length: int) -> list[list[int]]:
    """Return the token ids of each text, with `prompt` before it and truncated to `max_length` tokens.

    It sets the tokenizer's padding and truncation.
    """
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    prompted = [prompt + text for text in texts]
    return [encoding.ids for encoding in encode_batch(tokenizer, prompted, max_length)]


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> list[Encoding]:
    """Do what `tokenizer.encode_batch` does, faster for long texts. `tokenizer` must truncate to `limit` tokens.

    A tokenizer reads a whole text before it truncates. This function reads only the start of a long text, up to a
    space, and doubles the start until more than `limit` tokens overflow. The cut can change the tokens just before it;
    truncation removes these tokens.
    """
    encodings: list[Encoding] = tokenizer.encode_batch([_start(text, WINDOW * limit) for text in texts])
    for row, text in enumerate(texts):
        size = WINDOW * limit
        # Each overflowing encoding holds at most `limit` tokens, so two hold more than `limit`.
        while size < len(text) and len(encodings[row].overflowing) < 2:
            size *= 2
            encodings[row] = tokenizer.encode(_start(text, size))
    return encodings


def batches_of(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield batches of indices of texts of these lengths, longest texts first. A padded batch has at most `most`
    tokens, unless a single text has more."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def special_ids_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens that a tokenizer puts before a text, and those that it puts after it."""
    encoding = tokenizer.encode("a")
    ordinary = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
    if not ordinary:
        return [], []
    return encoding.ids[: ordinary[0]], encoding.ids[ordinary[-1] + 1 :]


def _start(text: str, size: int) -> str:
    """Return the first `size` characters at most, up to a space where there is one in the second half."""
    if len(text) <= size:
        return text
    space = text.rfind(" ", size // 2, size)
    return text[: size if space < 0 else space]
