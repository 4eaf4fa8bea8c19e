"""The tanh approximation of GELU: GPT-2, BLOOM, ChatGLM."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def make(x: Tensor) -> Tensor:
    """Elementwise."""
    return F.gelu(x, approximate="tanh")
