"""What this rank holds of the model's parameters: local shards, their place in the whole, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from autopar.runtime.manifest import Manifest, ParameterEntry, StageEntry
from autopar.runtime.world import World
from autopar.sharding.placement import Placement, extents, local_shape

Piece = tuple[tuple[int, ...], torch.Tensor]  # offset in the whole tensor, and a view of what lies there


@dataclass(frozen=True)
class Shard:
    """Which part of a whole tensor a rank holds: its share along tp, of that the rows ``rows`` along dp."""

    shape: tuple[int, ...]
    placement: Placement
    tp_rank: int
    tp: int
    rows: tuple[int, int] | None = None  # first row and number of rows of the share along tp; None: all

    @property
    def share(self) -> tuple[int, ...]:
        """The shape of the share along tp."""
        return local_shape(self.placement, self.shape, self.tp)

    def pieces(self, held: torch.Tensor) -> list[Piece]:
        """The contiguous rectangles of the whole that ``held`` (the local tensor) consists of; views, never copies."""
        if not self.shape:
            return [((), held)]
        row, count = self.rows or (0, self.share[0])
        offset = [0] * len(self.shape)
        offset[0] = row
        runs = extents(self.placement, self.shape, self.tp_rank, self.tp)
        if not runs:
            return [(tuple(offset), held)] if held.numel() else []
        dim, found = self.placement.dim, []
        for start, at, length in runs:
            if dim == 0:
                low, high = max(at, row), min(at + length, row + count)
                start, at, length = start + low - at, low - row, high - low
            if length > 0 and held.numel():
                found.append(((*offset[:dim], start, *offset[dim + 1 :]), held.narrow(dim, at, length)))
        return found


@dataclass(frozen=True)
class Held:
    """One parameter of one stage on this rank. ``name`` is canonical: tied copies share it."""

    name: str
    entry: ParameterEntry
    parameter: nn.Parameter
    shard: Shard
    owned: bool  # whether this rank counts it in sums over the mesh: exactly one rank does for every element

    @property
    def local(self) -> torch.Tensor:
        """The plain local tensor, outside autograd; changing it changes the parameter."""
        return plain(self.parameter).detach()

    @property
    def grad(self) -> torch.Tensor | None:
        return None if self.parameter.grad is None else plain(self.parameter.grad).detach()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor, any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """First row and number of rows that FSDP left on this rank; None for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return None
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0]) if shape[0] else 0, int(shape[0])


def held_by(stages: list[tuple[StageEntry, nn.Module]], manifest: Manifest, world: World) -> list[Held]:
    """Everything that the stages of this rank hold, in order. Later copies of a tied tensor are not owned."""
    first = {}  # canonical name → the (stage, path) that counts, over all stages and not only those of this rank
    for entry in manifest.stages:
        for item in entry.parameters:
            first.setdefault(manifest.canonical(item.name), (entry.module, item.path))
    return [_held(entry, module, item, manifest, world, first) for entry, module in stages for item in entry.parameters]


def _held(
    stage: StageEntry, module: nn.Module, item: ParameterEntry, manifest: Manifest, world: World, first: dict
) -> Held:
    parameter = module.get_parameter(item.path)
    name, rows = manifest.canonical(item.name), rows_of(parameter)
    shard = Shard(item.shape, item.place, world.rank("tp"), world.shape.tp, rows)
    owned = first[name] == (stage.module, item.path)
    copy = world.copy if rows is None else world.replica
    owned = owned and (item.place.sharded or world.rank("tp") == 0) and copy == 0
    return Held(name, item, parameter, shard, owned)


def copies(manifest: Manifest) -> Iterator[tuple[str, list[tuple[int, ParameterEntry]]]]:
    """Canonical names that occur more than once over all stages, with their (stage index, entry)."""
    found: dict[str, list[tuple[int, ParameterEntry]]] = {}
    for i, stage in enumerate(manifest.stages):
        for item in stage.parameters:
            found.setdefault(manifest.canonical(item.name), []).append((i, item))
    yield from ((name, where) for name, where in found.items() if len(where) > 1)
