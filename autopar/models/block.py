"""One block of a decoder: attention and MLP around the residual stream."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from autopar.models.attention import attention
from autopar.models.mlp import mlp
from autopar.models.norm import norm
from autopar.models.parts import part
from autopar.models.position import Positions, Tables
from autopar.spec.model import DecoderSpec


class Block(nn.Module):
    """The parts that every kind of block has, and a norm for each name in ``norms``; the kinds connect them."""

    norms: tuple[str, ...] = ("attention_norm", "mlp_norm")

    def __init__(self, spec: DecoderSpec, positions: Positions, layer: int) -> None:
        super().__init__()
        std = self.spread(spec)
        output_std = std / (2 * spec.layers) ** 0.5 if spec.initializer.scale_residual else std
        self.attention_norm = norm(spec) if "attention_norm" in self.norms else None
        self.attention = attention(spec, positions, output_std)
        self.mlp = mlp(spec, layer, output_std)
        self.dropout = nn.Dropout(spec.dropout.hidden) if spec.dropout.hidden else None
        self.residual_scale = spec.residual_scale
        for name in self.norms:
            if name != "attention_norm":
                setattr(self, name, norm(spec))

    def spread(self, spec: DecoderSpec) -> float:
        """The deviation of the weights at the end of a sublayer, before `scale_residual`."""
        return spec.initializer.std

    @abstractmethod
    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        """hidden (batch, length, hidden) after the block; mask and tables as attention takes them."""

    def drop(self, hidden: Tensor) -> Tensor:
        """What a sublayer adds to the residual: dropped out and scaled as the spec says."""
        hidden = hidden if self.dropout is None else self.dropout(hidden)
        return hidden if self.residual_scale == 1 else hidden * self.residual_scale


def block(spec: DecoderSpec, positions: Positions, layer: int) -> Block:
    """Block number ``layer`` (from 0) of the spec's kind."""
    made: Block = part("blocks", spec.block)(spec, positions, layer)
    return made
