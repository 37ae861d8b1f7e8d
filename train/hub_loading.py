"""Loading the hub teacher of a recipe: weights, tokenizer and prompts, fine-tuned ones included."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from d2llm.backbone import load_tokenizer
from d2llm.errors import DataError, MismatchError, ModelError
from d2llm.folder import reading
from d2llm.pretrained import load_chat_tokenizer, load_complete, load_pretrained

from .cache import Cached, TeacherCache
from .config import TeacherConfig
from .finetune import ADAPTER, WEIGHTS, Finetuned, load_weights, read_finetuned
from .hub_teachers import Reranker, YesNo
from .on_stack import EncoderStack, OnStack
from .prompts import Chat, Prompts, Template, read_template
from .teacher import Bm25Teacher

logger = logging.getLogger(__name__)

ROLE = "teacher.model"
"""What messages call the model: the key of a recipe that names it."""
REMEDY = (
    "Choose another model, or the other of `llm` and `reranker`, or train a new head: "
    "d2llm teach --finetune FOLDER --head new."
)


def load_hub_teacher(
    config: TeacherConfig, device: torch.device | str, dtype: torch.dtype | None, words: Bm25Teacher | None = None
) -> YesNo | Reranker | Cached | OnStack:
    """Load the teacher as `load_uncached` does, behind a cache if `config.cache` names one.

    If it was fine-tuned on a stack, the stack is added to it. `words` is BM25 over the corpus, which the stack needs.

    Raises:
        DataError, ModelError, MismatchError: as `load_uncached`, or the stack cannot be restored.
    """
    teacher = load_uncached(config, device, dtype)
    judged = teacher if config.cache is None else Cached(teacher, TeacherCache(Path(config.cache)))
    saved = read_finetuned(Path(config.model or ""), teacher.kind)
    return judged if saved is None or saved.stack is None else on_saved_stack(judged, saved, device, dtype, words)


def on_saved_stack(
    teacher: YesNo | Reranker | Cached,
    saved: Finetuned,
    device: torch.device | str,
    dtype: torch.dtype | None,
    words: Bm25Teacher | None,
) -> OnStack:
    """A teacher that was fine-tuned on a stack, with that stack.

    Raises:
        DataError: `words` is missing.
        ModelError, MismatchError: the stack's encoder cannot be loaded, or has changed.
    """
    if saved.stack is None or words is None:
        raise DataError("the teacher was fine-tuned on a stack, which needs a corpus: set data.folder")
    stack = EncoderStack.restore(saved.stack, words, device, dtype)
    return OnStack(
        teacher, stack, nn.Parameter(torch.tensor(saved.stack.scale, device=device), requires_grad=saved.head == "own")
    )


def load_uncached(
    config: TeacherConfig,
    device: torch.device | str,
    dtype: torch.dtype | None,
    *,
    head: Literal["own", "new"] = "own",
) -> YesNo | Reranker:
    """The `llm` or `reranker` of a recipe, with weights in `dtype` (None: float32).

    `config.model` may be a folder that `save_finetuned` wrote. The teacher then has the base, template, length and head
    that it was fine-tuned with. `head = "new"` replaces the model's head by one that is zero, to be trained: then any
    encoder or causal LM can be a `reranker`.

    Raises:
        ModelError: the model, its adapter, tokenizer or chat template cannot be loaded, or its head is untrained.
        DataError: the template cannot be read, or an answer is not a single token.
        MismatchError: the weights have changed since the adapter was trained on them.
    """
    kind = next((name for name in ("llm", "reranker") if name in config.members), None)
    if kind is None or config.model is None:
        raise DataError(
            f"teacher.members = {list(config.members)}: none is an `llm` or `reranker` with a teacher.model"
        )
    folder = Path(config.model)
    saved = read_finetuned(folder, kind)
    if saved is not None:
        if head == "new":
            raise DataError(f"{folder} is fine-tuned and has a head that was trained: go on with --head own")
        config = replace(config, model=saved.base, max_length=saved.max_length, chat_template=saved.chat_template)
        head = saved.head
    template = read_template(config.template) if saved is None or saved.template is None else saved.template
    teacher = _load(kind, config, template, device, dtype, head)
    if saved is not None:
        logger.info("%s: fine-tuned from %s, with its template and length", folder, saved.base)
        if saved.base_digest != teacher.base_digest:
            raise MismatchError(
                f"{folder} was fine-tuned from {saved.base} with weights {saved.base_digest}, "
                f"which are {teacher.base_digest} now. Fine-tune again."
            )
        full = saved.tuning == "full"
        with reading(folder, WEIGHTS if full else ADAPTER, "Fine-tune again.") as path:
            load_weights(teacher, path) if full else teacher.load_adapter(path)
    return teacher


def _load(
    kind: str,
    config: TeacherConfig,
    template: Template,
    device: torch.device | str,
    dtype: torch.dtype | None,
    head: Literal["own", "new"],
) -> YesNo | Reranker:
    name = str(config.model)
    teacher: YesNo | Reranker
    tokenizer = load_tokenizer(name)
    if kind == "llm":  # the prompts first, so that their errors come before gigabytes are read
        prompts = Prompts(template, tokenizer, config.max_length, _chat(name) if config.chat_template else None)
        model = load_complete(AutoModelForCausalLM, name, dtype, role=ROLE, remedy=REMEDY).to(device)
        teacher = YesNo(model, prompts, batch_tokens=config.batch_tokens, base=name)
    else:
        if head == "new":
            model = _with_new_head(name, dtype).to(device)
        else:
            model = load_complete(AutoModelForSequenceClassification, name, dtype, role=ROLE, remedy=REMEDY).to(device)
        limits = {"max_length": config.max_length, "batch_tokens": config.batch_tokens}
        teacher = Reranker(model, tokenizer, **limits, base=name)
    if head == "new":
        teacher.start_anew()
    return teacher


@torch.no_grad()
def _with_new_head(name: str, dtype: torch.dtype | None) -> nn.Module:
    """A reranker whose layers over the backbone may be new: small random numbers, the same ones in each load.

    Raises:
        ModelError: the model cannot be loaded, or its backbone lacks weights; names them.
    """
    options = {"num_labels": 1, "ignore_mismatched_sizes": True}
    model, missing = load_pretrained(AutoModelForSequenceClassification, name, dtype, role=ROLE, **options)
    within = f"{model.base_model_prefix}."
    if lost := sorted(key for key in missing if key.startswith(within) and ".pooler." not in key):
        raise ModelError(f"{ROLE} {name!r} has no weights for {', '.join(lost[:3])} ({len(lost)} missing)")
    generator = torch.Generator().manual_seed(0)
    for key, value in sorted(model.named_parameters()):
        if key in missing:  # norms are 1, and biases 0
            vector = torch.full(value.shape, float(key.endswith("weight")))
            value.copy_(0.02 * torch.randn(value.shape, generator=generator) if value.ndim > 1 else vector)
    made: nn.Module = model
    return made


def _chat(name: str) -> Chat:
    """The chat template of a tokenizer."""
    tokenizer = load_chat_tokenizer(name, role=ROLE)
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of teacher.model {name!r} has no chat template: set chat_template = false")

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:  # Gemma's, for example, has no system turn
            raise ModelError(f"the chat template of teacher.model {name!r} refuses the prompt: {error}") from error

    return render
