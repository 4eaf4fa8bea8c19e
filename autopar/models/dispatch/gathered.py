"""Each token's experts are gathered: no wasted work, a copy of the chosen experts' weights for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make(experts: Any, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """The mixture (tokens, hidden) of `ExpertWeights`; scores and chosen (tokens, top)."""
    top, numbers = chosen.shape[1], chosen.reshape(-1)
    each = tokens.repeat_interleave(top, dim=0).unsqueeze(-1)
    gate, up = torch.bmm(experts.gate[numbers], each), torch.bmm(experts.up[numbers], each)
    out = torch.bmm(experts.down[numbers], experts.activation(gate) * up).squeeze(-1)
    weighted = out * scores.reshape(-1).unsqueeze(-1)
    return weighted.view(tokens.shape[0], top, tokens.shape[1]).sum(dim=1)
