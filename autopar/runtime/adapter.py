"""Adapters of a build folder: written in peft's format from a running engine or a checkpoint, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_shards

from autopar.errors import CheckpointError
from autopar.ir import adapters as files
from autopar.runtime import checkpoint
from autopar.runtime.gather import gather

if TYPE_CHECKING:
    from autopar.runtime.engine import Engine

LISTED = "adapters.json"  # in a build folder: what its program's PEFT passes train


def listed(folder: Path) -> list[files.Adapter]:
    """The adapters of a build folder; none where no PEFT pass ran."""
    path = folder / LISTED
    return files.parse(path.read_text()) if path.exists() else []


def save(engine: Engine, folder: Path) -> Path:
    """Write the adapter from what the ranks hold; only its own tensors are gathered. Collective."""
    found = listed(engine.folder)
    names = {n for a in found for n in a.parameters}
    own = [h for h in engine.held if h.name in names]
    entries = [e for s in engine.manifest.stages for e in s.parameters]
    shapes = {n: (e.shape, e.torch_dtype) for e in entries if (n := engine.manifest.canonical(e.name)) in names}
    tensors = gather([(h.name, h.shard, h.local, h.owned) for h in own], shapes, engine.world)
    problem = ""
    if engine.world.first:
        try:
            files.save(found, tensors, folder)
        except (OSError, CheckpointError) as error:
            problem = str(error)
    if problem := engine.world.first_error(problem):
        raise CheckpointError(f"{folder}: the adapter could not be written ({problem})")
    return folder


@torch.no_grad()
def load(engine: Engine, folder: Path) -> None:
    """Fill the adapter's parameters on every rank, each with its own part. Collective."""
    shapes = {engine.manifest.canonical(e.name): e.shape for s in engine.manifest.stages for e in s.parameters}
    values = files.load(listed(engine.folder), shapes, folder)
    for held in engine.held:
        if held.name in values:
            value = values[held.name]
            for offset, piece in held.shard.pieces(held.local):
                part = value[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))]
                piece.copy_(part)


def of_checkpoint(folder: Path, path: Path) -> dict[str, torch.Tensor]:
    """The adapter's parameters as a checkpoint of this build folder has them, whole, on the CPU of one process."""
    names = sorted({n for a in listed(folder) for n in a.parameters})
    found = checkpoint.locate(path)
    stored = checkpoint.metadata_of(found).state_dict_metadata
    wanted: dict[str, torch.Tensor] = {}
    for name in names:
        item = stored.get(f"model.{name}")
        if not isinstance(item, TensorStorageMetadata):
            raise CheckpointError(f"{found}: it does not hold {name}, which the adapter of {folder} consists of")
        wanted[f"model.{name}"] = torch.empty(tuple(item.size), dtype=item.properties.dtype)
    with checkpoint.quiet():
        read_shards(dict(wanted), checkpoint_id=found, no_dist=True)
    return {n: wanted[f"model.{n}"] for n in names}
