"""Fine-tuning of a hub teacher on labels (the paper's LLM-ce-ft) or on another teacher, and the folder that keeps it.

B pairs in a batch, K candidates of a query.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from d2llm.backbone import require_same
from d2llm.errors import DataError, ModelError
from d2llm.files import new_folder
from d2llm.settings import Count, Positive, Seed, build, check_fields
from d2llm.tokens import batches_of
from d2llm.types import TASKS

from .checkpoint import Checkpoint
from .examples import Example
from .hub_teachers import HubTeacher
from .on_stack import OnStack, SavedStack, own_weights
from .prompts import Prompt, Template
from .ranking import FINE_TUNING, CandidateList, Drawn, Pace, RankingLoss, RankingStage, learn
from .run_log import CURVES, LOG, RunLog, draw_curves, read_log
from .schedule import Batches
from .teacher import Teacher

TEACHER, ADAPTER, WEIGHTS = "teacher.json", "adapter", "weights.safetensors"
LORA_RANK = 16
SCALE_LR = 1e-2
"""Learning rate of the scale of a model's own log-odds on a stack. The scale starts at 0 and has to come near 1."""

Tuning: TypeAlias = Literal["lora", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuning:
    """What decides a fine-tuning, beside its data and its teacher.

    Raises:
        ArgumentError: a value has the wrong type or is out of range; names the field.
    """

    steps: Count
    batch: Count = 8
    """Lists in one step."""
    negatives: Count = 7
    """At most this many negatives of a list are in one step."""
    lr: Positive = 1e-4
    loss: RankingLoss = "listwise"
    tuning: Tuning = "lora"
    checkpointing: bool = False
    """Recompute activations to save memory. It changes no result."""
    eval_every: Count = 100
    save_every: Count = 100
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Run:
    """Where a fine-tuning lives on the disk until it is done, and how it is measured."""

    folder: Path | None = None
    """The folder of checkpoint, log and curves. None keeps nothing."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """All that decides the run, as plain values. A run in `folder` that has others is not continued."""
    evaluate: Callable[[], float] | None = None
    """Measures the teacher on dev. None keeps the last state, not the best."""
    measure_name: str = "nDCG@10"
    reference: Mapping[str, float] = field(default_factory=dict)
    """Other figures on dev, which the curves show as level lines."""
    before: float | None = None
    """The teacher's figure before the first step, if it is known."""

    def keep(self, teacher: HubTeacher | OnStack, folder: Path) -> None:
        """Save the teacher into `folder` with log and curves, and remove the run: it is done.

        Raises:
            ModelError: as `save_finetuned`.
        """
        assert self.folder is not None
        beside = [self.folder / LOG, self.folder / CURVES]
        save_finetuned(teacher, folder, provenance={"about": self.about}, beside=beside)
        shutil.rmtree(self.folder, ignore_errors=True)


class _Trained(nn.Module):
    """What is trained of a teacher: weights of its model, and the scale of its log-odds on a stack."""

    def __init__(self, teacher: HubTeacher, scale: nn.Parameter | None) -> None:
        super().__init__()
        self.model, self.scale = teacher.model, scale
        self.teacher, self.pace = teacher, Pace()

    def passes(self, lists: Sequence[Drawn]) -> Iterator[tuple[list[int], Sequence[Tensor]]]:
        """The log-odds of several lists, in as many passes as the teacher's `batch_tokens` asks for."""
        rows = [self.teacher.rows(drawn.query, drawn.texts, drawn.task) for drawn in lists]
        sizes = [len(of_list) * max(len(row.ids) for row in of_list) for of_list in rows]
        self.pace.tokens += sum(len(row.ids) for of_list in rows for row in of_list)
        for group in batches_of(sizes, self.teacher.batch_tokens):
            log_odds_B, _ = self.teacher.forward([row for index in group for row in rows[index]])
            if self.scale is not None:
                log_odds_B = self.scale * log_odds_B
            yield group, log_odds_B.split([len(rows[index]) for index in group])


def finetune(
    teacher: HubTeacher | OnStack,
    examples: Sequence[Example],
    *,
    imitated: Teacher | None = None,
    run: Run | None = None,
    progress: bool = False,
    **settings: Any,
) -> list[float]:
    """Fine-tune `teacher` on the labels of `examples`, or on the judgements of the teacher `imitated`.

    Gives the loss of each step that was done. `settings` are the fields of `Finetuning`; `steps` is required. The
    paper does not print its own recipe. A step takes one positive and some negatives of `batch` queries, in as many
    passes as the teacher's `batch_tokens` asks for. An `OnStack` must hold its cross-encoder without a cache.

    With a `run`, the state that is best on dev is kept, and a run that was killed goes on from its last checkpoint,
    with the result that it would have had.

    Raises:
        DataError: no example has that many negatives, or `run.folder` holds another run.
        DivergedError: a loss is not finite.
        ArgumentError: a value of `settings` is out of range.
    """
    chosen, run = Finetuning(**settings), run or Run()
    hub = teacher.teacher if isinstance(teacher, OnStack) else teacher
    assert isinstance(hub, HubTeacher), "the cross-encoder is behind a cache"
    checkpoint = Checkpoint(run.folder, run.about)
    checkpoint.add_digest("teacher", own_weights(teacher))
    checkpoint.add_digest("imitated", "" if imitated is None else own_weights(imitated))
    lists = _lists(teacher, with_negatives(examples, chosen.negatives), imitated, progress=progress)
    torch.manual_seed(chosen.seed)
    _make_trainable(hub, chosen.tuning)
    hub.weights_changed()
    trained = _Trained(hub, teacher.scale if isinstance(teacher, OnStack) else None)
    run_log = RunLog(run.folder, stages=[FINE_TUNING])
    stage = RankingStage(
        lists=lists,
        passes=trained.passes,
        steps=chosen.steps,
        batch=chosen.batch,
        negatives=chosen.negatives,
        loss=chosen.loss,
        batches=Batches(chosen.seed),
        run_log=run_log,
        evaluate=None if run.evaluate is None else _between_steps(trained, run.evaluate),
        measure_name=run.measure_name,
        before=run.before,
        eval_every=chosen.eval_every,
        pace=trained.pace,
    )
    if chosen.checkpointing:
        hub.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    learn(
        trained, stage, chosen.lr, scale_lr=SCALE_LR, checkpoint=checkpoint, save_every=chosen.save_every,
        seed=chosen.seed, progress=progress,
    )  # fmt: skip
    if chosen.checkpointing:
        hub.model.gradient_checkpointing_disable()
    hub.weights_changed()
    run_log.close()
    if run.folder is not None:
        draw_curves(read_log(run.folder / LOG), run.reference, run.folder / CURVES, [FINE_TUNING])
    return stage.values


def with_negatives(examples: Sequence[Example], negatives: int) -> list[Example]:
    """The examples that a teacher can be fine-tuned on: those with a negative. Of labelled pairs, all.

    Raises:
        DataError: no example has that many negatives, and they are no pairs.
    """
    if not all(example.positives for example in examples):
        return list(examples)
    if max((len(example.negatives) for example in examples), default=0) < negatives:
        raise DataError(f"no query has {negatives} negatives to be set against its positive: ask for fewer")
    return [example for example in examples if example.negatives]


def _lists(
    teacher: HubTeacher | OnStack, examples: Sequence[Example], imitated: Teacher | None, *, progress: bool
) -> list[CandidateList]:
    """What is to be learned of each example, and the log-odds that the teacher's own are added to.

    All of it is computed before the first step, so that a resumed run has the same numbers.
    """
    lists = [CandidateList.labelled(example) for example in examples]
    if isinstance(teacher, OnStack):
        lists = [
            replace(x, base_K=teacher.stack.judge(x.example.query, x.texts, x.example.task).log_odds_K)
            for x in tqdm(lists, desc="stack", unit="query", disable=not progress)
        ]
    if imitated is not None:
        lists = [
            replace(x, target_K=imitated.judge(x.example.query, x.texts, x.example.task).log_odds_K)
            for x in tqdm(lists, desc="imitated teacher", unit="query", disable=not progress)
        ]
    return lists


def _between_steps(model: nn.Module, evaluate: Callable[[], float]) -> Callable[[], float]:
    """`evaluate` without dropout."""

    def measured() -> float:
        model.eval()
        value = evaluate()
        model.train()
        return value

    return measured


def _make_trainable(teacher: HubTeacher, tuning: Tuning) -> None:
    """Let all weights learn, or LoRA on all linear layers. The teacher's model is changed in place.

    Raises:
        ModelError: the teacher was fine-tuned before in the other way.
    """
    if tuning == "full":
        if teacher.adapter is not None:
            raise ModelError(f"{teacher.base} was fine-tuned with LoRA: go on with --tuning lora")
        teacher.model.float().requires_grad_(True)
        teacher.tuned_in_full = True
        return
    if teacher.tuned_in_full:
        raise ModelError(f"{teacher.base} was fine-tuned in full: go on with --tuning full")
    if teacher.adapter is None:
        from peft import LoraConfig, get_peft_model

        # A classifier's head is trained whole and saved too, and so is a new one.
        task_type = "SEQ_CLS" if teacher.kind == "reranker" else None
        whole = [teacher.head_name] if teacher.head == "new" else None
        settings = LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type=task_type,
            modules_to_save=whole,
        )  # fmt: skip
        teacher.adapter = get_peft_model(teacher.model, settings)


def save_finetuned(
    teacher: HubTeacher | OnStack,
    folder: Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    beside: Sequence[Path] = (),
) -> None:
    """Write a fine-tuned teacher into `folder`, whole or not at all.

    The folder holds its LoRA adapter or all its weights, and `teacher.json` with the rest, the stack included. `beside`
    are files to copy into it.

    Raises:
        ModelError: `folder` exists and is not empty, or the teacher was not fine-tuned.
    """
    hub = teacher.teacher if isinstance(teacher, OnStack) else teacher
    assert isinstance(hub, HubTeacher), "the cross-encoder is behind a cache"
    if hub.adapter is None and not hub.tuned_in_full:
        raise ModelError(f"{hub.base or hub.kind} was not fine-tuned: there is nothing to save")
    settings = {**hub.settings(), "provenance": dict(provenance or {})}
    if isinstance(teacher, OnStack):
        settings["stack"] = teacher.settings()
    with new_folder(folder) as staging:
        if hub.adapter is not None:
            hub.adapter.save_pretrained(staging / ADAPTER)
        else:
            weights = {name: value.detach().cpu().contiguous() for name, value in hub.model.named_parameters()}
            save_file(weights, staging / WEIGHTS)
        content = json.dumps(settings, indent=2, ensure_ascii=False)
        (staging / TEACHER).write_text(content + "\n", encoding="utf-8")
        for path in beside:
            shutil.copy(path, staging)


@torch.no_grad()
def load_weights(teacher: HubTeacher, path: Path) -> None:
    """Put the weights of a teacher that was tuned in full into its model, in the dtype that the model has.

    Raises:
        ValueError: the file lacks a weight or has an unknown one; names it. A damaged file raises safetensors' errors.
    """
    weights, parameters = load_file(path), dict(teacher.model.named_parameters())
    require_same(weights.keys(), parameters.keys())
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    teacher.tuned_in_full = True
    teacher.weights_changed()


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuned:
    """The content of `teacher.json`."""

    kind: str
    base: str
    base_digest: str
    max_length: Count
    template: Template | None = None
    chat_template: bool = False
    head: Literal["own", "new"] = "own"
    """`new` if the model's head was replaced by one that started at zero."""
    tuning: Tuning = "lora"
    stack: SavedStack | None = None
    """The stack that the log-odds are added to."""
    provenance: dict[str, Any] = field(default_factory=dict)


def is_result_of(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether `folder` is what a fine-tuning by `about` wrote."""
    path = folder / TEACHER
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["provenance"]["about"]
    except (ValueError, KeyError, TypeError):
        return False
    return bool(found == json.loads(json.dumps(about)))


def read_finetuned(folder: Path, kind: str) -> Finetuned | None:
    """What `save_finetuned` wrote into `folder`; None if `folder` is something else, such as a hub id.

    Raises:
        ModelError: the file is damaged, or the teacher is of another kind.
    """
    path = folder / TEACHER
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if template := content.get("template"):
            prompts = {task: Prompt(**template[task]) for task in TASKS}
            content["template"] = Template(**{**template, **prompts})
        if stack := content.get("stack"):
            content["stack"] = build(SavedStack, stack)
        saved = build(Finetuned, content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is damaged ({error}). Fine-tune again.") from error
    if saved.kind != kind:
        raise ModelError(f"{folder} is a fine-tuned `{saved.kind}`: name that in teacher.members in place of `{kind}`")
    return saved
