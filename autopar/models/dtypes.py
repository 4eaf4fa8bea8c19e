"""The precision of what published code computes in float32 whatever the model's own."""

from __future__ import annotations

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: where published code says float32 against half precision's rounding."""
    return torch.float64 if dtype == torch.float64 else torch.float32
