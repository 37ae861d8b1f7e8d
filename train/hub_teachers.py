"""Cross-encoders of the hub as teachers: an LLM that answers yes or no, and rerankers.

They read query and passage together. `hub_loading` makes them from a recipe, `finetune` trains them.

B pairs in a batch, K candidates of a query, L tokens, R answer tokens, T width of a pair's features.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from d2llm.backbone import Backbone, load_adapters, pad, positions
from d2llm.errors import DataError, ModelError
from d2llm.pretrained import absolute
from d2llm.saved import sampled_digest
from d2llm.tokens import batches_of
from d2llm.types import TASKS, Task, task_id

from .precision import autocast
from .prompts import Prompts
from .teacher import Judgement


@dataclass(slots=True)
class Spent:
    """The cost of judging: passages judged, tokens without padding, and seconds of wall clock."""

    judged: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def since(self, before: Spent) -> Spent:
        """What was spent after `before`."""
        return Spent(self.judged - before.judged, self.tokens - before.tokens, self.seconds - before.seconds)


class Row(NamedTuple):
    """A query with one passage: token ids, the segment of each token (rerankers only), and the index of the task."""

    ids: list[int]
    segments: list[int]
    task: int


class HubTeacher(ABC):
    """What LLM and reranker share: batching, judging, and what fine-tuning changes."""

    kind: ClassVar[str]

    def __init__(self, model: Backbone, *, max_length: int, batch_tokens: int, base: str = "") -> None:
        self.model, self.max_length, self.batch_tokens, self.base = model.eval(), max_length, batch_tokens, base
        self.model.requires_grad_(False)
        self.base_digest = sampled_digest(model.named_parameters())
        self.adapter: Backbone | None = None
        self.head: Literal["own", "new"] = "own"
        self.tuned_in_full = False
        self.autocast: torch.dtype | None = None
        """The dtype to compute in where it is not that of the weights: full tuning keeps weights in float32."""
        self.spent = Spent()
        self._identity: str | None = None
        limit = positions(model) or getattr(model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and limit < max_length:
            raise ModelError(f"{base or self.kind} reads {limit} tokens at most, teacher.max_length is {max_length}")

    @abstractmethod
    def rows(self, query: str, candidates: Sequence[str], task: Task) -> list[Row]:
        """The query with each candidate as token ids, within `max_length`."""

    @abstractmethod
    def forward(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        """Log-odds [B] float32 of a padded batch, and features [B, T] or None."""

    @abstractmethod
    def _head(self) -> nn.Module:
        """The last linear layer."""

    @abstractmethod
    def _reading(self) -> Any:
        """Everything but the weights that the log-odds depend on, as plain values."""

    @property
    def identity(self) -> str:
        """A name made from weights, adapter, prompt and length, but not from path or dtype.

        Of each tensor it takes the name, the shape and a sample of values. Two teachers with the same identity give the
        same judgements up to rounding.
        """
        if self._identity is None:
            content = json.dumps([sampled_digest(self.model.named_parameters()), self.max_length, self._reading()])
            self._identity = f"{self.kind} {hashlib.sha256(content.encode()).hexdigest()[:32]}"
        return self._identity

    @torch.inference_mode()
    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """Log-odds [K] float32 and features [K, T] float16, on the CPU.

        Raises:
            DataError: the query leaves no room for a passage.
            ModelError: a log-odds or feature is not finite.
        """
        rows = self.rows(query, candidates, task)
        judgement = self.judge_rows(rows)
        if not all(part is None or part.isfinite().all() for part in judgement):
            raise ModelError(f"{self.base or self.kind}: log-odds or features of {query!r} are not finite: use fp32")
        return judgement

    @torch.inference_mode()
    def judge_rows(self, rows: Sequence[Row]) -> Judgement:
        """Log-odds [K] float32 and features [K, T] float16 of K rows, on the CPU. They may be of several queries."""
        began = time.perf_counter()
        log_odds_K = torch.zeros(len(rows))
        features: dict[int, Tensor] = {}
        for group in batches_of([len(row.ids) for row in rows], self.batch_tokens):
            log_odds_B, features_BT = self.forward([rows[index] for index in group])
            log_odds_K[group] = log_odds_B.cpu()
            if features_BT is not None:
                features |= zip(group, features_BT.half().cpu(), strict=True)
        features_KT = torch.stack([features[index] for index in range(len(rows))]) if features else None
        self.spent.judged += len(rows)
        self.spent.tokens += sum(len(row.ids) for row in rows)
        self.spent.seconds += time.perf_counter() - began
        return Judgement(log_odds_K, features_KT)

    def _computing(self) -> torch.autocast:
        return autocast(next(self.model.parameters()).device, self.autocast)

    def _pad(self, rows: Sequence[Row], side: str) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        ids_BL, mask_BL = pad([row.ids for row in rows], device, side)
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    def load_adapter(self, folder: Path) -> None:
        """Put the LoRA adapter of a peft folder onto the weights. Fine-tuning continues with it.

        Raises:
            ModelError: the adapter is damaged or does not fit.
        """
        self.adapter = load_adapters(self.model, folder)
        self.model.eval()
        self.weights_changed()

    @torch.no_grad()
    def start_anew(self) -> None:
        """Put a new head in the place of the model's: it is zero, and so are all log-odds until it is trained."""
        for parameter in self._head().parameters():
            parameter.zero_()
        self.head = "new"
        self.weights_changed()

    @property
    def head_name(self) -> str:
        """The name of the module that holds the head, at the top of the model."""
        head = self._head()
        names: list[str] = [name for name, module in self.model.named_modules() if module is head]
        return names[0].partition(".")[0]

    def weights_changed(self) -> None:
        """Forget `identity`: the teacher says something else now."""
        self._identity = None

    def settings(self) -> dict[str, Any]:
        """What `hub_loading` needs beside the adapter to make this teacher again."""
        return {
            "kind": self.kind,
            "base": absolute(self.base),
            "base_digest": self.base_digest,
            "max_length": self.max_length,
            "head": self.head,
            "tuning": "full" if self.tuned_in_full else "lora",
        }

    @contextlib.contextmanager
    def _seen_by_head(self) -> Iterator[list[Tensor]]:
        """Collect the inputs of the last linear layer."""
        seen: list[Tensor] = []
        handle = self._head().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            handle.remove()


class YesNo(HubTeacher):
    """A causal LM that is asked whether the passage answers the query (paper section 3.1).

    The log-odds are `logit(yes) - logit(no)` after the answer cue. The features are the last hidden state of the last
    token, the input of the LM head. Of the LM head only the rows of the answers are kept.
    """

    kind = "llm"

    def __init__(self, model: Backbone, prompts: Prompts, *, batch_tokens: int = 16384, base: str = "") -> None:
        super().__init__(model, max_length=prompts.max_length, batch_tokens=batch_tokens, base=base)
        self.prompts = prompts
        answers = torch.tensor([prompts.answers[task] for task in TASKS]).flatten()  # R: yes and no of each task
        full: Any = model.get_output_embeddings()
        with torch.no_grad():
            head = HeadInFloat(full.in_features, len(answers), bias=full.bias is not None, device=full.weight.device)
            head.weight.copy_(full.weight[answers])
            if full.bias is not None:
                head.bias.copy_(full.bias[answers])
        # It replaces the LM head, so that scales and soft caps that a model applies to its logits still apply.
        model.set_output_embeddings(head.requires_grad_(False))
        self._positions = "position_ids" in inspect.signature(model.forward).parameters

    def rows(self, query: str, candidates: Sequence[str], task: Task) -> list[Row]:
        """The whole prompt of each pair as token ids; the passage is cut to keep it within `max_length`."""
        return [Row(ids, [], task_id(task)) for ids in self.prompts.ids(query, candidates, task)]

    def forward(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        """Log-odds [B], yes against no, and the last hidden states [B, T]."""
        inputs = self._pad(rows, "left")
        if self._positions:  # counted from the first token that is no padding
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with self._seen_by_head() as seen, self._computing():
            logits_BR = self.model(**inputs, use_cache=False).logits[:, -1].float()
        task_B = torch.tensor([row.task for row in rows], device=logits_BR.device)
        yes_no_B2 = logits_BR.view(len(rows), len(TASKS), 2)[torch.arange(len(rows)), task_B]
        return yes_no_B2[:, 0] - yes_no_B2[:, 1], seen[0][:, -1]

    def _head(self) -> nn.Module:
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def _reading(self) -> Any:
        # The rendered prompts, a sample of how the tokenizer reads them, and the answers.
        probes = [self.prompts.ids("a query", ["a passage"], task) for task in TASKS]
        return [self.prompts.texts, probes, self.prompts.answers]

    def settings(self) -> dict[str, Any]:
        """As of every hub teacher, and its prompt."""
        prompt = {"template": asdict(self.prompts.template), "chat_template": self.prompts.chat is not None}
        return {**super().settings(), **prompt}


class Reranker(HubTeacher):
    """A sequence classifier over query and passage, with one label, or with two of which the second is "relevant".

    The log-odds are the logit of the one label, or logit(relevant) - logit(not relevant). The features are the input of
    the last layer.
    """

    kind = "reranker"

    def __init__(
        self, model: Backbone, tokenizer: Tokenizer, *, max_length: int, batch_tokens: int = 16384, base: str = ""
    ) -> None:
        super().__init__(model, max_length=max_length, batch_tokens=batch_tokens, base=base)
        self.tokenizer = tokenizer
        config: Any = model.config
        self.labels = int(config.num_labels)
        if self.labels not in (1, 2):
            raise ModelError(f"{base or 'the reranker'} has {self.labels} labels: expected one, or two (no, yes)")
        if config.pad_token_id is None:  # decoders find the last token by it, RoBERTa counts positions by it
            raise ModelError(f"{base or 'the reranker'}: its config.json has no pad_token_id, which batches need")
        self.padding = int(config.pad_token_id)
        self._segments = getattr(config, "type_vocab_size", 0) > 1
        self._head().float().__class__ = HeadInFloat

    def rows(self, query: str, candidates: Sequence[str], task: Task) -> list[Row]:
        """Both texts of each pair as token ids; the passage is cut to keep them within `max_length`."""
        rows = []
        for encoding in self.tokenizer.encode_batch([(query, passage) for passage in candidates]):
            passage = [index for index, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
            excess = max(0, len(encoding.ids) - self.max_length)
            if excess and excess >= len(passage):
                raise DataError(
                    f"the query alone is {len(encoding.ids) - len(passage)} tokens, which leaves no room for the "
                    f"passage within teacher.max_length = {self.max_length}: raise it, or shorten {query[:80]!r}"
                )
            cut = set(passage[len(passage) - excess :])
            kept = [index for index in range(len(encoding.ids)) if index not in cut]
            ids, segments = ([values[index] for index in kept] for values in (encoding.ids, encoding.type_ids))
            rows.append(Row(ids, segments, task_id(task)))
        return rows

    def forward(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        """Log-odds [B], and the inputs of the last layer [B, T] (None of a decoder)."""
        inputs = self._pad(rows, "right")
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, self.padding)
        if self._segments:
            inputs["token_type_ids"], _ = pad([row.segments for row in rows], inputs["input_ids"].device)
        with self._seen_by_head() as seen, self._computing():
            logits_BR = self.model(**inputs).logits.float()
        log_odds_B = logits_BR[:, -1] if self.labels == 1 else logits_BR[:, 1] - logits_BR[:, 0]
        return log_odds_B, seen[0] if seen[0].ndim == 2 else None  # decoders apply their head to every token

    def _head(self) -> nn.Module:
        # The last one: peft keeps an untrained copy of the head before it.
        return [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == self.labels][-1]

    def _reading(self) -> Any:
        return self.rows("a query", ["a passage"], "asymmetric")


class HeadInFloat(nn.Linear):
    """A last layer that computes in float32. In bfloat16, logits closer than 0.4 % would tie."""

    def forward(self, input: Tensor) -> Tensor:
        """The product [..., R] of the states [..., D] and the weights."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())
