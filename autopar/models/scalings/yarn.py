"""YaRN (Peng et al. 2023): long waves interpolated, short ones kept, by dim; cos and sin a little larger."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autopar.models.rotary import Wave


def make(frequencies: Tensor, wave: Wave) -> tuple[Tensor, float]:
    """A ramp over the dims from beta_fast to beta_slow turns over the original context (section 3.2, section 3.4)."""
    scaling = wave.scaling
    low, high = _dim(scaling.beta_fast, wave), _dim(scaling.beta_slow, wave)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, wave.size - 1)
    width = high - low or 0.001
    dims = torch.arange(wave.size // 2, dtype=frequencies.dtype, device=frequencies.device)
    slowed = ((dims - low) / width).clamp(0, 1)
    factor = scaling.factor
    grown = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return frequencies * (1 - slowed + slowed / factor), scaling.attention_factor or grown


def _dim(turns: float, wave: Wave) -> float:
    """The dim (not whole) whose wave turns that often over the original context."""
    return wave.size * math.log(wave.length / (turns * 2 * math.pi)) / (2 * math.log(wave.theta))
