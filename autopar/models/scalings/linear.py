"""Position interpolation (Chen et al. 2023): every wave slower by the factor."""

from __future__ import annotations

from torch import Tensor

from autopar.models.rotary import Wave


def make(frequencies: Tensor, wave: Wave) -> tuple[Tensor, float]:
    """Frequencies / factor."""
    return frequencies / wave.scaling.factor, 1.0
