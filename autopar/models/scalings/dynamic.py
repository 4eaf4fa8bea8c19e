"""Dynamic NTK: beyond the original context, θ grows with the length of the sequence so that the slowest wave just fits."""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.models.rotary import Wave


def make(frequencies: Tensor, wave: Wave) -> tuple[Tensor, float]:
    """θ · (factor · length / original − (factor − 1))^(size / (size − 2)), length at least the original's.

    The length is the batch's sequence length; padding and packed documents count.
    """
    factor, size = wave.scaling.factor, wave.size
    now = torch.full((), wave.now, dtype=frequencies.dtype, device=frequencies.device).clamp(min=wave.length)
    theta = wave.theta * (factor * now / wave.length - (factor - 1)) ** (size / (size - 2))
    steps = torch.arange(0, size, 2, dtype=frequencies.dtype, device=frequencies.device) / -size
    return theta**steps, 1.0
