"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from autopar.models.parts import part
from autopar.spec.model import GATED, DecoderSpec


def activation(spec: DecoderSpec) -> Callable[[Tensor], Tensor]:
    """The spec's activation, elementwise (of a gated unit: what it does to the gate)."""
    return part("activations", GATED.get(spec.activation, spec.activation))


def mlp(spec: DecoderSpec, layer: int, output_std: float) -> nn.Module:
    """The feed-forward part of block number ``layer``; ``output_std``: the deviation of the weights that end it."""
    made: nn.Module = part("mlps", choice(spec, layer))(spec, spec.ffn, output_std)
    return made


def choice(spec: DecoderSpec, layer: int) -> str:
    """Which part of `mlps` the spec's fields describe."""
    if spec.mixes(layer):
        return "experts"
    if spec.gated:
        return "gated_fused" if spec.fused_gate_up else "gated"
    return "plain"
