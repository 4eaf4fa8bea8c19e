"""Stochastic rounding to bfloat16: without float32 copies, small updates are kept on average instead of being lost."""

from __future__ import annotations

import math

import torch

from autopar.runtime.parameters import Held
from autopar.runtime.seeds import seed_of

LOW = 16  # bits of a float32 that bfloat16 has not
# The finalizer of MurmurHash3 for 64 bits (Appleby, public domain): every bit of the input changes half of the output.
_FIRST, _SECOND, _SHIFT = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64, 33


def round_into(held: Held, exact: torch.Tensor, seed: int, update: int) -> None:
    """Write ``exact`` (float32, of the local shape) into a bfloat16 parameter, rounded up with a probability of the
    distance to the value below (Gupta et al. 2015, arXiv:1502.02551).

    The random bits follow from seed, update, the parameter's name and an element's place in the whole tensor alone: so
    copies on several ranks stay equal, and every plan rounds alike.
    """
    start = seed_of(seed, f"{update}/{held.name}")
    for (_, target), (offset, source) in zip(
        held.shard.pieces(held.local), held.shard.pieces(exact.view(held.local.shape)), strict=True
    ):
        noise = bits(start, held.shard.shape, offset, tuple(source.shape), source.device)
        raised = (source.contiguous().view(torch.int32) + noise) >> LOW << LOW
        target.copy_(torch.where(torch.isfinite(source), raised.view(torch.float32), source))


def bits(
    start: int, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """16 random bits (int32, 0 to 65535) for each element of the rectangle of ``shape`` at ``offset`` of a tensor."""
    place = torch.zeros((), dtype=torch.int64, device=device)
    for dim, (first, length) in enumerate(zip(offset, shape, strict=True)):
        stride = math.prod(whole[dim + 1 :])
        index = torch.arange(first, first + length, device=device, dtype=torch.int64) * stride
        place = place.unsqueeze(-1) + index
    mixed = _mixed(_mixed(place ^ start) + start)
    return (mixed & (2**LOW - 1)).to(torch.int32)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    for factor in (_FIRST, _SECOND):
        x = x ^ ((x >> _SHIFT) & (2**31 - 1))
        x = x * factor
    return x ^ ((x >> _SHIFT) & (2**31 - 1))
