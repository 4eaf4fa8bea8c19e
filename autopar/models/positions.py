"""How attention learns of positions: rotary (also in two dimensions) or ALiBi. Tables are computed once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from autopar.models.norms import wide_dtype
from autopar.spec.model import DecoderSpec, RopeScaling

Tables = tuple[Tensor, ...]


class Positions(ABC):
    """What a decoder computes from its positions once, and what each attention does with it. Holds no tensors."""

    @abstractmethod
    def tables(self, ids: Tensor, dtype: torch.dtype) -> Tables:
        """Tensors that every block reads, from positions ``ids`` (1 or batch, length)."""

    def rotate(self, x: Tensor, tables: Tables) -> Tensor:
        """Queries or keys (batch, heads, length, head_dim) with their positions in them."""
        return x

    def bias(self, scores: Tensor, tables: Tables) -> Tensor:
        """Scores (batch, heads, length, length) with their positions in them."""
        return scores


@final
class NoPositions(Positions):
    """Positions do not reach attention (learned ones are added to the embedding)."""

    def tables(self, ids: Tensor, dtype: torch.dtype) -> Tables:
        return ()


@final
@dataclass(frozen=True)
class Rotary(Positions):
    """Rotary positions (Su et al. 2021) on the first ``size`` entries of a head."""

    size: int
    head_dim: int
    theta: float
    interleaved: bool
    scaling: RopeScaling | None

    def tables(self, ids: Tensor, dtype: torch.dtype) -> Tables:
        """cos and sin, each (1 or batch, 1, length, size)."""
        return tuple(t.to(dtype).unsqueeze(1) for t in self._angles(ids, dtype))

    def rotate(self, x: Tensor, tables: Tables) -> Tensor:
        cos, sin = tables
        if self.size == self.head_dim:
            return turn(x, cos, sin, self.interleaved)
        turned, rest = x[..., : self.size], x[..., self.size :]
        return torch.cat((turn(turned, cos, sin, self.interleaved), rest), dim=-1)

    def _angles(self, ids: Tensor, dtype: torch.dtype) -> Tables:
        wide = wide_dtype(dtype)
        frequencies = inverse_frequencies(self.size, self.theta, self.scaling, wide, ids.device)
        angles = ids.unsqueeze(-1).to(wide) * frequencies
        angles = (
            torch.stack((angles, angles), dim=-1).flatten(-2) if self.interleaved else torch.cat((angles, angles), -1)
        )
        return angles.cos(), angles.sin()


@final
@dataclass(frozen=True)
class Rotary2D(Positions):
    """ChatGLM's rotary positions: the first half of a head turns with one position, the second half with another."""

    half: Rotary

    def tables(self, ids: Tensor, dtype: torch.dtype) -> Tables:
        """cos and sin for each half, (1 or batch, 1, length, head_dim / 2), of positions (1 or batch, 2, length).

        One-dimensional ids count as the first position, beside a second that stays 0: text without a prompt.
        """
        first, second = (ids, torch.zeros_like(ids)) if ids.dim() == 2 else (ids[:, 0], ids[:, 1])
        return (*self.half.tables(first, dtype), *self.half.tables(second, dtype))

    def rotate(self, x: Tensor, tables: Tables) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((self.half.rotate(first, tables[:2]), self.half.rotate(second, tables[2:])), dim=-1)


@final
@dataclass(frozen=True)
class Alibi(Positions):
    """Attention with linear biases (Press et al. 2022): a head adds slope · key position to its scores.

    A constant for each query differs from slope · (key − query) and falls out of the softmax.
    """

    heads: int

    def tables(self, ids: Tensor, dtype: torch.dtype) -> Tables:
        """Biases (1 or batch, heads, 1, length)."""
        wide = wide_dtype(dtype)
        slopes = alibi_slopes(self.heads, wide, ids.device)
        return ((slopes.view(-1, 1, 1) * ids.to(wide).unsqueeze(1).unsqueeze(2)).to(dtype),)

    def bias(self, scores: Tensor, tables: Tables) -> Tensor:
        return scores + tables[0]


def positions(spec: DecoderSpec) -> Positions:
    """The spec's positions as attention sees them."""
    rope, interleaved = spec.rope, spec.rope.style == "interleaved"
    if spec.positions == "rope":
        return Rotary(spec.rotary_dim, spec.head_dim, rope.theta, interleaved, rope.scaling)
    if spec.positions == "rope_2d":
        return Rotary2D(Rotary(spec.rotary_dim // 2, spec.head_dim // 2, rope.theta, interleaved, rope.scaling))
    return Alibi(spec.heads) if spec.positions == "alibi" else NoPositions()


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs (i, i + half), or interleaved (2i, 2i + 1), of the last dim by the angle of cos and sin."""
    if interleaved:
        swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        swapped = torch.cat((-second, first), dim=-1)
    return x * cos + swapped * sin


def inverse_frequencies(
    size: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """θ^(−2i/size) for i < size/2, in radians per position; Llama 3.1's scaling slows the long waves."""
    frequencies = theta ** (torch.arange(0, size, 2, dtype=dtype, device=device) / -size)
    if scaling is None:
        return frequencies
    turns = scaling.original_length * frequencies / (2 * math.pi)  # over the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def alibi_slopes(heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One slope for each head: 2^(−8i/n), n the power of two at or below heads; the rest from 2n, every other one."""
    power = 2 ** math.floor(math.log2(heads))
    exponents = torch.arange(1, power + 1, dtype=dtype, device=device) * (-8 / power)
    if power < heads:
        extra = torch.arange(1, 2 * (heads - power), 2, dtype=dtype, device=device) * (-4 / power)
        exponents = torch.cat((exponents, extra))
    return torch.exp2(exponents)
