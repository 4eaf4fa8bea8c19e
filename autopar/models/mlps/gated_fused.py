"""A gated MLP whose gate and up matrices are one, rows gate | up: ChatGLM2, GLM, Phi-3."""

from __future__ import annotations

from torch import Tensor, nn

from autopar.models.layers import Linear
from autopar.models.mlp import activation
from autopar.spec.model import DecoderSpec


class FusedGatedMLP(nn.Module):
    """down(act(gate) · up) with gate | up = gate_up(x)."""

    def __init__(self, spec: DecoderSpec, ffn: int, output_std: float) -> None:
        super().__init__()
        self.activation = activation(spec)
        self.gate_up = Linear(spec.hidden, 2 * ffn, bias=spec.bias.up, std=spec.initializer.std)
        self.down = Linear(ffn, spec.hidden, bias=spec.bias.down, std=output_std)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


make = FusedGatedMLP
