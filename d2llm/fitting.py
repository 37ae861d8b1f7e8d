"""Fit words and vectors of a student to a corpus, without labels."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from d2llm.backbone import pad
from d2llm.errors import DataError
from d2llm.features import Layout
from d2llm.student import Student, StudentConfig

logger = logging.getLogger(__name__)

SAMPLE = 500
"""Passages that the centre and the projection of the vectors are fitted to."""
UNKNOWN = ("[UNK]", "<unk>")
"""What tokenizers make of a word that they do not know."""
MANY = 0.1
"""The share of unknown tokens from which a warning says so: these words are all the same to the model."""


def fit_to_corpus(student: Student, passages: Sequence[str]) -> None:
    """Fit words and vectors of a student to a corpus, without labels.

    - The words get their idf and the mean length of a passage. Special tokens and prompts are no words.
    - `lexical_slots` and `vectors` of the config, where they are None, divide `feature_bytes` between them.
    - The vectors are fitted (`fit_vectors`).
    - The parts of the score get their scales without labels, for asymmetric pairs (`IEM.start_untrained`).

    Raises:
        DataError: the tokenizer knows no word of the passages.
    """
    config, tokenizer = student.config, student.tokenizer
    if config.interaction == "cosine" or (config.lexical_slots == 0 and config.vectors == 0):
        return
    special = [id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    prompts = chain(*(tokenizer.encode(prompt).ids for prompt in (config.query_prompt, config.document_prompt)))
    no_words = {*special, *prompts}
    ids = student.encodings(passages, "document")
    _check_known(student, ids, no_words)
    student.words.fit(ids, no_words)
    student.resize(_divided(config, [len(set(row) - no_words) for row in ids]))
    student.iem.start_untrained()
    fit_vectors(student, passages)


def _check_known(student: Student, ids: Sequence[Sequence[int]], no_words: set[int]) -> None:
    """Refuse passages without a word that the tokenizer knows, and warn of many that it does not know."""
    counts = Counter[int | None](chain.from_iterable(ids))
    unknown = sum(counts.pop(student.tokenizer.token_to_id(token), 0) for token in UNKNOWN)
    known = sum(count for id_, count in counts.items() if id_ not in no_words)
    if not known:
        raise DataError(
            f"the tokenizer of {student.config.backbone} knows no word of the corpus: choose an embedder for its "
            "language"
        )
    if (share := unknown / (known + unknown)) > MANY:
        logger.warning(
            "%.0f %% of the tokens of the corpus are unknown to the tokenizer of %s: these words are all the same to "
            "the model. Choose an embedder for the language of the corpus",
            100 * share,
            student.config.backbone,
        )


def fit_vectors(student: Student, passages: Sequence[str]) -> None:
    """Give the vectors of a student, if it has some, their centre and their principal components, from the token states
    of some passages. Do this again when the backbone has changed."""
    if not student.iem.layouts[1].vectors:
        return
    sample = random.Random(0).sample(list(passages), min(SAMPLE, len(passages)))
    ids = sorted(student.encodings(sample, "document"), key=len)
    was_training = student.training
    student.eval()
    student.token_vectors.fit(torch.cat([_states(student, ids[i : i + 32]) for i in range(0, len(ids), 32)]))
    student.train(was_training)


def _divided(config: StudentConfig, words: Sequence[int]) -> StudentConfig:
    """Return a config whose `lexical_slots` and `vectors` are numbers. `words` are the numbers of different words of
    the passages."""
    room = config.feature_bytes - Layout(config.feature_dim, 0, 0, 0).bytes
    slots, vectors = config.lexical_slots, config.vectors
    if slots is None:
        most = room if vectors == 0 else room // 2 if vectors is None else room - vectors * config.vector_dim // 2
        slots = max(0, min(math.ceil(np.quantile(words, 0.95)), most // 3))
    if vectors is None:
        vectors = max(0, room - 3 * slots) // (config.vector_dim // 2)
    return replace(config, lexical_slots=slots, vectors=vectors)


@torch.inference_mode()
def _states(student: Student, ids: Sequence[Sequence[int]]) -> Tensor:
    """Return the token states [N, D] of all words of some texts."""
    ids_BL, mask_BL = pad(ids, student.device)
    word_BL = (student.words.idf_V[ids_BL] > 0) & (mask_BL > 0)
    return student.tokens(ids_BL, mask_BL)[word_BL].float().cpu()
