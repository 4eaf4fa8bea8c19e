"""LayerNorm (Ba et al. 2016), its bias as the spec says."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from autopar.spec.model import DecoderSpec


class OffsetLayerNorm(nn.LayerNorm):
    """A LayerNorm whose weight is stored less an offset: (x − mean) / std · (offset + weight) + bias."""

    def __init__(self, size: int, eps: float, offset: float, bias: bool) -> None:
        self.offset = offset  # before the constructor of nn.LayerNorm, which calls reset_parameters
        super().__init__(size, eps, bias=bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight + self.offset, self.bias, self.eps)


def make(size: int, spec: DecoderSpec) -> nn.LayerNorm:
    """Over the last dim of ``size``."""
    if spec.norm_offset:
        return OffsetLayerNorm(size, spec.norm_eps, spec.norm_offset, spec.bias.norm)
    return nn.LayerNorm(size, spec.norm_eps, bias=spec.bias.norm)
