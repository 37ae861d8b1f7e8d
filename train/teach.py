"""`d2llm teach`: measure the LLM or reranker of a recipe, fine-tune it, and fill its cache before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from d2llm.errors import DataError
from d2llm.evaluate import MAIN_MEASURE, Ranking
from d2llm.metrics import Run as Rankings
from d2llm.metrics import evaluate, itself, paired_test, per_query
from d2llm.student import Student
from d2llm.types import Task

from .cache import Cached, TeacherCache
from .config import Recipe
from .data import RetrievalSplits, with_positive
from .dev import RERANKED, measure_teacher
from .examples import Example
from .finetune import Finetuning, Run, Tuning, finetune, read_finetuned
from .hub_loading import load_hub_teacher, load_uncached, on_saved_stack
from .hub_teachers import Spent
from .mining import BiEncoderRanker, TokenStatesRanker
from .on_stack import EncoderStack, OnStack
from .precision import compute_dtype
from .teacher import Bm25Teacher, Judgement, Teacher

COSINE, STACK, TEACHER, FINE_TUNED = "backbone's cosine, untrained", "stack", "teacher", "teacher, fine-tuned"
"""The rows of the table of figures on dev."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a fine-tuning starts from."""

    head: Literal["own", "new"] = "own"
    """`new` replaces the model's head by one that is zero."""
    on_stack: bool = False
    """Whether the log-odds are added to those of a stack."""
    encoder: str | None = None
    """The stack's encoder: a student's folder, or an embedder. None takes the recipe's backbone."""
    tuning: Tuning = "lora"


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

    Fine-tuning uses all training queries but those that weigh the members of a stack. The cache is filled with the
    judgements that a run of this recipe is certain to need: for each query held apart its positive, and with
    `distil.mining = "given"` its negatives too. `limit` takes only the first queries. On dev, each query's `reranked`
    best passages by cosine are reranked.

    Raises:
        DataError: no `teacher.cache`, no `llm` or `reranker`, incomplete data, no training queries.
        ModelError: the teacher, the student's backbone or the stack's encoder cannot be loaded.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        limit: int | None = None,
        start: Start | None = None,
        reranked: int = RERANKED,
        progress: bool = False,
    ) -> None:
        if recipe.teacher.cache is None:
            raise DataError("teacher.cache is not set: name the folder to keep judgements in, and train with it")
        if recipe.data.folder is None:
            raise DataError("data.folder is not set: a teacher is measured on a folder's dev split")
        self.recipe, self.start, self.progress = recipe, start or Start(), progress
        self.reranked = reranked
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_dtype(recipe.precision, self.device)
        self.splits = RetrievalSplits.load(recipe, Path(recipe.data.folder))
        asked = _asked(self.splits, recipe)
        self.dev, self.examples = self.splits.dev, self.splits.examples[len(self.splits.calibration) :][:limit]
        self.asked, self.available = asked[:limit], len(asked)
        weights = None if self.start.tuning == "full" else self.dtype
        self.hub = load_uncached(recipe.teacher, self.device, weights, head=self.start.head)
        self.cached = Cached(self.hub, TeacherCache(Path(recipe.teacher.cache)))
        self.words = Bm25Teacher(self.splits.bm25, self.splits.corpus)
        self.on_stack = self._on_stack()
        self.teacher: Teacher = self.cached if self.on_stack is None else self.on_stack.behind(self.cached)
        self.rankings: dict[str, Rankings] = {}
        """The ranking of dev by each row that was measured."""

    def _on_stack(self) -> OnStack | None:
        """The teacher on its stack: the stack that it was fine-tuned on, or one whose parts are weighed now."""
        saved = read_finetuned(Path(self.recipe.teacher.model or ""), self.hub.kind)
        if saved is not None and saved.stack is not None:
            return on_saved_stack(self.hub, saved, self.device, self.dtype, self.words)
        if not self.start.on_stack:
            return None
        encoder = self.start.encoder or self.recipe.student.backbone
        stack = EncoderStack(encoder, self.words, self.device, self.dtype, progress=self.progress)
        calibration = self._mined(stack, []).calibration
        if not calibration:
            raise DataError(
                "no query is left to weigh the stack's parts with (each needs its positives within the first "
                f"{self.recipe.distil.candidates} by cosine): raise teacher.calibration_queries or distil.candidates"
            )
        stack.fit(calibration)
        scale = 1.0 if self.hub.head == "new" else 0.0
        return OnStack(self.hub, stack, nn.Parameter(torch.tensor(scale, device=self.device), requires_grad=not scale))

    def _mined(self, stack: EncoderStack, examples: list[Example]) -> RetrievalSplits:
        """The splits, with the negatives of `examples` and of the calibration queries that the recipe asks for."""
        stack.states.compute(self.splits.corpus, "document")
        ranker, recipe = TokenStatesRanker(stack.states, self.splits.corpus), self.recipe.distil
        splits = replace(self.splits, second_stage=examples)
        return splits.with_mined_negatives(ranker.rank, recipe.candidates, recipe.mining)

    def zero_shot(self) -> tuple[float, dict[str, list[str]]]:
        """nDCG@10 of the untrained backbone's cosine on dev, and the ids of each query's best passages.

        For a teacher on a stack it is the cosine of the stack's encoder.
        """
        if self.on_stack is not None:
            student = self.on_stack.stack.encoder
        else:
            config = replace(
                self.recipe.student, tuning="frozen", start="mean", embedding_dim=None, interaction="cosine"
            )
            student = Student.create(config).to(self.device)
        ids = list(self.dev.documents)
        ranker = BiEncoderRanker(student, [self.dev.documents[id_].content for id_ in ids], progress=self.progress)
        rankings = ranker.rank(list(self.dev.queries.values()), self.reranked + 1)
        candidates = {
            query: [ids[index] for index in ranking if ids[index] != itself(query, self.dev.qrels)][: self.reranked]
            for query, ranking in zip(self.dev.queries, rankings, strict=True)
        }
        self.rankings[COSINE] = Ranking(list(candidates.values())).run(candidates)
        return evaluate(self.rankings[COSINE], self.dev.qrels)[MAIN_MEASURE], candidates

    def measure(self, candidates: Mapping[str, Sequence[str]], row: str = TEACHER) -> float:
        """nDCG@10 on dev of the teacher (or of its stack alone, for the row `STACK`), reranking each query's
        candidates: those of `zero_shot`."""
        teacher = self.on_stack.stack if row == STACK and self.on_stack is not None else self.teacher
        with tqdm(total=len(candidates), desc="dev", unit="query", disable=not self.progress) as bar:
            value, self.rankings[row] = measure_teacher(_WithBar(teacher, bar), self.dev, candidates)
        return value

    def gain(self, row: str, over: str) -> dict[str, float] | None:
        """The difference in nDCG@10 of two rows, with its interval (`paired_test`). None of a single query."""
        values = [per_query(self.rankings[name], self.dev.qrels, MAIN_MEASURE) for name in (row, over)]
        first, second = ([value[query] for query in self.dev.queries] for value in values)
        return paired_test(first, second) if len(first) > 1 else None

    def finetune(
        self,
        folder: Path,
        candidates: Mapping[str, Sequence[str]],
        dev: Mapping[str, float],
        *,
        about: Mapping[str, Any] | None = None,
        imitate: Recipe | None = None,
        **settings: Any,
    ) -> None:
        """Fine-tune the teacher on the labels of the training queries, and save it into the new `folder`.

        It keeps the state that reranks `candidates` best; `dev` holds the figures of `zero_shot` and `measure`. With
        `imitate` it learns the judgements of that recipe's `llm` or `reranker` in place of the labels. `settings` are
        the fields of `Finetuning`. The run lives in `FOLDER.run` until it is done, and goes on after a kill;
        `about` holds all that decides it.

        Raises:
            DataError: no training query has that many negatives, or `FOLDER.run` holds another run.
            ModelError: `folder` exists and is not empty.
        """
        chosen = Finetuning(**settings, tuning=self.start.tuning)
        self.hub.autocast = self.dtype
        examples = self.examples[: chosen.steps * chosen.batch]  # the steps see no more of them
        if self.on_stack is not None:
            examples = self._mined(self.on_stack.stack, examples).second_stage
        imitated = None
        if imitate is not None:
            imitated = load_hub_teacher(imitate.teacher, self.device, self.dtype, self.words)
        teacher = self.on_stack or self.hub
        run = Run(
            folder=folder.with_name(folder.name + ".run"),
            about=about or {},
            evaluate=lambda: measure_teacher(teacher, self.dev, candidates)[0],
            reference={name: value for name, value in dev.items() if name != TEACHER},
            before=dev.get(TEACHER, dev.get(STACK)),
        )
        finetune(teacher, examples, imitated=imitated, run=run, progress=self.progress, **asdict(chosen))
        run.keep(teacher, folder)

    def todo(self) -> Todo:
        """How much `fill` has to judge, and how fast the teacher has been so far."""
        judgements = sum(len(candidates) for _, candidates in self.asked)
        missing = sum(self.cached.missing(e.query, candidates, e.task) for e, candidates in self.asked)
        spent = self.hub.spent
        left = self.available * self.recipe.distil.candidates if self.recipe.distil.mining == "student" else 0
        return Todo(judgements, judgements - missing, left, spent.seconds / spent.judged if spent.judged else None)

    def fill_cache(self) -> Spent:
        """Judge what a run is certain to need and the cache does not have. Gives the cost."""
        todo, before = self.todo(), replace(self.hub.spent)
        spent = Spent()
        quiet = not self.progress
        with tqdm(total=todo.judgements, initial=todo.cached, desc="teacher", unit="pair", disable=quiet) as bar:
            for example, candidates in self.asked:
                misses = self.cached.misses
                self.cached.judge(example.query, candidates, example.task)
                spent = self.hub.spent.since(before)
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
