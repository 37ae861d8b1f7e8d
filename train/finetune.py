"""Fine-tuning of a hub teacher on labels with LoRA (the paper's LLM-ce-ft), and the folder that keeps it.

Q queries in a group, K candidates of a query (the positive first), B = Q K pairs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from d2llm.errors import DataError, ModelError
from d2llm.files import new_folder
from d2llm.settings import Count, build
from d2llm.types import TASKS

from .examples import Example
from .hub_teachers import HubTeacher, Row, groups_within
from .losses import DivergedError
from .prompts import Prompt, Template
from .schedule import learning_rate

TEACHER, ADAPTER = "teacher.json", "adapter"
LORA_RANK = 16


def finetune(
    teacher: HubTeacher,
    examples: Sequence[Example],
    *,
    steps: int,
    batch: int = 8,
    negatives: int = 7,
    lr: float = 1e-4,
    checkpointing: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Fine-tune LoRA adapters of `teacher` on labels. Gives the loss of each step.

    The loss is listwise cross-entropy over the log-odds of a positive and `negatives` of its negatives; the paper does
    not print its own recipe. A step takes `batch` queries, in as many passes as the teacher's `batch_tokens` asks for.
    `checkpointing` recomputes activations to save memory, and changes no result.

    Raises:
        DataError: no example has that many negatives.
        DivergedError: a loss is not finite.
    """
    enough = with_negatives(examples, negatives)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    if teacher.adapter is None:
        teacher.adapter = _new_adapter(teacher)
    model: Any = teacher.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    teacher.weights_changed()
    losses = []
    for step in tqdm(range(steps), desc="fine-tuning", unit="step", disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, steps)
        lists = [
            teacher.rows(e.query, [rng.choice(e.positives), *rng.sample(e.negatives, negatives)], e.task)
            for e in rng.sample(enough, min(batch, len(enough)))
        ]
        losses.append(_backward(teacher, lists))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    if checkpointing:
        model.gradient_checkpointing_disable()
    return losses


def with_negatives(examples: Sequence[Example], negatives: int) -> list[Example]:
    """The examples that a teacher can be fine-tuned on.

    Raises:
        DataError: no example has that many negatives.
    """
    enough = [example for example in examples if len(example.negatives) >= negatives]
    if not enough:
        raise DataError(f"no query has {negatives} negatives to be set against its positive: ask for fewer")
    return enough


def _new_adapter(teacher: HubTeacher) -> nn.Module:
    """LoRA on all linear layers of the teacher's model, which is changed in place."""
    from peft import LoraConfig, get_peft_model

    task_type = "SEQ_CLS" if teacher.kind == "reranker" else None  # its head is trained whole and saved too
    settings = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type=task_type)
    adapter: nn.Module = get_peft_model(teacher.model, settings)
    return adapter


def _backward(teacher: HubTeacher, lists: Sequence[list[Row]]) -> float:
    """Add the gradients of several queries' lists, each with its positive first. Gives the mean loss."""
    total = 0.0
    sizes = [len(rows) * max(len(row.ids) for row in rows) for rows in lists]
    for group in groups_within(sizes, teacher.batch_tokens):
        log_odds_B, _ = teacher.forward([row for index in group for row in lists[index]])
        log_odds_QK = log_odds_B.view(len(group), -1)
        first_Q = torch.zeros(len(group), dtype=torch.long, device=log_odds_QK.device)
        loss = F.cross_entropy(log_odds_QK, first_Q) * (len(group) / len(lists))
        if not torch.isfinite(loss):
            raise DivergedError(f"the loss is {loss.item()}: lower the learning rate or use fp32")
        loss.backward()
        total += loss.item()
    return total


def save_finetuned(teacher: HubTeacher, folder: Path) -> None:
    """Write a fine-tuned teacher into `folder`, whole or not at all: its adapter, and `teacher.json` with the rest.

    Raises:
        ModelError: `folder` exists and is not empty, or the teacher was not fine-tuned.
    """
    if teacher.adapter is None:
        raise ModelError(f"{teacher.base or teacher.kind} was not fine-tuned: there is nothing to save")
    with new_folder(folder) as staging:
        teacher.adapter.save_pretrained(staging / ADAPTER)
        content = json.dumps(teacher.settings(), indent=2, ensure_ascii=False)
        (staging / TEACHER).write_text(content + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuned:
    """The content of `teacher.json`."""

    kind: str
    base: str
    base_digest: str
    max_length: Count
    template: Template | None = None
    chat_template: bool = False


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
        saved = build(Finetuned, content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is damaged ({error}). Fine-tune again.") from error
    if saved.kind != kind:
        raise ModelError(f"{folder} is a fine-tuned `{saved.kind}`: name that in teacher.members in place of `{kind}`")
    return saved
