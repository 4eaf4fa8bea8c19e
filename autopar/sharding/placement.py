"""Where the parts of a tensor live along one mesh axis: Replicate, Partial, or Shard, also of fused pieces."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

Kind = str
_TEXT = re.compile(r"S\((\d+)(?:\|([\d,]+))?\)")


@dataclass(frozen=True)
class Placement:
    """One tensor along one axis.

    kind "R": every device holds all of it. "P": the devices' tensors sum to it. "S": split along ``dim``; with
    ``pieces`` the dim is a concatenation of pieces of these sizes, each split evenly (fused q, k, v in one matrix).
    """

    kind: Kind
    dim: int = -1
    pieces: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind != "S":
            return self.kind
        return f"S({self.dim}|{','.join(map(str, self.pieces))})" if self.pieces else f"S({self.dim})"

    __repr__ = __str__

    @property
    def sharded(self) -> bool:
        return self.kind == "S"


R = Placement("R")
P = Placement("P")


def S(dim: int, pieces: tuple[int, ...] = ()) -> Placement:
    """Split along ``dim``; one single piece is the plain, contiguous split."""
    return Placement("S", dim, tuple(pieces) if len(pieces) > 1 else ())


def parse(text: str) -> Placement:
    """The inverse of ``str``."""
    if text in ("R", "P"):
        return Placement(text)
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no placement; write R, P, S(0) or S(0|64,32,32)")
    return S(int(match[1]), tuple(map(int, match[2].split(","))) if match[2] else ())


def divides(placement: Placement, shape: tuple[int, ...], degree: int) -> bool:
    """Whether a tensor of this shape can be placed so on ``degree`` devices, evenly."""
    if not placement.sharded:
        return True
    if placement.dim >= len(shape):
        return False
    size = shape[placement.dim]
    if placement.pieces:
        return sum(placement.pieces) == size and all(p % degree == 0 for p in placement.pieces)
    return size % degree == 0 and size >= degree


def local_shape(placement: Placement, shape: tuple[int, ...], degree: int) -> tuple[int, ...]:
    """The shape one device holds of a tensor of the (global) shape."""
    if not placement.sharded:
        return tuple(shape)
    dim = placement.dim
    return (*shape[:dim], shape[dim] // degree, *shape[dim + 1 :])


def local(placement: Placement, tensor: torch.Tensor, rank: int, degree: int) -> torch.Tensor:
    """What device ``rank`` holds of the whole tensor (a partial sum: all of it on device 0, zeros elsewhere)."""
    if placement.kind == "P":
        return tensor if rank == 0 else torch.zeros_like(tensor)
    if placement.kind == "R":
        return tensor
    pieces = placement.pieces or (tensor.shape[placement.dim],)
    parts = [p.chunk(degree, placement.dim)[rank] for p in tensor.split(list(pieces), placement.dim)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, placement.dim)


def glue(placement: Placement, shards: list[torch.Tensor]) -> torch.Tensor:
    """The whole tensor from what every device holds; the inverse of `local`."""
    if placement.kind == "R":
        return shards[0]
    if placement.kind == "P":
        return torch.stack(shards).sum(0)
    if not placement.pieces:
        return torch.cat(shards, placement.dim)
    n, dim = len(shards), placement.dim
    split = [s.split([p // n for p in placement.pieces], dim) for s in shards]
    return torch.cat([split[r][i] for i in range(len(placement.pieces)) for r in range(n)], dim)


def extents(placement: Placement, shape: tuple[int, ...], rank: int, degree: int) -> list[tuple[int, int, int]]:
    """Contiguous runs of dim ``placement.dim`` that ``rank`` holds: (global offset, local offset, length)."""
    if not placement.sharded:
        return []
    runs, start, at = [], 0, 0
    for piece in placement.pieces or (shape[placement.dim],):
        each = piece // degree
        runs.append((start + rank * each, at, each))
        start, at = start + piece, at + each
    return runs
