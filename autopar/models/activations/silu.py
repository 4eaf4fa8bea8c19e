"""x · σ(x), also called swish."""

from __future__ import annotations

from torch.nn.functional import silu as make

__all__ = ["make"]
