"""The two norms of decoders: LayerNorm and RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopar.spec.model import DecoderSpec


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dim; in float32 at least (Zhang and Sennrich 2019; Llama)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(wide_dtype(hidden.dtype))
        variance = wide.pow(2).mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(variance + self.eps)
        return self.weight * wide.to(hidden.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: where published code says float32 against half precision's rounding."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm(spec: DecoderSpec, size: int | None = None) -> nn.Module:
    """The spec's norm over ``size`` (default: hidden) features."""
    size = size or spec.hidden
    if spec.norm == "rmsnorm":
        return RMSNorm(size, spec.norm_eps)
    return nn.LayerNorm(size, spec.norm_eps, bias=spec.bias.norm)
