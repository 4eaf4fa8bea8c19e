"""Whole tensors from the shards of all ranks, on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from autopar.runtime.manifest import Manifest, StageEntry
from autopar.runtime.parameters import Shard
from autopar.runtime.world import World

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def gather(own: list[tuple[str, Shard, torch.Tensor, bool]], shapes: Shapes, world: World) -> dict[str, torch.Tensor]:
    """The whole tensors by name, on the CPU. ``own``: (name, shard, local tensor, whether this rank counts).

    Collective. Every rank lays what it counts into zeros, and the ranks' tensors are summed, which is exact.
    """
    found: dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in shapes.items():
        whole = torch.zeros(shape, dtype=dtype, device=world.device)
        for other, shard, held, counts in own:
            if other == name and counts:
                _lay(whole, shard, held)
        if world.mesh is not None:
            dist.all_reduce(whole)
        found[name] = whole.cpu()
    return found


def buffers(
    manifest: Manifest, stages: list[tuple[int, StageEntry, nn.Module]], world: World
) -> dict[str, torch.Tensor]:
    """The persistent buffers by original name; the first stage that has one gives it."""
    first = {}
    for entry in manifest.stages:
        for item in entry.buffers:
            if item.persistent:
                first.setdefault(item.name, (entry.module, item))
    own = []
    for _, entry, module in stages:
        for item in entry.buffers:
            if item.persistent and first[item.name] == (entry.module, item):
                shard = Shard(item.shape, item.place, world.rank("tp"), world.shape.tp)
                counts = world.copy == 0 and (item.place.sharded or world.rank("tp") == 0)
                value = module.get_buffer(item.path)
                own.append((item.name, shard, value.byte() if value.dtype == torch.bool else value, counts))
    dtypes = {
        n: (i.shape, torch.uint8 if i.torch_dtype == torch.bool else i.torch_dtype) for n, (_, i) in first.items()
    }
    return {n: t.to(first[n][1].torch_dtype) for n, t in gather(own, dtypes, world).items()}


def _lay(whole: torch.Tensor, shard: Shard, held: torch.Tensor) -> None:
    for offset, piece in shard.pieces(held):
        region = whole
        for dim, (start, length) in enumerate(zip(offset, piece.shape, strict=True)):
            region = region.narrow(dim, start, length)
        region.copy_(piece)
