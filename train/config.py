"""A recipe: everything that decides a training run, read from TOML, every field typed and explained."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from d2llm.errors import DataError
from d2llm.modeling import StudentConfig

MEMBERS = ("cosine", "late-interaction", "bm25", "cross-encoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is learned from."""

    folder: str
    """A BEIR folder with the splits `train` and `dev`."""
    negatives: int = 15
    """Hard negatives that BM25 mines for each query of the first stage."""
    dev_queries: int = 200
    dev_documents: int = 2000
    """Dev is measured on this many queries, against their positives and this many other passages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Who is learned from: a stack of scorers, weighted by logistic regression on queries that none was fitted to."""

    members: tuple[str, ...] = ("cosine", "late-interaction", "bm25")
    """Any of `cosine`, `late-interaction`, `bm25`, `cross-encoder`."""
    calibration_queries: int = 200
    cross_encoder_steps: int = 300
    cross_encoder_batch: int = 8
    max_length: int = 192
    """Tokens of a pair, for the cross-encoder; the passage is cut, never the query."""

    def __post_init__(self) -> None:
        unknown = set(self.members) - set(MEMBERS)
        if unknown or not self.members:
            raise ValueError(f"teacher.members: {sorted(unknown)} unknown: choose from {', '.join(MEMBERS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the losses; 0 switches one off."""

    recall: float = 1.0
    contrastive_imitation: float = 1.0
    rank_imitation_ph: float = 1.0
    rank_imitation_hi: float = 0.1
    feature_imitation: float = 0.1
    """Only where the teacher has features (the cross-encoder alone)."""
    temperature: float = 0.05
    """Of the recall loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A training run.

    First the encoder learns recall (`encoder_steps`, backbone and heads, recall loss alone) on one part of the
    queries. Then student and teacher meet on the queries held apart: an IEM trained on queries that the encoder was
    fitted to learns to undo the encoder's fit.
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
    distil_negatives: int = 7
    """How many of them stand against the positive in one step, drawn anew each time."""
    distil_backbone: Literal["frozen", "live"] = "frozen"
    """`frozen`: token states are computed once and the heads learn. `live`: the backbone learns on."""
    encoder_lr: float = 5e-5
    """Of what is pretrained, or starts as if it were: the backbone, and PMA and recall head that start as the mean."""
    iem_lr: float = 5e-4
    """Of what starts from nothing."""
    eval_every: int = 100
    """Distillation steps between two measurements on dev; the best state is kept."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
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
            table[name] = _value(text)
        return _build(content)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML ({error})") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


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
            _known(table, kind, f"{name}.")
            values[name] = kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in table.items()})
    _known(values, Recipe, "")
    return Recipe(**values)


def _known(table: Mapping[str, Any], kind: type, prefix: str) -> None:
    known = {entry.name for entry in fields(kind)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(f"unknown key {prefix}{unknown[0]}: known are {', '.join(sorted(known))}")
