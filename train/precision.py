"""The number format that a device computes in."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

ComputeDtype: TypeAlias = Literal["auto", "fp32", "bf16"]
"""The values of the recipe key `precision`."""


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in `dtype`; full precision for None."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def compute_dtype(precision: ComputeDtype, device: torch.device) -> torch.dtype | None:
    """The dtype for `autocast`; None means float32. `auto` is bf16 on GPUs and on CPUs with instructions for it (AMX or
    AVX-512 BF16): there a training step takes 2 to 4 times as long in float32."""
    if precision == "auto":
        fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if precision == "bf16" else None
