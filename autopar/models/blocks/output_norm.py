"""Norms of what a sublayer adds, none before it: OLMo 2."""

from __future__ import annotations

from torch import Tensor

from autopar.models.block import Block
from autopar.models.position import Tables


class OutputNormBlock(Block):
    """x + norm(attention(x)), then + norm(mlp(·))."""

    norms = ("attention_post_norm", "mlp_post_norm")

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        hidden = hidden + self.drop(self.attention_post_norm(self.attention(hidden, mask, tables)))
        return hidden + self.drop(self.mlp_post_norm(self.mlp(hidden)))


make = OutputNormBlock
