"""The settings and the report of `d2llm adapt`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from d2llm.calibration import Calibration, Gain
from d2llm.errors import ArgumentError
from d2llm.settings import LARGEST, Count, Positive, Range, Seed, Share, Weight, check_fields

from .styles import STYLES, Style


class Schedule(NamedTuple):
    """How long an adaptation trains, and how much one step takes: the fields of `Adaptation` of these names."""

    steps: int
    batch: int
    negatives: int
    lr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptation:
    """The settings of an adaptation.

    Raises:
        ArgumentError: a value is out of range.

    Example:
        >>> Adaptation(steps=300).steps
        300
    """

    pool: Count = 10_000
    """The documents that take part, drawn at random: candidates and held-out passages are theirs."""
    written: Count = 3000
    """The passages of the pool for which a generator writes queries, one of each style; and the most titles that are
    queries. Queries of a file are all taken."""
    styles: tuple[Style, ...] = STYLES
    """The styles of the queries."""
    candidates: Count = 30
    """The passages that the teacher scores for each query: the best by cosine and by BM25, interleaved."""
    folds: Annotated[int, Range(2, LARGEST)] = 4
    """Parts of the documents with queries. The queries of a part are held out of a training, and decide whether the
    student is better. With `head`, each part is held out of one training, and the student's own training has them all.
    With `full`, one part is held out of the one training that there is."""
    certain: Count = 3
    """A held-out query decides if the teacher finds its passage among the first so many. Of the other queries that a
    language model wrote, many do not ask for their passage: a student that finds it for them has learned the habits of
    the generator. The choice favours the embedder, whose score the teacher is by default, so a gain is one in spite of
    it. Raise it to `candidates` + 1 for queries that people wrote: then all held-out queries decide."""
    tuning: Literal["head", "full"] = "head"
    """What is trained. `head`: one linear map of the recall vectors, in a minute, since no text is encoded again.
    `full`: all weights of the backbone, which can gain more, and takes a GPU or an hour."""
    steps: Count | None = None
    """Training steps. None: 400 for the head, 300 for all weights."""
    batch: Count | None = None
    """Queries in one step. None: 128 for the head, 32 for all weights."""
    negatives: Count | None = None
    """Candidates of each query that stand beside its own passage in one step. Each step draws them anew. None: all for
    the head, 7 for all weights."""
    lr: Positive | None = None
    """Peak learning rate. It rises over the first tenth of the steps, then falls to zero. None: 3e-4 for the head, 2e-5
    for all weights."""
    length: Count = 96
    """Tokens that are read of a passage in training, with `full`."""
    prior: Weight = 3.0
    """Log-odds that a passage gets on top of the teacher's score for a query that was written for it."""
    contrastive: Weight = 0.1
    """Weight of InfoNCE beside the listwise imitation of the teacher. Alone, it lowers strong embedders (CADET, arXiv
    2505.19274)."""
    temperature: Positive = 0.05
    """Temperature of the cosines."""
    way: Share = 0.5
    """How far the weights go from where they started to the trained ones. Half way keeps most of a gain, and little of
    a loss (WiSE-FT, arXiv 2109.01903)."""
    seed: Seed = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.styles:
            raise ArgumentError(f"styles: expected one or more of {', '.join(STYLES)}, found none")

    @property
    def schedule(self) -> Schedule:
        """The schedule of the training, with the values that were not set."""
        usual = Schedule(400, 128, self.candidates, 3e-4) if self.tuning == "head" else Schedule(300, 32, 7, 2e-5)
        chosen = {name: getattr(self, name) for name in Schedule._fields}
        return usual._replace(**{name: value for name, value in chosen.items() if value is not None})


@dataclass(slots=True)
class Report:
    """What an adaptation did, and whether its student is better than the embedder."""

    verdict: str = ""
    adapted: bool = False
    """Whether the student has trained weights. If not, it is the embedder as it was, with words and vectors."""
    written: dict[str, int] = field(default_factory=dict)
    """Queries by style."""
    kept: dict[str, int] = field(default_factory=dict)
    """Queries that are left: not empty, no copies, no loops of the same words, and the teacher puts their passage above
    the median candidate."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Some of the queries kept, by style."""
    teacher: dict[str, float] = field(default_factory=dict)
    """Mean reciprocal rank of the own passage among the candidates of held-out queries, by teacher and by cosine."""
    gain: Gain | None = None
    """nDCG@10 of a hybrid search with the embedder, on the held-out queries that decide, and what the adaptation adds.
    None if nothing was trained."""
    cosine_gain: Gain | None = None
    """The same where the candidates are ranked by cosine alone."""
    scales: Calibration | None = None
    """The scales of the parts of the score, chosen by the same queries. The student has the chosen ones if each style
    of queries is sure to gain by them (`accepted`). None: there were too few queries."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each part, since the run was started or resumed."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Note the time of a block."""
        began = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - began, 1)
