"""Pre-norm, one sublayer after the other: GPT, Llama, BLOOM, MPT."""

from __future__ import annotations

from torch import Tensor

from autopar.models.block import Block
from autopar.models.position import Tables


class SequentialBlock(Block):
    """x + attention(norm(x)), then + mlp(norm(·))."""

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        hidden = hidden + self.drop(self.attention(self.attention_norm(hidden), mask, tables))
        return hidden + self.drop(self.mlp(self.mlp_norm(hidden)))


make = SequentialBlock
