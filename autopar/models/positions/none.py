"""No positions at all: what the causal mask tells is all there is."""

from __future__ import annotations

from typing import final

from torch import Tensor

from autopar.models.position import Positions, Tables
from autopar.spec.model import DecoderSpec


@final
class NoPositions(Positions):
    """Positions do not reach the model."""

    def tables(self, ids: Tensor, like: Tensor) -> Tables:
        return ()


def make(spec: DecoderSpec) -> NoPositions:
    """Nothing to set."""
    return NoPositions()
