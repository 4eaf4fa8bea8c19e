"""DeepNorm: post-norm with a larger residual and smaller first weights (Wang et al. 2022)."""

from __future__ import annotations

from torch import Tensor

from autopar.models.block import Block
from autopar.models.position import Positions, Tables
from autopar.spec.model import DecoderSpec


class DeepNormBlock(Block):
    """norm(α · x + attention(x)), then norm(α · · + mlp(·)); α = (2·layers)^¼, for decoders (figure 2 of the paper).

    The weights that end a sublayer start smaller by β = (8·layers)^−¼.
    """

    def __init__(self, spec: DecoderSpec, positions: Positions, layer: int) -> None:
        super().__init__(spec, positions, layer)
        self.alpha = (2 * spec.layers) ** 0.25

    def spread(self, spec: DecoderSpec) -> float:
        return spec.initializer.std * (8 * spec.layers) ** -0.25

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        hidden = self.attention_norm(hidden * self.alpha + self.drop(self.attention(hidden, mask, tables)))
        return self.mlp_norm(hidden * self.alpha + self.drop(self.mlp(hidden)))


make = DeepNormBlock
