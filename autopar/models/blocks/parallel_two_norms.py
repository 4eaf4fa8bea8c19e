"""Attention and MLP side by side, a norm for each: GPT-NeoX, Falcon 40B and 180B."""

from __future__ import annotations

from torch import Tensor

from autopar.models.block import Block
from autopar.models.position import Tables


class ParallelTwoNormsBlock(Block):
    """x + attention(norm(x)) + mlp(norm'(x))."""

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), mask, tables)
        return hidden + self.drop(self.mlp(self.mlp_norm(hidden)) + attended)


make = ParallelTwoNormsBlock
