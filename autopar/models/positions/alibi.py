"""Attention with linear biases (Press et al. 2022): BLOOM, MPT, some Falcons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from autopar.models.dtypes import wide_dtype
from autopar.models.position import Positions, Tables
from autopar.spec.model import DecoderSpec


@final
@dataclass(frozen=True)
class Alibi(Positions):
    """A head adds slope · key position (times ``scale``) to its scores.

    A constant for each query differs from slope · (key − query) and falls out of the softmax.
    """

    heads: int
    scale: float

    def tables(self, ids: Tensor, like: Tensor) -> Tables:
        """Biases (1 or batch, heads, 1, length)."""
        wide = wide_dtype(like.dtype)
        slopes = alibi_slopes(self.heads, wide, ids.device)
        if self.scale != 1:
            slopes = slopes * self.scale
        return ((slopes.view(-1, 1, 1) * ids.to(wide).unsqueeze(1).unsqueeze(2)).to(like.dtype),)

    def bias(self, scores: Tensor, tables: Tables) -> Tensor:
        return scores + tables[0]


def alibi_slopes(heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One slope for each head: 2^(−8i/n), n the power of two at or below heads; the rest from 2n, every other one."""
    power = 2 ** math.floor(math.log2(heads))
    exponents = torch.arange(1, power + 1, dtype=dtype, device=device) * (-8 / power)
    if power < heads:
        extra = torch.arange(1, 2 * (heads - power), 2, dtype=dtype, device=device) * (-4 / power)
        exponents = torch.cat((exponents, extra))
    return torch.exp2(exponents)


def make(spec: DecoderSpec) -> Alibi:
    """For the spec's heads."""
    scale = spec.attention_scale or spec.head_dim**-0.5
    return Alibi(spec.heads, scale if spec.alibi_scaled else 1.0)
