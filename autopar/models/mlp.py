"""The feed-forward part of a block, plain or gated."""

from __future__ import annotations

from torch import Tensor, nn

from autopar.models.activations import activate
from autopar.models.layers import Linear
from autopar.spec.model import DecoderSpec


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, spec: DecoderSpec, output_std: float) -> None:
        super().__init__()
        self.activation = spec.activation
        self.up = Linear(spec.hidden, spec.ffn, bias=spec.bias.up, std=spec.initializer.std)
        self.down = Linear(spec.ffn, spec.hidden, bias=spec.bias.down, std=output_std)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(activate(self.activation, self.up(hidden)))


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, spec: DecoderSpec, output_std: float) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate = Linear(spec.hidden, spec.ffn, bias=spec.bias.up, std=spec.initializer.std)
        self.up = Linear(spec.hidden, spec.ffn, bias=spec.bias.up, std=spec.initializer.std)
        self.down = Linear(spec.ffn, spec.hidden, bias=spec.bias.down, std=output_std)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(activate(self.activation, self.gate(hidden)) * self.up(hidden))


class FusedGatedMLP(nn.Module):
    """A gated MLP whose gate and up matrices are one, rows gate | up (ChatGLM2)."""

    def __init__(self, spec: DecoderSpec, output_std: float) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate_up = Linear(spec.hidden, 2 * spec.ffn, bias=spec.bias.up, std=spec.initializer.std)
        self.down = Linear(spec.ffn, spec.hidden, bias=spec.bias.down, std=output_std)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(activate(self.activation, gate) * up)


def mlp(spec: DecoderSpec, output_std: float) -> nn.Module:
    """The spec's feed-forward part."""
    if not spec.gated:
        return MLP(spec, output_std)
    return (FusedGatedMLP if spec.fused_gate_up else GatedMLP)(spec, output_std)
