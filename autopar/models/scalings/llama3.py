"""Llama 3.1's scaling: the long waves are slower by the factor, the short ones as they were, those between in between."""

from __future__ import annotations

import math

from torch import Tensor

from autopar.models.rotary import Wave


def make(frequencies: Tensor, wave: Wave) -> tuple[Tensor, float]:
    """By how often a wave turns over the original context: below the low factor slowed, above the high one kept."""
    scaling = wave.scaling
    turns = wave.length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor), 1.0
