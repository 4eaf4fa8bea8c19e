"""x · Φ(x), exactly (Hendrycks and Gimpel 2016)."""

from __future__ import annotations

from torch.nn.functional import gelu as make

__all__ = ["make"]
