"""One block of a decoder: attention and MLP around the residual stream, one after the other or side by side."""

from __future__ import annotations

from torch import Tensor, nn

from autopar.models.attention import attention
from autopar.models.mlp import mlp
from autopar.models.norms import norm
from autopar.models.positions import Positions, Tables
from autopar.spec.model import DecoderSpec


class Block(nn.Module):
    """The parts that every kind of block has; the subclasses connect them."""

    def __init__(self, spec: DecoderSpec, positions: Positions) -> None:
        super().__init__()
        std = spec.initializer.std
        output_std = std / (2 * spec.layers) ** 0.5 if spec.initializer.scale_residual else std
        self.attention_norm = norm(spec)
        self.attention = attention(spec, positions, output_std)
        self.mlp = mlp(spec, output_std)
        self.dropout = nn.Dropout(spec.dropout.hidden) if spec.dropout.hidden else None

    def drop(self, hidden: Tensor) -> Tensor:
        return hidden if self.dropout is None else self.dropout(hidden)


class SequentialBlock(Block):
    """x + attention(norm(x)), then + mlp(norm(·)): pre-norm."""

    def __init__(self, spec: DecoderSpec, positions: Positions) -> None:
        super().__init__(spec, positions)
        self.mlp_norm = norm(spec)

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        hidden = hidden + self.drop(self.attention(self.attention_norm(hidden), mask, tables))
        return hidden + self.drop(self.mlp(self.mlp_norm(hidden)))


class ScaledNormResidualBlock(SequentialBlock):
    """GLM: as the sequential block, but the residual is the norm's output times √(2·layers).

    ChatGLM's code also divides each layer's queries by its number and multiplies the scores again, against float16's
    range; that changes nothing in exact arithmetic and is left out.
    """

    def __init__(self, spec: DecoderSpec, positions: Positions) -> None:
        super().__init__(spec, positions)
        self.alpha = (2 * spec.layers) ** 0.5

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        normed = self.attention_norm(hidden)
        hidden = normed * self.alpha + self.drop(self.attention(normed, mask, tables))
        normed = self.mlp_norm(hidden)
        return normed * self.alpha + self.drop(self.mlp(normed))


class ParallelBlock(Block):
    """x + attention(n) + mlp(n) with n = norm(x): Falcon 7B."""

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        normed = self.attention_norm(hidden)
        return hidden + self.drop(self.mlp(normed) + self.attention(normed, mask, tables))


class ParallelTwoNormsBlock(Block):
    """x + attention(norm(x)) + mlp(norm'(x)): Falcon 40B and 180B."""

    def __init__(self, spec: DecoderSpec, positions: Positions) -> None:
        super().__init__(spec, positions)
        self.mlp_norm = norm(spec)

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), mask, tables)
        return hidden + self.drop(self.mlp(self.mlp_norm(hidden)) + attended)


_KINDS = {
    "sequential": SequentialBlock,
    "scaled_norm_residual": ScaledNormResidualBlock,
    "parallel": ParallelBlock,
    "parallel_two_norms": ParallelTwoNormsBlock,
}


def block(spec: DecoderSpec, positions: Positions) -> Block:
    """A block of the spec's kind."""
    return _KINDS[spec.block](spec, positions)
