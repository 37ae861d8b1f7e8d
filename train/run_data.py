"""What a run reads of a BEIR folder, split as its seed says: the same for training and for `d2llm teach`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from d2llm.beir import RetrievalData
from d2llm.bm25 import Bm25
from d2llm.errors import DataError

from .config import Recipe
from .data import Example, examples_of, read_examples
from .dev import sample
from .mining import Ranker, mine


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The corpus, dev, and the training queries in three parts. Made by `load`."""

    corpus: list[str]
    """Each passage once, those of `data.examples` too."""
    bm25: Bm25
    """Over the corpus."""
    examples: list[Example]
    """All training queries, in random order; their negatives are those of `data.examples`, else BM25's."""
    calibration: list[Example]
    """Those that the teacher's members are weighed on."""
    apart: list[Example]
    """Those that the student learns from the teacher on."""
    seen: list[Example]
    """Those of the first stage."""
    dev: RetrievalData

    @classmethod
    def load(cls, recipe: Recipe) -> TrainingData:
        """Read and split the data of a recipe that has `data.folder`.

        Raises:
            DataError: the data is incomplete, or has no training queries.
        """
        config = recipe.data
        if config.folder is None:
            raise DataError("data.folder is not set: there is no retrieval data")
        folder = Path(config.folder)
        data, dev = RetrievalData.load(folder, "train"), RetrievalData.load(folder, "dev")
        examples = examples_of(data) if config.examples is None else read_examples(Path(config.examples))
        if not examples:
            raise DataError(f"{folder}: the train split has no query with a positive passage")
        named = (text for example in examples for text in (*example.positives, *example.negatives))
        corpus = list(dict.fromkeys(chain((d.content for d in data.documents.values()), named)))
        bm25 = Bm25(corpus)
        if config.examples is None:
            examples = mine_negatives(examples, corpus, bm25.rank, config.negatives)
        rng = random.Random(recipe.seed)
        rng.shuffle(examples)
        count = min(recipe.teacher.calibration_queries, len(examples) // 4)
        calibration, rest = examples[:count], examples[count:]
        apart = int(len(rest) * recipe.held_apart)
        return cls(
            corpus,
            bm25,
            examples,
            calibration,
            rest[:apart] or rest,
            rest[apart:] or rest,
            sample(dev, config.dev_queries, config.dev_documents, rng),
        )


def mine_negatives(examples: Sequence[Example], corpus: Sequence[str], ranker: Ranker, count: int) -> list[Example]:
    """The examples with the best `count` passages of `ranker` as their negatives."""
    depth = count + 20  # positives are among them, and copies
    return mine(examples, corpus, [ranker], negatives=count, depth=depth).examples


def paired(examples: Sequence[Example], negatives: int, seed: int) -> list[tuple[Example, str]]:
    """The examples that have enough negatives to learn from the teacher, each with the one positive against them.

    Raises:
        DataError: no example has that many negatives.
    """
    enough = [example for example in examples if len(example.negatives) >= negatives]
    if not enough:
        raise DataError(
            f"no query has {negatives} hard negatives: lower distil_negatives, or have more mined (distil_candidates; "
            'with distil_mining = "given", the negatives of data.examples)'
        )
    rng = random.Random(seed)
    return [(example, rng.choice(example.positives)) for example in enough]
