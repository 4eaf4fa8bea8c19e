"""max(x, 0)."""

from __future__ import annotations

from torch.nn.functional import relu as make

__all__ = ["make"]
