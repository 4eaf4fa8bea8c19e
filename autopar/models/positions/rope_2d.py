"""ChatGLM's rotary positions in two dimensions: place in the text, and place in the blank that is filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from autopar.models.position import Positions, Tables
from autopar.models.rotary import Rotary
from autopar.spec.model import DecoderSpec


@final
@dataclass(frozen=True)
class Rotary2D(Positions):
    """The first half of a head turns with one position, the second half with another."""

    half: Rotary

    def tables(self, ids: Tensor, like: Tensor) -> Tables:
        """cos and sin for each half, (1 or batch, 1, length, head_dim / 2), of positions (1 or batch, 2, length).

        One-dimensional ids count as the first position, beside a second that stays 0: text without a prompt.
        """
        first, second = (ids, torch.zeros_like(ids)) if ids.dim() == 2 else (ids[:, 0], ids[:, 1])
        return (*self.half.tables(first, like), *self.half.tables(second, like))

    def rotate(self, x: Tensor, tables: Tables) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((self.half.rotate(first, tables[:2]), self.half.rotate(second, tables[2:])), dim=-1)


def make(spec: DecoderSpec) -> Rotary2D:
    """On the rope's fraction of each half of a head."""
    return Rotary2D(Rotary.of(spec, heads=2))
