"""Sinusoidal positions, added to the embedding (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from autopar.models.dtypes import wide_dtype
from autopar.models.position import Positions, Tables
from autopar.spec.model import DecoderSpec

BASE = 10_000.0


@final
class Sinusoidal(Positions):
    """sin and cos of position / 10000^(2i / hidden) in entries 2i and 2i + 1."""

    def added(self, module: nn.Module | None, ids: Tensor, hidden: Tensor) -> Tensor:
        size, wide = hidden.shape[-1], wide_dtype(hidden.dtype)
        rates = BASE ** (torch.arange(0, size, 2, dtype=wide, device=ids.device) / -size)
        angles = ids.unsqueeze(-1).to(wide) * rates
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :size]
        return hidden + waves.to(hidden.dtype)

    def tables(self, ids: Tensor, like: Tensor) -> Tables:
        return ()


def make(spec: DecoderSpec) -> Sinusoidal:
    """Of any length."""
    return Sinusoidal()
