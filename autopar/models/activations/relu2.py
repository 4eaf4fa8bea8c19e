"""max(x, 0)² (So et al. 2021, Primer)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def make(x: Tensor) -> Tensor:
    """Elementwise."""
    return torch.square(F.relu(x))
