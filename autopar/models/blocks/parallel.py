"""One norm feeds attention and MLP side by side: GPT-J, PaLM, Falcon 7B."""

from __future__ import annotations

from torch import Tensor

from autopar.models.block import Block
from autopar.models.position import Tables


class ParallelBlock(Block):
    """x + attention(n) + mlp(n) with n = norm(x)."""

    norms = ("attention_norm",)

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        normed = self.attention_norm(hidden)
        return hidden + self.drop(self.mlp(normed) + self.attention(normed, mask, tables))


make = ParallelBlock
