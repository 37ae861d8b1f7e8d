"""What `preset = "paper"` and its like stand for: values of recipe keys. Keys that a recipe writes win over them."""

from __future__ import annotations

from typing import Any

from d2llm.errors import ArgumentError

_PAPER_MODEL: dict[str, Any] = {
    # PMA and IEM as printed: random start, the sum of both projections, and the score is the MLP's alone.
    "student.start": "paper",
    "student.pooling": "pma",
    "student.interaction": "iem",
    "student.iem_inputs": "sum",
    "student.lexical_slots": 0,
    "student.vectors": 0,
    # Sizes of the authors' code. With them Qwen-7B has the 89M trained parameters that the paper's tables list.
    "student.pma_heads": 32,
    "student.feature_dim": 512,
    "student.tuning": "lora",
    "student.lora_rank": 8,
    "student.lora_alpha": 8,
    "student.lora_dropout": 0.05,
    # An LLM alone teaches, so there is nothing to weigh.
    "teacher.members": ["llm"],
    "teacher.max_length": 500,
    "teacher.calibration_queries": 0,
    # No stage of its own for recall: all queries go to the teacher, with K = 8 given negatives.
    "recall.steps": 0,
    "distil.held_apart": 1.0,
    "distil.mining": "given",
    "distil.negatives": 8,
    "distil.batch": 32,
    "distil.backbone": "live",
    # One rate for everything.
    "lr.backbone": 1e-4,
    "lr.pooling": 1e-4,
    "lr.iem": 1e-4,
}
_PAPER_LOSSES: dict[str, Any] = {
    # The paper does not print its weights: these are those of the authors' code.
    "loss.recall": 0.0,
    "loss.listwise_imitation": 0.0,
    "loss.contrastive_imitation": 1.0,
    "loss.rank_imitation_ph": 1.0,
    "loss.rank_imitation_hi": 0.01,
    "loss.feature_imitation": 0.001,
}

PRESETS: dict[str, dict[str, Any]] = {
    "d2llm": {},
    "paper": {
        **_PAPER_MODEL,
        **_PAPER_LOSSES,
        "loss.ci_positive_in_denominator": False,
        "loss.hi_weight": "ndcg",
    },
    "official": {
        **_PAPER_MODEL,
        **_PAPER_LOSSES,
        "loss.in_batch": 1.0,
        "loss.ph_on_probabilities": True,
        "loss.fi_squared": True,
    },
}
"""`d2llm`: the defaults, our own form. `paper`: the formulas as printed. `official`: what the authors' code computes,
without its bugs."""


def preset_values(name: Any, key: str) -> dict[str, Any]:
    """The values of a preset; `key` is where the recipe names it.

    Raises:
        ArgumentError: there is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ArgumentError(f"{key}: {name!r} unknown, choose from {', '.join(PRESETS)}")
    return PRESETS[name]
