"""Loading the hub teacher of a recipe: weights, tokenizer and prompts, fine-tuned ones included."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from d2llm.backbone import load_tokenizer
from d2llm.errors import DataError, MismatchError, ModelError
from d2llm.folder import reading
from d2llm.pretrained import load_chat_tokenizer, load_complete

from .cache import Cached, TeacherCache
from .config import TeacherConfig
from .finetune import ADAPTER, read_finetuned
from .hub_teachers import Reranker, YesNo
from .prompts import Chat, Prompts, Template, read_template

logger = logging.getLogger(__name__)

ROLE = "teacher.model"
"""What messages call the model: the key of a recipe that names it."""
REMEDY = "Choose another model, or the other of `llm` and `reranker`."


def load_hub_teacher(
    config: TeacherConfig, device: torch.device | str, dtype: torch.dtype | None
) -> YesNo | Reranker | Cached:
    """Load the teacher as `load_uncached` does, behind a cache if `config.cache` names one."""
    teacher = load_uncached(config, device, dtype)
    return teacher if config.cache is None else Cached(teacher, TeacherCache(Path(config.cache)))


def load_uncached(config: TeacherConfig, device: torch.device | str, dtype: torch.dtype | None) -> YesNo | Reranker:
    """The `llm` or `reranker` of a recipe, with weights in `dtype` (None: float32).

    `config.model` may be a folder that `save_finetuned` wrote. The teacher then has the base, template and length
    that it was fine-tuned with.

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
        config = replace(config, model=saved.base, max_length=saved.max_length, chat_template=saved.chat_template)
    template = read_template(config.template) if saved is None or saved.template is None else saved.template
    teacher = _load(kind, config, template, device, dtype)
    if saved is not None:
        logger.info("%s: fine-tuned from %s, with its template and length", folder, saved.base)
        if saved.base_digest != teacher.base_digest:
            raise MismatchError(
                f"{folder} was fine-tuned from {saved.base} with weights {saved.base_digest}, "
                f"which are {teacher.base_digest} now. Fine-tune again."
            )
        with reading(folder, ADAPTER, "Fine-tune again.") as path:
            teacher.load_adapter(path)
    return teacher


def _load(
    kind: str, config: TeacherConfig, template: Template, device: torch.device | str, dtype: torch.dtype | None
) -> YesNo | Reranker:
    name = str(config.model)
    tokenizer = load_tokenizer(name)
    if kind == "llm":  # the prompts first, so that their errors come before gigabytes are read
        prompts = Prompts(template, tokenizer, config.max_length, _chat(name) if config.chat_template else None)
        model = load_complete(AutoModelForCausalLM, name, dtype, role=ROLE, remedy=REMEDY).to(device)
        return YesNo(model, prompts, batch_tokens=config.batch_tokens, base=name)
    model = load_complete(AutoModelForSequenceClassification, name, dtype, role=ROLE, remedy=REMEDY).to(device)
    return Reranker(model, tokenizer, max_length=config.max_length, batch_tokens=config.batch_tokens, base=name)


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
