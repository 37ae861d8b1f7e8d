"""A recipe: everything that decides a training run, read from TOML, every field typed and explained."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from d2llm.errors import DataError
from d2llm.modeling import StudentConfig

from .precision import Precision

MEMBERS = ("cosine", "late-interaction", "bm25", "bi-encoder", "cross-encoder", "llm", "reranker")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is learned from."""

    folder: str | None = None
    """A BEIR folder with the splits `train` and `dev`."""
    examples: str | None = None
    """Training tuples, as `d2llm mine` writes them; in place of the folder's train split."""
    pairs: tuple[str, ...] = ()
    """JSONL files of judged pairs (`text_a`, `text_b`, `score` or `label`) for the symmetric branch."""
    dev_pairs: str | None = None
    """Such a file to measure on. The best state is then the one with the best mean of nDCG@10 and Spearman."""
    negatives: int = 15
    """Hard negatives that BM25 mines for each query of the first stage."""
    dev_queries: int = 200
    dev_documents: int = 2000
    """Dev is measured on this many queries, against their positives and this many other passages."""

    def __post_init__(self) -> None:
        if self.folder is None and (self.examples is not None or not self.pairs):
            raise ValueError("data: set data.folder (retrieval), data.pairs (pairs of texts), or both")
        if self.pairs and self.folder is None and self.dev_pairs is None:
            raise ValueError("data.pairs alone need data.dev_pairs: without dev no state can be called the best")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Who is learned from: a stack of scorers, weighted by logistic regression on queries that none was fitted to."""

    members: tuple[str, ...] = ("cosine", "late-interaction", "bm25")
    """Any of `cosine`, `late-interaction` (of the student's own token states), `bm25`, `bi-encoder` (each of
    `bi_encoders`), `cross-encoder` (the student's backbone over both texts, fine-tuned within the run), `llm` (yes/no
    prompt) and `reranker` (a cross-encoder of the hub); the last two are the `model`."""
    bi_encoders: tuple[str, ...] = ()
    """Student folders, or backbones of the hub whose mean pooling is their embedding. They should not have been trained
    on these very queries: the stack would trust what they remember of them."""
    model: str | None = None
    """Hugging Face id or folder of the `llm` or `reranker`; a folder made by `d2llm teach --finetune` as well."""
    template: str = "paper-en"
    """Prompt of the `llm`: `paper-en`, `paper-zh`, `qwen3-reranker`, or a TOML file (see train/prompts.py)."""
    chat_template: bool = False
    """Whether the prompt goes through the tokenizer's chat template."""
    batch_tokens: int = 16384
    """Padded tokens in one forward pass of the `llm` or `reranker`."""
    cache: str | None = None
    """Folder that keeps what the `llm` or `reranker` has scored; may be shared between recipes and processes."""
    calibration_queries: int = 200
    cross_encoder_steps: int = 300
    cross_encoder_batch: int = 8
    max_length: int = 192
    """Tokens of a pair with its prompt; the passage is cut, never the query or the prompt."""

    def __post_init__(self) -> None:
        unknown = set(self.members) - set(MEMBERS)
        if unknown or not self.members:
            raise ValueError(f"teacher.members: {sorted(unknown)} unknown: choose from {', '.join(MEMBERS)}")
        if ("bi-encoder" in self.members) != bool(self.bi_encoders):
            raise ValueError("teacher.members has 'bi-encoder' when teacher.bi_encoders names some, and only then")
        named = {"llm", "reranker"} & set(self.members)
        if len(named) > 1:
            raise ValueError("teacher.members: `llm` and `reranker` are both the one teacher.model: name one of them")
        if named and self.model is None:
            raise ValueError(f"teacher.members has {named.pop()!r}: set teacher.model to its hub id or folder")


PRESETS: dict[str, dict[str, Any]] = {
    "d2llm": {},
    # As in the paper's total; its weights are not printed, these are the authors' code's.
    "paper": {
        "recall": 0.0,
        "listwise_imitation": 0.0,
        "contrastive_imitation": 1.0,
        "rank_imitation_ph": 1.0,
        "rank_imitation_hi": 0.01,
        "feature_imitation": 0.001,
        "ci_positive_in_denominator": False,
        "hi_weight": "ndcg",
    },
    # What the authors' code computes, its bugs left out.
    "official": {
        "recall": 0.0,
        "listwise_imitation": 0.0,
        "in_batch": 1.0,
        "contrastive_imitation": 1.0,
        "rank_imitation_ph": 1.0,
        "rank_imitation_hi": 0.01,
        "feature_imitation": 0.001,
        "ph_on_probabilities": True,
        "fi_squared": True,
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the distillation losses; 0 switches one off. `preset` in a recipe starts from other values than these:
    `paper` from the formulas as printed, `official` from what the authors' code computes.

    The first stage is the recall loss (and that of pairs) alone, whatever stands here.
    """

    recall: float = 0.1
    """InfoNCE on the cosine."""
    margin_mse: float = 0.0
    """On the scaled cosine: its margins between candidates should be the teacher's."""
    listwise_imitation: float = 1.0
    contrastive: float = 0.0
    """Plain contrastive loss on IEM scores, without a teacher: in place of CI the paper's ablation -CI+CL."""
    in_batch: float = 0.0
    """The same against the other queries' positives; the authors' code adds it."""
    contrastive_imitation: float = 0.0
    """Off by default: it multiplies scores by probabilities, and so disturbs a score that starts as a good one."""
    rank_imitation_ph: float = 0.0
    rank_imitation_hi: float = 0.0
    feature_imitation: float = 0.0
    """Only where the teacher has features (a cross-encoder alone)."""
    pairs: float = 1.0
    """Of judged pairs, in both stages: RI_PH over the batch, the judgements in the teacher's place."""
    temperature: float = 0.05
    """Of the recall loss, in both stages."""
    ci_positive_in_denominator: bool = True
    ph_on_probabilities: bool = False
    hi_weight: Literal["probability", "ndcg"] = "probability"
    fi_squared: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A training run.

    First the encoder learns recall (`encoder_steps`, backbone and heads, recall loss alone) on one part of the
    queries. Then student and teacher meet on the queries held apart: an IEM trained on queries that the encoder was
    fitted to learns to undo the encoder's fit. Judged pairs go into every step of both stages.
    """

    student: StudentConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    encoder_steps: int = 100
    encoder_batch: int = 32
    held_apart: float = 0.5
    """Share of the training queries that the first stage does not see."""
    distil_steps: int = 300
    distil_batch: int = 32
    distil_candidates: int = 50
    """Of each held-apart query's recall, the passages that the teacher scores."""
    distil_mining: Literal["student", "given"] = "student"
    """`student`: candidates are the student's own recall after the first stage, what it will have to order when it
    serves. `given`: the negatives of `data.examples`, which `d2llm teach` can have judged ahead."""
    distil_negatives: int = 7
    """How many of them stand against the positive in one step, drawn anew each time."""
    distil_backbone: Literal["frozen", "live"] = "frozen"
    """`frozen`: token states are computed once and the heads learn. `live`: the backbone learns on."""
    encoder_lr: float = 5e-5
    """Of the backbone."""
    pooling_lr: float = 1e-4
    """Of a PMA that starts as the mean, and of the recall head."""
    iem_lr: float = 2e-4
    """Of what starts from nothing: the IEM, and a PMA in the paper's form."""
    scale_lr: float = 1e-2
    """Of the scales of cosine and lexical match in the score."""
    pairs_batch: int = 32
    """Judged pairs in a step."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass: less memory, a third more time."""
    save_every: int = 50
    """Steps between two checkpoints of the run."""
    eval_every: int = 100
    """Distillation steps between two measurements on dev; the best state is kept."""
    precision: Precision = "auto"
    """`auto`: bf16 on a GPU or a CPU with matrix units for it, else fp32."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_apart <= 1:
            raise ValueError(f"held_apart is a share between 0 and 1, not {self.held_apart}")
        if self.encoder_steps and self.student.tuning == "frozen":
            raise ValueError("encoder_steps trains the backbone, student.tuning = 'frozen' forbids it: set one of them")
        if self.distil_backbone == "live" and self.student.tuning == "frozen":
            raise ValueError("distil_backbone = 'live' trains the backbone, student.tuning = 'frozen' forbids it")


def read_recipe(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a TOML recipe; `overrides` such as `{"student.backbone": "my/model", "encoder_steps": "10"}` win over it.

    Raises:
        DataError: no such file, broken TOML, an unknown or missing key, a value out of range; names it.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for key, text in (overrides or {}).items():
            *tables, name = key.split(".")
            table = content
            for part in tables:
                table = table.setdefault(part, {})
                if not isinstance(table, dict):
                    raise ValueError(f"{key}: {part} is a value, not a table")
            table[name] = _value(text)
        return _build(content)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML ({error})") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


S = TypeVar("S")


def read_settings(kind: type[S], overrides: Mapping[str, str]) -> S:
    """A dataclass of settings at its defaults but for `overrides`, values as TOML would have them.

    Raises:
        DataError: an unknown key, a value of another type or out of range; names it.
    """
    values = {key: _value(text) for key, text in overrides.items()}
    try:
        _check(values, kind, "")
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise DataError(str(error)) from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def _build(content: dict[str, Any]) -> Recipe:
    tables = {"student": StudentConfig, "data": DataConfig, "teacher": TeacherConfig, "loss": LossConfig}
    values = dict(content)
    for name, kind in tables.items():
        if name in values or name in ("student", "data"):
            table = values.get(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"{name}: expected a table, found {table!r}")
            if name == "loss":
                table = _with_preset(table)
            _check(table, kind, f"{name}.")
            values[name] = kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in table.items()})
    _check(values, Recipe, "")
    return Recipe(**values)


def _with_preset(table: Mapping[str, Any]) -> dict[str, Any]:
    preset = table.get("preset", "d2llm")
    if preset not in PRESETS:
        raise ValueError(f"loss.preset: {preset!r} unknown, choose from {', '.join(PRESETS)}")
    return {**PRESETS[preset], **{key: value for key, value in table.items() if key != "preset"}}


def _check(table: Mapping[str, Any], kind: type, prefix: str) -> None:
    """Dataclasses check no types: a misspelt choice or a number in quotes would surface hours later, or never."""
    known = get_type_hints(kind)
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ValueError(f"unknown key {prefix}{unknown[0]}: known are {', '.join(sorted(known))}")
    required = (entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING)
    missing = next((name for name in required if name not in table), None)
    if missing is not None:
        raise ValueError(f"missing key {prefix}{missing}")
    for key, value in table.items():
        if not _fits(value, known[key]):
            expected = known[key].__name__ if isinstance(known[key], type) else str(known[key])
            raise ValueError(f"{prefix}{key}: expected {expected.replace('typing.', '')}, found {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return value in choices
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(item, choices[0]) for item in value)
    if choices:  # a union
        return any(_fits(value, choice) for choice in choices)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float if hint is float else hint)
