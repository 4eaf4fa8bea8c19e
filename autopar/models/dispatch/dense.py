"""Every expert computes every token; those not chosen count with a score of 0.

As much memory as one MLP of all experts together, and experts / top times the work that is needed; exact in every dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make(experts: Any, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """The mixture (tokens, hidden) of `ExpertWeights`; scores and chosen (tokens, top)."""
    count = experts.gate.shape[0]
    taken = chosen.unsqueeze(-1) == torch.arange(count, device=chosen.device)
    share = (taken.to(scores.dtype) * scores.unsqueeze(-1)).sum(dim=1)  # (tokens, experts)
    each = tokens.unsqueeze(0).expand(count, -1, -1)
    gate = torch.bmm(each, experts.gate.transpose(1, 2))
    up = torch.bmm(each, experts.up.transpose(1, 2))
    inner = experts.activation(gate) * up * share.t().unsqueeze(-1)
    return torch.bmm(inner, experts.down.transpose(1, 2)).sum(dim=0)
