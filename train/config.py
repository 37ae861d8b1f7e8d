"""A recipe: everything that decides a training run, read from TOML, every field typed and explained."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from d2llm.errors import ArgumentError, DataError
from d2llm.settings import LARGEST, Count, Positive, Range, Seed, Share, Weight, Whole, build, check_fields
from d2llm.student import StudentConfig

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
    negatives: Whole = 15
    """Hard negatives that BM25 mines for each query of the first stage."""
    dev_queries: Count = 200
    dev_documents: Whole = 2000
    """Dev is measured on this many queries, against their positives and this many other passages."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.folder is None and (self.examples is not None or not self.pairs):
            raise ArgumentError("data: set data.folder (retrieval), data.pairs (pairs of texts), or both")
        if self.pairs and self.folder is None and self.dev_pairs is None:
            raise ArgumentError("data.pairs alone need data.dev_pairs: without dev no state can be called the best")


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
    batch_tokens: Count = 16384
    """Padded tokens in one forward pass of the `llm` or `reranker`."""
    cache: str | None = None
    """Folder that keeps what the `llm` or `reranker` has scored; may be shared between recipes and processes."""
    calibration_queries: Whole = 200
    cross_encoder_steps: Whole = 300
    cross_encoder_batch: Count = 8
    max_length: Count = 192
    """Tokens of a pair with its prompt; the passage is cut, never the query or the prompt."""

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = set(self.members) - set(MEMBERS)
        if unknown or not self.members:
            raise ArgumentError(f"teacher.members: {sorted(unknown)} unknown: choose from {', '.join(MEMBERS)}")
        if ("bi-encoder" in self.members) != bool(self.bi_encoders):
            raise ArgumentError("teacher.members has 'bi-encoder' when teacher.bi_encoders names some, and only then")
        named = {"llm", "reranker"} & set(self.members)
        if len(named) > 1:
            raise ArgumentError("teacher.members: `llm` and `reranker` are both the one teacher.model: name one")
        if named and self.model is None:
            raise ArgumentError(f"teacher.members has {named.pop()!r}: set teacher.model to its hub id or folder")


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

    recall: Weight = 0.1
    """InfoNCE on the cosine."""
    margin_mse: Weight = 0.0
    """On the scaled cosine: its margins between candidates should be the teacher's."""
    listwise_imitation: Weight = 1.0
    contrastive: Weight = 0.0
    """Plain contrastive loss on IEM scores, without a teacher: in place of CI the paper's ablation -CI+CL."""
    in_batch: Weight = 0.0
    """The same against the other queries' positives; the authors' code adds it."""
    contrastive_imitation: Weight = 0.0
    """Off by default: it multiplies scores by probabilities, and so disturbs a score that starts as a good one."""
    rank_imitation_ph: Weight = 0.0
    rank_imitation_hi: Weight = 0.0
    feature_imitation: Weight = 0.0
    """Only where the teacher has features (a cross-encoder alone)."""
    pairs: Weight = 1.0
    """Of judged pairs, in both stages: RI_PH over the batch, the judgements in the teacher's place."""
    temperature: Positive = 0.05
    """Of the recall loss, in both stages."""
    ci_positive_in_denominator: bool = True
    ph_on_probabilities: bool = False
    hi_weight: Literal["probability", "ndcg"] = "probability"
    fi_squared: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


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
    encoder_steps: Whole = 100
    encoder_batch: Count = 32
    held_apart: Share = 0.5
    """Share of the training queries that the first stage does not see."""
    distil_steps: Whole = 300
    distil_batch: Count = 32
    distil_candidates: Count = 50
    """Of each held-apart query's recall, the passages that the teacher scores."""
    distil_mining: Literal["student", "given"] = "student"
    """`student`: candidates are the student's own recall after the first stage, what it will have to order when it
    serves. `given`: the negatives of `data.examples`, which `d2llm teach` can have judged ahead."""
    distil_negatives: Count = 7
    """How many of them stand against the positive in one step, drawn anew each time."""
    distil_backbone: Literal["frozen", "live"] = "frozen"
    """`frozen`: token states are computed once and the heads learn. `live`: the backbone learns on."""
    encoder_lr: Positive = 5e-5
    """Of the backbone."""
    pooling_lr: Positive = 1e-4
    """Of a PMA that starts as the mean, and of the recall head."""
    iem_lr: Positive = 2e-4
    """Of what starts from nothing: the IEM, and a PMA in the paper's form."""
    scale_lr: Positive = 1e-2
    """Of the scales of cosine and lexical match in the score."""
    pairs_batch: Annotated[int, Range(2, LARGEST)] = 32
    """Judged pairs in a step: it is their order that is learned."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass: less memory, a third more time."""
    save_every: Count = 50
    """Steps between two checkpoints of the run."""
    eval_every: Count = 100
    """Distillation steps between two measurements on dev; the best state is kept."""
    precision: Precision = "auto"
    """`auto`: bf16 on a GPU or a CPU with matrix units for it, else fp32."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_negatives()
        if self.encoder_steps and self.student.tuning == "frozen":
            raise ArgumentError("encoder_steps trains the backbone, student.tuning = 'frozen' forbids it: set one")
        if self.distil_backbone == "live" and self.student.tuning == "frozen":
            raise ArgumentError("distil_backbone = 'live' trains the backbone, student.tuning = 'frozen' forbids it")

    def _check_negatives(self) -> None:
        key, mined = "distil_candidates", self.distil_candidates
        if self.distil_mining == "given":
            key, mined = "data.negatives", self.data.negatives
            if self.data.examples is not None:
                return  # they have their own, counted when they are read
        if self.data.folder is not None and self.distil_negatives > mined:
            raise ArgumentError(
                f"distil_negatives = {self.distil_negatives} are drawn from {key} = {mined}: lower it, or raise {key}"
            )


def read_recipe(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a TOML recipe; `overrides` such as `{"student.backbone": "my/model", "encoder_steps": "10"}` win over it.

    Raises:
        DataError: no such file, broken TOML, an unknown or missing key, a value of another type or out of range; names
            file and key.
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
                    raise ArgumentError(f"{key}: {part} is a value, not a table")
            table[name] = _value(text)
        return _build(content)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML ({error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from error


T = TypeVar("T")


def read_settings(kind: type[T], overrides: Mapping[str, str]) -> T:
    """A dataclass of settings at its defaults but for `overrides`, values as TOML would have them.

    Raises:
        ArgumentError: an unknown key, a value of another type or out of range; names it.
    """
    return build(kind, {key: _value(text) for key, text in overrides.items()})


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
            if name == "loss" and isinstance(table, dict):
                table = _with_preset(table)
            values[name] = build(kind, table, f"{name}.")
    return build(Recipe, values)


def _with_preset(table: Mapping[str, Any]) -> dict[str, Any]:
    preset = table.get("preset", "d2llm")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ArgumentError(f"loss.preset: {preset!r} unknown, choose from {', '.join(PRESETS)}")
    return {**PRESETS[preset], **{key: value for key, value in table.items() if key != "preset"}}
