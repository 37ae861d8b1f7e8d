"""`d2llm teach` on judged pairs of texts alone: measure the LLM or reranker of a recipe, and fine-tune it on labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2llm.errors import DataError
from d2llm.metrics import classification
from d2llm.pairs import Pair
from d2llm.student import Student

from .config import Recipe
from .data import TrainingData
from .dev import gold_scores
from .examples import Example
from .finetune import Finetuning, Run, finetune
from .hub_loading import load_hub_teacher, load_uncached
from .precision import compute_dtype
from .teach import Start

AP = "AP"


class PairTeaching:
    """Measures a recipe's `llm` or `reranker` on labelled pairs by average precision, and fine-tunes it.

    Nothing is cached: a run on pairs alone learns from labels, and has no teacher.

    Raises:
        DataError: no `data.dev_pairs`, the pairs have scores in place of labels, or a stack is asked for.
        ModelError: the teacher cannot be loaded.
    """

    def __init__(
        self, recipe: Recipe, *, limit: int | None = None, start: Start | None = None, progress: bool = False
    ) -> None:
        self.recipe, self.start, self.progress = recipe, start or Start(), progress
        if self.start.on_stack:
            raise DataError("--on-stack compares the passages of a query: it needs data.folder, not pairs alone")
        data = TrainingData.load(recipe)
        if not data.labelled or not data.dev_pairs or data.dev_pairs[0].label is None:
            raise DataError("a teacher is fine-tuned and measured on labels: data.pairs and data.dev_pairs need them")
        self.dev, self.pairs = data.dev_pairs, list(chain(*data.pairs))[:limit]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_dtype(recipe.precision, self.device)
        weights = None if self.start.tuning == "full" else self.dtype
        self.hub = load_uncached(recipe.teacher, self.device, weights, head=self.start.head)

    def zero_shot(self) -> float:
        """AP of the untrained backbone's cosine on dev."""
        config = replace(self.recipe.student, tuning="frozen", start="mean", embedding_dim=None, interaction="cosine")
        student = Student.create(config).to(self.device)
        first = student.encode([pair.text_a for pair in self.dev], "query").vectors_BE
        second = student.encode([pair.text_b for pair in self.dev], "document").vectors_BE
        return _average_precision((first * second).sum(-1), self.dev)

    def measure(self) -> float:
        """AP of the teacher on dev."""
        rows = [self.hub.rows(pair.text_a, [pair.text_b], "symmetric")[0] for pair in self.dev]
        return _average_precision(self.hub.judge_rows(rows).log_odds_K, self.dev)

    def finetune(
        self,
        folder: Path,
        dev: Mapping[str, float],
        *,
        about: Mapping[str, Any] | None = None,
        imitate: Recipe | None = None,
        **settings: Any,
    ) -> None:
        """Fine-tune the teacher on labels and save it, as `Teaching.finetune` does. A step takes `batch` pairs."""
        chosen = Finetuning(**settings, tuning=self.start.tuning)
        if chosen.loss != "pointwise":
            raise DataError(f"--loss {chosen.loss} compares the passages of a query: labelled pairs need pointwise")
        self.hub.autocast = self.dtype
        imitated = None if imitate is None else load_hub_teacher(imitate.teacher, self.device, self.dtype)
        *reference, before = dev.items()
        run = Run(
            folder=folder.with_name(folder.name + ".run"),
            about=about or {},
            evaluate=self.measure,
            measure_name=AP,
            reference=dict(reference),
            before=before[1],
        )
        examples = [_example(pair) for pair in self.pairs]
        finetune(self.hub, examples, imitated=imitated, run=run, progress=self.progress, **asdict(chosen))
        run.keep(self.hub, folder)


def _example(pair: Pair) -> Example:
    """A pair as a query with one candidate."""
    yes, no = ([pair.text_b], []) if pair.label else ([], [pair.text_b])
    return Example(pair.text_a, yes, no, "symmetric")


def _average_precision(scores_N: Tensor, pairs: Sequence[Pair]) -> float:
    return classification(scores_N.numpy(), gold_scores(pairs).numpy(), threshold=0.0)[AP]
