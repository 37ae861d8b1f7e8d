"""Teachers of the hub, which read query and passage together: an LLM asked yes or no, and rerankers.

B pairs in a batch, K candidates of a query, Q queries, L tokens, R answer tokens, T width of a pair's features.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from d2llm.backbone import load_adapters, load_tokenizer, pad, positions
from d2llm.errors import DataError, MismatchError, ModelError
from d2llm.files import new_folder
from d2llm.folder import reading
from d2llm.settings import Count, build
from d2llm.types import TASKS, Task, task_id

from .cache import Cached, TeacherCache
from .config import TeacherConfig
from .examples import Example
from .losses import DivergedError
from .prompts import Chat, Prompt, Prompts, Template, read_template
from .teacher import Judgement

logger = logging.getLogger(__name__)

TEACHER, ADAPTER = "teacher.json", "adapter"
LORA_RANK = 16


@dataclass(slots=True)
class Spent:
    """What judging has cost so far: `tokens` without padding, `seconds` of wall clock."""

    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0


class _Row(NamedTuple):
    """One pair as token ids, the segment of each (rerankers), and the task's index."""

    ids: list[int]
    segments: list[int]
    task: int


class _CrossEncoder(ABC):
    """What LLM and reranker share: batching, fine-tuning, saving."""

    kind: ClassVar[str]

    def __init__(self, model: nn.Module, *, max_length: int, batch_tokens: int, base: str = "") -> None:
        self.model, self.max_length, self.batch_tokens, self.base = model.eval(), max_length, batch_tokens, base
        self.model.requires_grad_(False)
        self.base_digest = weights_digest(model)
        self.adapter: nn.Module | None = None
        self.spent = Spent()
        self._identity: str | None = None
        limit = positions(model) or getattr(model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and limit < max_length:
            raise ModelError(f"{base or self.kind} reads {limit} tokens at most, teacher.max_length is {max_length}")

    # -- what the kinds differ in --------------------------------------------------------------------------------

    @abstractmethod
    def _rows(self, query: str, candidates: Sequence[str], task: Task) -> list[_Row]:
        """Token ids of the pairs, within `max_length`."""

    @abstractmethod
    def _forward(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor | None]:
        """Log-odds [B] float32, and features [B, T] if there are any."""

    @abstractmethod
    def _head(self) -> nn.Module:
        """The last linear layer."""

    @abstractmethod
    def _reading(self) -> Any:
        """Beside the weights, all that the log-odds depend on, as JSON takes it."""

    # -- judging -------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """Names this teacher by its content: weights, adapter, prompt and length, but neither path nor dtype.

        Of each tensor name, shape and a sample of values count. Two teachers of one identity say the same of a pair,
        up to float order.
        """
        if self._identity is None:
            content = json.dumps([weights_digest(self.model), self.max_length, self._reading()])
            self._identity = f"{self.kind} {hashlib.sha256(content.encode()).hexdigest()[:32]}"
        return self._identity

    @torch.inference_mode()
    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """Log-odds [K] float32 and features [K, T] float16, on the CPU.

        Raises:
            DataError: the query leaves no room for a passage.
            ModelError: a log-odds or feature is not finite.
        """
        began = time.perf_counter()
        rows = self._rows(query, candidates, task)
        log_odds_K = torch.zeros(len(rows))
        features: dict[int, Tensor] = {}
        for group in batches([len(row.ids) for row in rows], self.batch_tokens):
            log_odds_B, features_BT = self._forward([rows[index] for index in group])
            log_odds_K[group] = log_odds_B.cpu()
            if features_BT is not None:
                features |= zip(group, features_BT.half().cpu(), strict=True)
        features_KT = torch.stack([features[index] for index in range(len(rows))]) if features else None
        if not log_odds_K.isfinite().all() or (features_KT is not None and not features_KT.isfinite().all()):
            raise ModelError(f"{self.base or self.kind}: log-odds or features of {query!r} are not finite: use fp32")
        self.spent.pairs += len(rows)
        self.spent.tokens += sum(len(row.ids) for row in rows)
        self.spent.seconds += time.perf_counter() - began
        return Judgement(log_odds_K, features_KT)

    def _pad(self, rows: Sequence[_Row], side: str) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        ids_BL, mask_BL = pad([row.ids for row in rows], device, side)
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    @contextlib.contextmanager
    def _seen_by_head(self) -> Iterator[list[Tensor]]:
        """Collects what the last linear layer is given."""
        seen: list[Tensor] = []
        handle = self._head().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            handle.remove()

    # -- fine-tuning ---------------------------------------------------------------------------------------------

    def fit(
        self,
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
        """Fine-tune LoRA adapters on labels (the paper's LLM-ce-ft, whose recipe is not printed): listwise
        cross-entropy over the log-odds of a positive and `negatives` of its negatives. Gives the loss of each step.

        A step takes `batch` queries in as many passes as `batch_tokens` asks for; `checkpointing` recomputes
        activations to save memory, and changes no result.

        Raises:
            DataError: no example has that many negatives.
            DivergedError: a loss is not finite.
        """
        enough = with_negatives(examples, negatives)
        rng = random.Random(seed)
        torch.manual_seed(seed)
        if self.adapter is None:
            self._add_adapter()
        model: Any = self.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        self._identity, losses = None, []
        for step in tqdm(range(steps), desc="fine-tuning", unit="step", disable=not progress):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
            lists = [
                self._rows(e.query, [rng.choice(e.positives), *rng.sample(e.negatives, negatives)], e.task)
                for e in rng.sample(enough, min(batch, len(enough)))
            ]
            losses.append(self._backward(lists))
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        if checkpointing:
            model.gradient_checkpointing_disable()
        return losses

    def _backward(self, lists: Sequence[list[_Row]]) -> float:
        """Add the gradients of Q lists, each with its positive first; the mean loss."""
        total = 0.0
        sizes = [len(rows) * max(len(row.ids) for row in rows) for rows in lists]
        for group in batches(sizes, self.batch_tokens):
            log_odds_B, _ = self._forward([row for index in group for row in lists[index]])
            log_odds_QK = log_odds_B.view(len(group), -1)
            first_Q = torch.zeros(len(group), dtype=torch.long, device=log_odds_QK.device)
            loss = F.cross_entropy(log_odds_QK, first_Q) * (len(group) / len(lists))
            if not torch.isfinite(loss):
                raise DivergedError(f"the loss is {loss.item()}: lower the learning rate or use fp32")
            loss.backward()
            total += loss.item()
        return total

    def _add_adapter(self) -> None:
        from peft import LoraConfig, get_peft_model

        task_type = "SEQ_CLS" if self.kind == "reranker" else None  # its head is trained whole and saved too
        settings = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type=task_type)
        self.adapter = get_peft_model(self.model, settings)  # changes self.model in place

    def load_adapter(self, folder: Path) -> None:
        """Put the adapter of a peft folder onto the weights; `fit` goes on with it. Errors are those of the function
        `load_adapters`."""
        self.adapter = load_adapters(self.model, folder)
        self.model.eval()
        self._identity = None

    def save(self, folder: Path) -> None:
        """Write what `fit` has learned, whole or not at all: the adapter, and a JSON with base, prompt and length.

        Raises:
            ModelError: `folder` exists and is not empty, or nothing was learned.
        """
        if self.adapter is None:
            raise ModelError(f"{self.base or self.kind} was not fine-tuned: there is nothing to save")
        base = str(Path(self.base).resolve()) if Path(self.base).is_dir() else self.base
        about = {"kind": self.kind, "base": base, "base_digest": self.base_digest, "max_length": self.max_length}
        with new_folder(folder) as staging:
            self.adapter.save_pretrained(staging / ADAPTER)  # type: ignore[operator]  # a Module to torch's types
            content = json.dumps({**about, **self._recipe()}, indent=2, ensure_ascii=False)
            (staging / TEACHER).write_text(content + "\n", encoding="utf-8")

    def _recipe(self) -> dict[str, Any]:
        """What `teacher.json` holds beside what every kind has."""
        return {}


class YesNo(_CrossEncoder):
    """A causal LM asked whether the passage answers the query (paper section 3.1).

    Log-odds are `logit(yes) - logit(no)` after the answer cue; a pair's features are the last token's last hidden
    state, as the LM head is given it. The LM head is reduced to the rows of the answers.
    """

    kind = "llm"

    def __init__(self, model: nn.Module, prompts: Prompts, *, batch_tokens: int = 16384, base: str = "") -> None:
        super().__init__(model, max_length=prompts.max_length, batch_tokens=batch_tokens, base=base)
        self.prompts = prompts
        answers = torch.tensor([prompts.answers[task] for task in TASKS]).flatten()  # R: yes and no of each task
        full: Any = model.get_output_embeddings()  # type: ignore[operator]  # a Module to torch's types
        with torch.no_grad():
            head = nn.Linear(full.in_features, len(answers), bias=full.bias is not None, device=full.weight.device)
            head.weight.copy_(full.weight[answers])
            if full.bias is not None:
                head.bias.copy_(full.bias[answers])
        # In its place and not beside it, so that what a model does to its logits (scale, soft cap) is still done.
        model.set_output_embeddings(_in_float(head.requires_grad_(False)))  # type: ignore[operator]  # likewise
        self._positions = "position_ids" in inspect.signature(model.forward).parameters

    def _rows(self, query: str, candidates: Sequence[str], task: Task) -> list[_Row]:
        return [_Row(ids, [], task_id(task)) for ids in self.prompts.ids(query, candidates, task)]

    def _forward(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor | None]:
        inputs = self._pad(rows, "left")
        if self._positions:  # counted from the first real token, so that padding changes nothing
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with self._seen_by_head() as seen:
            logits_BR = self.model(**inputs, use_cache=False).logits[:, -1].float()
        task_B = torch.tensor([row.task for row in rows], device=logits_BR.device)
        yes_no_B2 = logits_BR.view(len(rows), len(TASKS), 2)[torch.arange(len(rows)), task_B]
        return yes_no_B2[:, 0] - yes_no_B2[:, 1], seen[0][:, -1]

    def _head(self) -> nn.Module:
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]  # a Module to torch's types
        return head

    def _reading(self) -> Any:
        # The rendered prompts, how this tokenizer reads them, and the answers.
        probes = [self.prompts.ids("a query", ["a passage"], task) for task in TASKS]
        return [self.prompts.texts, probes, self.prompts.answers]

    def _recipe(self) -> dict[str, Any]:
        return {"template": asdict(self.prompts.template), "chat_template": self.prompts.chat is not None}


class Reranker(_CrossEncoder):
    """A sequence classifier over the pair, with one label, or two of which the second is "relevant".

    Log-odds are the logit, or the difference of the two; a pair's features are what the last layer is given.
    """

    kind = "reranker"

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, *, max_length: int, batch_tokens: int = 16384, base: str = ""
    ) -> None:
        super().__init__(model, max_length=max_length, batch_tokens=batch_tokens, base=base)
        self.tokenizer = tokenizer
        config: Any = model.config
        self.labels = int(config.num_labels)
        if self.labels not in (1, 2):
            raise ModelError(f"{base or 'the reranker'} has {self.labels} labels: expected one, or two (no, yes)")
        if config.pad_token_id is None:  # decoders look for it to find the last token, RoBERTa to count positions
            raise ModelError(f"{base or 'the reranker'}: its config.json has no pad_token_id, which batches need")
        self.padding = int(config.pad_token_id)
        self._segments = getattr(config, "type_vocab_size", 0) > 1
        _in_float(self._head())

    def _rows(self, query: str, candidates: Sequence[str], task: Task) -> list[_Row]:
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
            rows.append(_Row(ids, segments, task_id(task)))
        return rows

    def _forward(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor | None]:
        inputs = self._pad(rows, "right")
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, self.padding)
        if self._segments:
            inputs["token_type_ids"], _ = pad([row.segments for row in rows], inputs["input_ids"].device)
        with self._seen_by_head() as seen:
            logits_BR = self.model(**inputs).logits.float()
        log_odds_B = logits_BR[:, -1] if self.labels == 1 else logits_BR[:, 1] - logits_BR[:, 0]
        return log_odds_B, seen[0] if seen[0].ndim == 2 else None  # decoders give their head every token

    def _head(self) -> nn.Module:
        # peft keeps the untrained copy of a head too, before the one in use.
        return [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == self.labels][-1]

    def _reading(self) -> Any:
        return self._rows("a query", ["a passage"], "asymmetric")


def load_cross_encoder(
    config: TeacherConfig, device: torch.device | str, dtype: torch.dtype | None
) -> YesNo | Reranker | Cached:
    """`load_uncached`, behind `config.cache` if that is set."""
    teacher = load_uncached(config, device, dtype)
    return teacher if config.cache is None else Cached(teacher, TeacherCache(Path(config.cache)))


def load_uncached(config: TeacherConfig, device: torch.device | str, dtype: torch.dtype | None) -> YesNo | Reranker:
    """The `llm` or `reranker` of a recipe, with weights in `dtype` (None: float32).

    `config.model` may be a folder that `save` wrote: base, template and length are then those it was fine-tuned with.

    Raises:
        ModelError: the model, its adapter, its tokenizer or its chat template cannot be loaded, or its head was never
            trained.
        DataError: the template cannot be read, or its answers are no single tokens.
        MismatchError: an adapter whose base has changed since.
    """
    kind = next((name for name in ("llm", "reranker") if name in config.members), None)
    if kind is None or config.model is None:
        raise DataError(
            f"teacher.members = {list(config.members)}: none is an `llm` or `reranker` with a teacher.model"
        )
    folder = Path(config.model)
    saved = _read_saved(folder, kind)
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


def with_negatives(examples: Sequence[Example], negatives: int) -> list[Example]:
    """The examples that a teacher can be fine-tuned on.

    Raises:
        DataError: no example has that many negatives.
    """
    enough = [example for example in examples if len(example.negatives) >= negatives]
    if not enough:
        raise DataError(f"no query has {negatives} negatives to be set against its positive: ask for fewer")
    return enough


def weights_digest(model: nn.Module) -> str:
    """Names weights by each tensor's name, shape and up to 64 of its values, rounded to bfloat16: the same in any
    precision, in a moment for any size."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)][:64].bfloat16().float().cpu()
        digest.update(f"{name} {tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def batches(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of items in groups of similar size, largest first: count times largest is within `limit`, or count 1."""
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if groups and (len(groups[-1]) + 1) * sizes[groups[-1][0]] <= limit:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _in_float(head: nn.Module) -> nn.Module:
    """Let a last layer work in float32: in bfloat16, logits closer than 0.4 % would tie."""
    head.float().register_forward_pre_hook(_to_float)
    return head


def _to_float(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].float(),)


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Saved:
    """The content of `teacher.json`."""

    kind: str
    base: str
    base_digest: str
    max_length: Count
    template: Template | None = None
    chat_template: bool = False


def _read_saved(folder: Path, kind: str) -> _Saved | None:
    """What `save` wrote into `folder`; None if it is another folder, or no folder but a hub id."""
    path = folder / TEACHER
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if template := content.get("template"):
            prompts = {task: Prompt(**template[task]) for task in TASKS}
            content["template"] = Template(**{**template, **prompts})
        saved = build(_Saved, content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is damaged ({error}). Fine-tune again.") from error
    if saved.kind != kind:
        raise ModelError(f"{folder} is a fine-tuned `{saved.kind}`: name that in teacher.members in place of `{kind}`")
    return saved


def _load(
    kind: str, config: TeacherConfig, template: Template, device: torch.device | str, dtype: torch.dtype | None
) -> YesNo | Reranker:
    name = str(config.model)
    tokenizer = load_tokenizer(name)
    if kind == "llm":  # the prompts first: what is wrong with them is said before gigabytes are read
        prompts = Prompts(template, tokenizer, config.max_length, _chat(name) if config.chat_template else None)
        model = _weights(AutoModelForCausalLM, name, dtype).to(device)
        return YesNo(model, prompts, batch_tokens=config.batch_tokens, base=name)
    model = _weights(AutoModelForSequenceClassification, name, dtype).to(device)
    return Reranker(model, tokenizer, max_length=config.max_length, batch_tokens=config.batch_tokens, base=name)


def _weights(auto: Any, name: str, dtype: torch.dtype | None) -> nn.Module:
    try:
        model, report = auto.from_pretrained(name, dtype=dtype or torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"teacher.model {name!r} cannot be loaded from the hub or a folder: {error}") from error
    if report["missing_keys"]:  # transformers would fill them with random numbers and say so in a log
        raise ModelError(
            f"teacher.model {name!r} has no weights for {', '.join(sorted(report['missing_keys']))}: "
            f"it was not trained as {type(model).__name__}. Choose another model, or the other of `llm` and `reranker`."
        )
    loaded: nn.Module = model
    return loaded


def _chat(name: str) -> Chat:
    """The chat template of a tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer of teacher.model {name!r} cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of teacher.model {name!r} has no chat template: set chat_template = false")

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:  # Gemma's knows no system turn, for one
            raise ModelError(f"the chat template of teacher.model {name!r} refuses the prompt: {error}") from error

    return render
