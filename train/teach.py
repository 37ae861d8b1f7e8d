"""`d2llm teach`: measure the LLM or reranker of a recipe, fine-tune it, and fill its cache before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from d2llm.errors import DataError
from d2llm.evaluate import MAIN_MEASURE, Ranking
from d2llm.metrics import evaluate, itself
from d2llm.student import Student
from d2llm.types import Task

from .cache import Cached, TeacherCache
from .config import Recipe
from .data import RetrievalSplits, with_positive
from .dev import RERANKED, measure_teacher
from .examples import Example
from .finetune import finetune, save_finetuned
from .hub_loading import load_uncached
from .hub_teachers import Spent
from .mining import BiEncoderRanker
from .precision import compute_dtype
from .teacher import Judgement, Teacher


@dataclass(frozen=True, slots=True)
class Todo:
    """The work of `Teaching.fill`, and the work that it leaves to the run."""

    judgements: int
    """Passages to judge, over all queries."""
    cached: int
    """How many of them are in the cache."""
    left: int
    """At most this many passages will be judged by the run itself: they are not known before its first stage."""
    pace: float | None
    """Seconds for one passage, measured so far. None if nothing was judged."""


class Teaching:
    """Measures a recipe's `llm` or `reranker` on dev, fine-tunes it, and fills its cache for the run.

    Fine-tuning uses all training queries. The cache is filled with the judgements that a run of this recipe is certain
    to need: for each query held apart its positive, and with `distil.mining = "given"` its negatives too. `limit` takes
    only the first queries.

    Raises:
        DataError: no `teacher.cache`, no `llm` or `reranker`, incomplete data, no training queries.
        ModelError: the teacher or the student's backbone cannot be loaded.
    """

    def __init__(self, recipe: Recipe, *, limit: int | None = None, progress: bool = False) -> None:
        if recipe.teacher.cache is None:
            raise DataError("teacher.cache is not set: name the folder to keep judgements in, and train with it")
        if recipe.data.folder is None:
            raise DataError("data.folder is not set: a teacher is measured on a folder's dev split")
        self.recipe, self.progress = recipe, progress
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        splits = RetrievalSplits.load(recipe, Path(recipe.data.folder))
        asked = _asked(splits, recipe)
        self.dev, self.examples = splits.dev, splits.examples[:limit]
        self.asked, self.available = asked[:limit], len(asked)
        self.teacher = load_uncached(recipe.teacher, self.device, compute_dtype(recipe.precision, self.device))
        self.cached = Cached(self.teacher, TeacherCache(Path(recipe.teacher.cache)))

    def zero_shot(self) -> tuple[float, dict[str, list[str]]]:
        """nDCG@10 of the untrained backbone's cosine on dev, and the ids of each query's best passages."""
        config = replace(self.recipe.student, tuning="frozen", start="mean", embedding_dim=None, interaction="cosine")
        student = Student.create(config).to(self.device)
        ids = list(self.dev.documents)
        ranker = BiEncoderRanker(student, [self.dev.documents[id_].content for id_ in ids], progress=self.progress)
        rankings = ranker.rank(list(self.dev.queries.values()), RERANKED + 1)
        candidates = {
            query: [ids[index] for index in ranking if ids[index] != itself(query, self.dev.qrels)][:RERANKED]
            for query, ranking in zip(self.dev.queries, rankings, strict=True)
        }
        run = Ranking(list(candidates.values())).run(candidates)
        return evaluate(run, self.dev.qrels)[MAIN_MEASURE], candidates

    def measure(self, candidates: Mapping[str, Sequence[str]]) -> float:
        """nDCG@10 of the teacher on dev, reranking each query's candidates: those of `zero_shot`."""
        with tqdm(total=len(candidates), desc="dev", unit="query", disable=not self.progress) as bar:
            return measure_teacher(_WithBar(self.cached, bar), self.dev, candidates)[0]

    def finetune(self, folder: Path, *, steps: int, batch: int, negatives: int, lr: float, checkpointing: bool) -> None:
        """Fine-tune the teacher on the labels of the training queries, and save it into the new `folder`.

        Raises:
            DataError: no training query has that many negatives.
            ModelError: `folder` exists and is not empty.
        """
        finetune(
            self.teacher, self.examples, steps=steps, batch=batch, negatives=negatives, lr=lr,
            checkpointing=checkpointing, seed=self.recipe.seed, progress=self.progress,
        )  # fmt: skip
        save_finetuned(self.teacher, folder)

    def todo(self) -> Todo:
        """How much `fill` has to judge, and how fast the teacher has been so far."""
        judgements = sum(len(candidates) for _, candidates in self.asked)
        missing = sum(self.cached.missing(e.query, candidates, e.task) for e, candidates in self.asked)
        spent = self.teacher.spent
        left = self.available * self.recipe.distil.candidates if self.recipe.distil.mining == "student" else 0
        return Todo(judgements, judgements - missing, left, spent.seconds / spent.judged if spent.judged else None)

    def fill_cache(self) -> Spent:
        """Judge what a run is certain to need and the cache does not have. Gives the cost."""
        todo, before = self.todo(), replace(self.teacher.spent)
        spent = Spent()
        quiet = not self.progress
        with tqdm(total=todo.judgements, initial=todo.cached, desc="teacher", unit="pair", disable=quiet) as bar:
            for example, candidates in self.asked:
                misses = self.cached.misses
                self.cached.judge(example.query, candidates, example.task)
                spent = self.teacher.spent.since(before)
                bar.set_postfix_str(f"{spent.tokens / max(spent.seconds, 1e-9):,.0f} tokens/s", refresh=False)
                bar.update(self.cached.misses - misses)
        return spent


def _asked(splits: RetrievalSplits, recipe: Recipe) -> list[tuple[Example, list[str]]]:
    """The pairs that a run is certain to have judged: each query of the second stage with its positive.

    With `mining="given"` its negatives come too. Otherwise training mines them, after its first stage.
    """
    if recipe.distil.mining == "student":
        return [(example, [positive]) for example, positive in with_positive(splits.second_stage, 0, recipe.seed)]
    lessons = with_positive(splits.second_stage, recipe.distil.negatives, recipe.seed)
    return [(example, list(dict.fromkeys([positive, *example.negatives]))) for example, positive in lessons]


class _WithBar:
    """A teacher that moves a progress bar with each query."""

    def __init__(self, teacher: Teacher, bar: tqdm[None]) -> None:
        self.teacher, self.bar = teacher, bar

    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        judgement = self.teacher.judge(query, candidates, task)
        self.bar.update()
        return judgement
