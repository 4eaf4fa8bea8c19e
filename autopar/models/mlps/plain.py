"""An MLP of two layers."""

from __future__ import annotations

from torch import Tensor, nn

from autopar.models.layers import Linear
from autopar.models.mlp import activation
from autopar.spec.model import DecoderSpec


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, spec: DecoderSpec, ffn: int, output_std: float) -> None:
        super().__init__()
        self.activation = activation(spec)
        self.up = Linear(spec.hidden, ffn, bias=spec.bias.up, std=spec.initializer.std)
        self.down = Linear(ffn, spec.hidden, bias=spec.bias.down, std=output_std)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.activation(self.up(hidden)))


make = MLP
