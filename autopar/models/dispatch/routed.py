"""Every token goes to its own experts: tokens are sorted by expert, each expert computes its own (MegaBlocks' way).

No more work and memory than the chosen experts need, and no token is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.kernels import routed_experts


def make(experts: Any, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """The mixture (tokens, hidden) of `ExpertWeights`; scores and chosen (tokens, top)."""
    numbers = torch.arange(experts.gate.shape[0], device=tokens.device)
    name = experts.activation_name
    return routed_experts(tokens, scores, chosen, numbers, experts.gate, experts.up, experts.down, name)
