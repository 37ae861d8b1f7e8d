"""In which precision a device computes."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

ComputeDtype: TypeAlias = Literal["auto", "fp32", "bf16"]
Precision = ComputeDtype


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in `dtype`, or none."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def compute_dtype(precision: ComputeDtype, device: torch.device) -> torch.dtype | None:
    """The dtype for `autocast`; `auto` is bf16 on a GPU or a CPU with matrix units for it, else none."""
    if precision == "auto":
        fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if precision == "bf16" else None
