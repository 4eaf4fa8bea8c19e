"""Rotations of queries and keys by their positions (Su et al. 2021), on all or the first entries of a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autopar.models.dtypes import wide_dtype
from autopar.models.parts import part
from autopar.models.position import Positions, Tables
from autopar.spec.model import DecoderSpec, RopeScaling


@dataclass(frozen=True)
class Wave:
    """What a scaling may look at. ``length``: the original context, in tokens; ``now``: the sequence's own."""

    size: int
    theta: float
    length: int
    now: int | torch.SymInt
    scaling: RopeScaling


@dataclass(frozen=True)
class Rotary(Positions):
    """Rotary positions on the first ``size`` of ``head_dim`` entries; ``length`` is the context that scaling stretches."""

    size: int
    head_dim: int
    theta: float
    interleaved: bool
    scaling: RopeScaling | None
    length: int

    @classmethod
    def of(cls, spec: DecoderSpec, heads: int = 1) -> Rotary:
        """The spec's, on a head's ``heads``-th part."""
        rope = spec.rope
        length = (rope.scaling.original_length if rope.scaling else None) or spec.max_length
        size, head_dim = spec.rotary_dim // heads, spec.head_dim // heads
        return cls(size, head_dim, rope.theta, rope.style == "interleaved", rope.scaling, length)

    def tables(self, ids: Tensor, like: Tensor) -> Tables:
        """cos and sin, each (1 or batch, 1, length, size)."""
        return tuple(t.to(like.dtype).unsqueeze(1) for t in self._angles(ids, wide_dtype(like.dtype)))

    def rotate(self, x: Tensor, tables: Tables) -> Tensor:
        cos, sin = tables
        if self.size == self.head_dim:
            return turn(x, cos, sin, self.interleaved)
        turned, rest = x[..., : self.size], x[..., self.size :]
        return torch.cat((turn(turned, cos, sin, self.interleaved), rest), dim=-1)

    def _angles(self, ids: Tensor, wide: torch.dtype) -> Tables:
        frequencies, factor = self.frequencies(ids.shape[-1], wide, ids.device)
        angles = ids.unsqueeze(-1).to(wide) * frequencies
        angles = (
            torch.stack((angles, angles), dim=-1).flatten(-2) if self.interleaved else torch.cat((angles, angles), -1)
        )
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    def frequencies(self, now: int | torch.SymInt, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
        """θ^(−2i/size) for i < size/2, in radians per position, scaled; and the factor on cos and sin.

        ``now``: the length of the sequences, in tokens.
        """
        plain = self.theta ** (torch.arange(0, self.size, 2, dtype=dtype, device=device) / -self.size)
        if self.scaling is None:
            return plain, 1.0
        wave = Wave(self.size, self.theta, self.length, now, self.scaling)
        scaled: tuple[Tensor, float] = part("scalings", self.scaling.kind)(plain, wave)
        return scaled


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs (i, i + half), or interleaved (2i, 2i + 1), of the last dim by the angle of cos and sin."""
    if interleaved:
        swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        swapped = torch.cat((-second, first), dim=-1)
    return x * cos + swapped * sin
