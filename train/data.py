"""The data of a training run, read from files and split by the recipe's seed. `d2llm teach` reads the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from d2llm.beir import RetrievalData
from d2llm.bm25 import Bm25
from d2llm.errors import DataError
from d2llm.pairs import Pair, read_pairs

from .config import Recipe
from .examples import Example, examples_of, read_examples
from .mining import Ranker, mine_negatives


@dataclass(frozen=True, slots=True)
class RetrievalSplits:
    """A corpus, the training queries in three parts, and a sample of the dev split."""

    corpus: list[str]
    """Every distinct passage of the data folder and of `data.examples`."""
    bm25: Bm25
    """BM25 over `corpus`."""
    examples: list[Example]
    """All training queries in random order, with the negatives of `data.examples`, else with BM25's."""
    seen: list[Example]
    """The queries of the first stage."""
    held_apart: list[Example]
    """The queries of the second stage, on which the student learns from the teacher."""
    calibration: list[Example]
    """The queries on which the members of the teacher are weighted."""
    dev: RetrievalData

    @classmethod
    def load(cls, recipe: Recipe, folder: Path) -> RetrievalSplits:
        """Read the BEIR folder `folder` and split its training queries.

        Raises:
            DataError: the data is incomplete, has no training queries, or too few negatives are given.
        """
        config = recipe.data
        train, dev = RetrievalData.load(folder, "train"), RetrievalData.load(folder, "dev")
        examples = examples_of(train) if config.examples is None else read_examples(Path(config.examples))
        if not examples:
            raise DataError(f"{folder}: the train split has no query with a positive passage")
        example_texts = (text for example in examples for text in (*example.positives, *example.negatives))
        corpus = list(dict.fromkeys(chain((d.content for d in train.documents.values()), example_texts)))
        bm25 = Bm25(corpus)
        if config.examples is None:
            examples = mine_negatives(examples, corpus, bm25.rank, config.negatives)
        rng = random.Random(recipe.seed)
        rng.shuffle(examples)
        count = min(recipe.teacher.calibration_queries, len(examples) // 4)
        calibration, rest = examples[:count], examples[count:]
        apart = int(len(rest) * recipe.distil.held_apart)
        splits = cls(
            corpus=corpus,
            bm25=bm25,
            examples=examples,
            seen=rest[apart:] or rest,
            held_apart=rest[:apart] or rest,
            calibration=calibration,
            dev=sample(dev, config.dev_queries, config.dev_documents, rng),
        )
        if recipe.distil.mining == "given":
            with_positive(splits.held_apart, recipe.distil.negatives, recipe.seed)  # fails before anything is trained
        return splits

    def mined(self, ranker: Ranker, count: int, mining: Literal["student", "given"]) -> RetrievalSplits:
        """Take negatives from the student's own recall: the passages that teacher and IEM will have to order.

        `ranker` gives the negatives of the calibration queries, and with `mining="student"` those of the queries held
        apart.
        A calibration query stays only if all its positives are among its best `count` passages: a teacher never
        reranks a positive that recall misses, and such queries would skew the weights of its members.
        """
        queries = [example.query for example in self.calibration]
        rankings = ranker(queries, count) if queries else []
        recalled = [
            example
            for example, ranking in zip(self.calibration, rankings, strict=True)
            if {self.corpus[index] for index in ranking}.issuperset(example.positives)
        ]
        return replace(
            self,
            calibration=mine_negatives(recalled, self.corpus, ranker, count),
            held_apart=self.held_apart
            if mining == "given"
            else mine_negatives(self.held_apart, self.corpus, ranker, count),
        )


@dataclass(frozen=True, slots=True)
class TrainingData:
    """All that a run learns from and is measured on."""

    retrieval: RetrievalSplits | None
    """None where there are judged pairs alone."""
    pairs: list[list[Pair]]
    """The judged pairs of each file."""
    dev_pairs: list[Pair]

    @classmethod
    def load(cls, recipe: Recipe) -> TrainingData:
        """Read the data that a recipe names.

        Raises:
            DataError: the data is incomplete, has no training queries, or too few negatives are given.
        """
        config = recipe.data
        return cls(
            retrieval=None if config.folder is None else RetrievalSplits.load(recipe, Path(config.folder)),
            pairs=[read_pairs(Path(path)) for path in config.pairs],
            dev_pairs=read_pairs(Path(config.dev_pairs)) if config.dev_pairs else [],
        )

    @property
    def passages(self) -> list[str]:
        """The corpus, or the texts of all pairs where there is none."""
        if self.retrieval is not None:
            return self.retrieval.corpus
        return [text for pair in chain(*self.pairs) for text in (pair.text_a, pair.text_b)]


def with_positive(examples: Sequence[Example], negatives: int, seed: int) -> list[tuple[Example, str]]:
    """The examples that have enough negatives, each with one of its positives, drawn at random.

    Raises:
        DataError: no example has that many negatives.
    """
    enough = [example for example in examples if len(example.negatives) >= negatives]
    if not enough:
        raise DataError(
            f"no query has {negatives} hard negatives: lower distil.negatives, or have more mined (distil.candidates; "
            'with distil.mining = "given", the negatives of data.examples)'
        )
    rng = random.Random(seed)
    return [(example, rng.choice(example.positives)) for example in enough]


def sample(data: RetrievalData, queries: int, documents: int, rng: random.Random) -> RetrievalData:
    """A smaller data set: some queries, all passages judged for them, and `documents` other passages."""
    chosen = rng.sample(sorted(data.queries), min(queries, len(data.queries)))
    judged = {document for query in chosen for document in data.qrels[query]} - data.empty
    others = sorted(data.documents.keys() - judged)
    ids = sorted(judged | set(rng.sample(others, min(documents, len(others)))))
    return replace(
        data,
        documents={id_: data.documents[id_] for id_ in ids},
        queries={query: data.queries[query] for query in chosen},
        qrels={query: data.qrels[query] for query in chosen},
    )
