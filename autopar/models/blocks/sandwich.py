"""Norms before and after every sublayer: CogView, Gemma 2."""

from __future__ import annotations

from torch import Tensor

from autopar.models.block import Block
from autopar.models.position import Tables


class SandwichBlock(Block):
    """x + norm(attention(norm(x))), then + norm(mlp(norm(·)))."""

    norms = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), mask, tables)
        hidden = hidden + self.drop(self.attention_post_norm(attended))
        return hidden + self.drop(self.mlp_post_norm(self.mlp(self.mlp_norm(hidden))))


make = SandwichBlock
