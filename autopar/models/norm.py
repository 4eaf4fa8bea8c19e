"""A spec's norms, over its hidden features or any others."""

from __future__ import annotations

from torch import nn

from autopar.models.parts import part
from autopar.spec.model import DecoderSpec


def norm(spec: DecoderSpec, size: int | None = None) -> nn.Module:
    """The spec's norm over ``size`` (default: hidden) features."""
    made: nn.Module = part("norms", spec.norm)(size or spec.hidden, spec)
    return made
