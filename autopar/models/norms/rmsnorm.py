"""RMSNorm (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopar.models.dtypes import wide_dtype
from autopar.spec.model import DecoderSpec


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dim; in float32 at least (Llama's published code)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * self.normed(hidden).to(hidden.dtype)

    def normed(self, hidden: Tensor) -> Tensor:
        """x / √(mean(x²) + eps), in float32 at least."""
        wide = hidden.to(wide_dtype(hidden.dtype))
        variance = wide.pow(2).mean(-1, keepdim=True)
        return wide * torch.rsqrt(variance + self.eps)


class OffsetRMSNorm(RMSNorm):
    """Gemma's: multiplied by offset + weight before it is rounded (weights start at 1 − offset)."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        self.offset = offset
        super().__init__(size, eps)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = self.normed(hidden)
        return (wide * (self.offset + self.weight.to(wide.dtype))).to(hidden.dtype)


def make(size: int, spec: DecoderSpec) -> RMSNorm:
    """Over the last dim of ``size``."""
    if spec.norm_offset:
        return OffsetRMSNorm(size, spec.norm_eps, spec.norm_offset)
    return RMSNorm(size, spec.norm_eps)
