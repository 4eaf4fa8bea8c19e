"""ChatGLM's post-norm stream: the residual is the norm's output times √(2·layers)."""

from __future__ import annotations

from torch import Tensor

from autopar.models.block import Block
from autopar.models.position import Positions, Tables
from autopar.spec.model import DecoderSpec


class ScaledNormResidualBlock(Block):
    """α · n + attention(n) with n = norm(x), then α · n' + mlp(n') with n' = norm'(·); α = √(2·layers).

    ChatGLM's code also divides each layer's queries by its number and multiplies the scores again, against float16's
    range; that changes nothing in exact arithmetic and is left out.
    """

    def __init__(self, spec: DecoderSpec, positions: Positions, layer: int) -> None:
        super().__init__(spec, positions, layer)
        self.alpha = (2 * spec.layers) ** 0.5

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        normed = self.attention_norm(hidden)
        hidden = normed * self.alpha + self.drop(self.attention(normed, mask, tables))
        normed = self.mlp_norm(hidden)
        return normed * self.alpha + self.drop(self.mlp(normed))


make = ScaledNormResidualBlock
