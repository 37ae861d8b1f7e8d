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
    first_stage: list[Example]
    """The queries on which the encoder learns recall."""
    second_stage: list[Example]
    """The queries on which the student learns from the teacher. They are apart from the first stage, unless one of the
    two would be empty."""
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
            first_stage=rest[apart:] or rest,
            second_stage=rest[:apart] or rest,
            calibration=calibration,
            dev=sample(dev, config.dev_queries, config.dev_documents, rng),
        )
        if recipe.distil.mining == "given":
            with_positive(splits.second_stage, recipe.distil.negatives, recipe.seed)  # fails before anything is trained
        return splits

    def with_mined_negatives(self, ranker: Ranker, count: int, mining: Literal["student", "given"]) -> RetrievalSplits:
        """Return these splits with `count` hard negatives from `ranker` for each query.

        Calibration queries always get them. Queries of the second stage get them with `mining="student"`; with "given"
        they keep the negatives of `data.examples`. A calibration query is dropped if the first `count` passages of
        `ranker` miss one of its positives: the teacher will never rerank that positive, so the query would bias the
        weights of the teacher's members.
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
            second_stage=self.second_stage
            if mining == "given"
            else mine_negatives(self.second_stage, self.corpus, ranker, count),
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
            DataError: the data is incomplete, has no training queries, or too few negatives are given; or all pairs of
                a file have the same judgement.
        """
        config = recipe.data
        return cls(
            retrieval=None if config.folder is None else RetrievalSplits.load(recipe, Path(config.folder)),
            pairs=[_judged_pairs(Path(path)) for path in config.pairs],
            dev_pairs=_judged_pairs(Path(config.dev_pairs)) if config.dev_pairs else [],
        )

    @property
    def labelled(self) -> list[Pair]:
        """The judged pairs that have labels."""
        return [pair for pair in chain(*self.pairs) if pair.label is not None]

    @property
    def passages(self) -> list[str]:
        """The corpus, or the texts of all pairs where there is none."""
        if self.retrieval is not None:
            return self.retrieval.corpus
        return [text for pair in chain(*self.pairs) for text in (pair.text_a, pair.text_b)]


def _judged_pairs(path: Path) -> list[Pair]:
    pairs = read_pairs(path)
    if len(judgements := {(pair.score, pair.label) for pair in pairs}) == 1:
        score, label = judgements.pop()
        found = f"the score {score:g}" if score is not None else f"the same label ({'' if label else 'no '}entailment)"
        raise DataError(
            f"{path}: all {len(pairs)} pairs have {found}, so there is nothing to tell apart: add pairs with another"
        )
    return pairs


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
