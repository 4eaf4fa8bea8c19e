"""Post-norm: the norm comes after the sum (Vaswani et al. 2017)."""

from __future__ import annotations

from torch import Tensor

from autopar.models.block import Block
from autopar.models.position import Tables


class PostNormBlock(Block):
    """norm(x + attention(x)), then norm(· + mlp(·))."""

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        hidden = self.attention_norm(hidden + self.drop(self.attention(hidden, mask, tables)))
        return self.mlp_norm(hidden + self.drop(self.mlp(hidden)))


make = PostNormBlock
