"""Fine-tuning of a generator on queries that people wrote: `d2llm generate --finetune`.

B pairs of a passage and a query, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from d2llm.backbone import pad
from d2llm.errors import ArgumentError, DataError
from d2llm.files import new_folder, require_new
from d2llm.settings import Count, Positive, Seed, check_fields

from .checkpoint import Checkpoint
from .examples import Example
from .generator import CausalGenerator, FineTuning, Generator, load_generator, read_fine_tuning, save_generator
from .loop import Loop, Losses, make_optimizer
from .precision import autocast, compute_dtype
from .run_log import RunLog
from .schedule import Batches
from .styles import Style, cue

IGNORED = -100
"""The label of tokens that are read and not learned, in transformers."""
SAVE_EVERY = 25


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorTuning:
    """The settings of the fine-tuning of a generator.

    Raises:
        ArgumentError: a value is out of range.
    """

    steps: Count = 300
    """Training steps."""
    batch: Count = 16
    """Pairs in one step."""
    lr: Positive = 3e-4
    """Peak learning rate of the LoRA adapters."""
    rank: Count = 16
    """Rank of the LoRA adapters."""
    style: Style = "question"
    """The style of the queries."""
    seed: Seed = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check_fields(self)


class Pair(NamedTuple):
    """A passage, and a query that somebody wrote for it."""

    passage: str
    query: str


@dataclass(frozen=True, slots=True)
class GeneratorStage:
    """The generator learns to continue a passage with its query."""

    generator: CausalGenerator
    pairs: list[Pair]
    settings: GeneratorTuning
    batches: Batches

    name: ClassVar[str] = "generator"

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.settings.steps

    def losses(self, step: int) -> Losses:
        """The cross-entropy of the queries' tokens."""
        read, written = [], []
        for passage, query in self.batches.at(self.pairs, self.settings.batch, step):
            read.append([*self.generator.start, *self.generator.passage_ids(passage)])
            written.append(self.generator.ids(f"{cue(self.settings.style)} {query}\n"))
        device = self.generator.model.device
        ids_BL, mask_BL = pad([before + after for before, after in zip(read, written, strict=True)], device)
        labels_BL = ids_BL.masked_fill(mask_BL == 0, IGNORED)
        for row, before in enumerate(read):
            labels_BL[row, : len(before)] = IGNORED
        with autocast(device, compute_dtype("auto", device)):
            loss: torch.Tensor = self.generator.model(
                input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL, use_cache=False
            ).loss
        return {"query": loss}

    def measure(self, done: int) -> None:
        """Nothing is measured: the queries that it writes are judged by a teacher."""


def finetune_generator(
    generator: Generator,
    examples: Sequence[Example],
    out: Path,
    *,
    settings: GeneratorTuning | None = None,
    progress: bool = False,
) -> CausalGenerator:
    """Fine-tune a causal language model on queries and their positives by LoRA, and save it to the new folder `out`.

    The folder is one of transformers, with the adapters merged. The run lives in `OUT.run` until it is done, and
    continues there after a kill, with the same result. The generator is changed in place and returned. If `out` is the
    result of such a call, it is loaded and returned.

    Raises:
        ArgumentError: the generator is an encoder-decoder.
        DataError: there are no examples, or `OUT.run` belongs to another run.
        OutputExistsError: `out` exists and is not an empty folder.
        DivergedError: a loss is not finite.
    """
    if not isinstance(generator, CausalGenerator):
        raise ArgumentError("only a causal language model can be fine-tuned: this generator is an encoder-decoder")
    pairs = [Pair(passage, example.query) for example in examples for passage in example.positives]
    if not pairs:
        raise DataError("there are no queries with a passage to fine-tune the generator on")
    settings = settings or GeneratorTuning()
    chosen = {name: getattr(settings, name) for name in GeneratorTuning.__slots__}
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:32]
    facts = FineTuning(settings.style, {**chosen, "pairs": digest, "generator": generator.identity})
    if read_fine_tuning(out) == facts:
        kept = load_generator(str(out), generator.model.device)
        assert isinstance(kept, CausalGenerator)
        return kept
    require_new(out)
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)
    lora = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
    adapted: Any = get_peft_model(generator.model, lora)
    generator.model = adapted
    folder = out.with_name(out.name + ".run")
    checkpoint, run_log = Checkpoint(folder, facts.about), RunLog(folder, stages=("generator",))
    loop = Loop(adapted, Accelerator(), checkpoint, run_log, settings.seed, SAVE_EVERY, progress=progress)
    loop.run(GeneratorStage(generator, pairs, settings, loop.batches), make_optimizer(adapted, {"": settings.lr}))
    run_log.close()
    generator.model = adapted.merge_and_unload().eval()
    generator.learned = facts.learned
    with new_folder(out) as staging:
        save_generator(generator, facts, staging)
    checkpoint.remove()
    return generator
