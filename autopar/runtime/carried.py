"""State that stages carry from step to step: noted by their operators, agreed over the ranks, moved on once a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from autopar.runtime.manifest import BufferEntry, Manifest, StageEntry
from autopar.runtime.world import World


@dataclass(frozen=True)
class Carried:
    """One state of one stage of this rank; whole on every rank, and the same on all that run the stage."""

    entry: BufferEntry
    tensor: torch.Tensor


def carried_by(stages: Iterable[tuple[StageEntry, nn.Module]]) -> list[Carried]:
    """The states of the stages that this rank runs."""
    return [Carried(e, module.get_buffer(e.path)) for stage, module in stages for e in stage.buffers if e.advance]


def expected(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the states of all stages."""
    return {e.name: e.shape for stage in manifest.stages for e in stage.buffers if e.advance}


@torch.no_grad()
def advance(states: list[Carried], world: World) -> None:
    """After a step: what was observed becomes the largest over all ranks of the stage (shards along tp and parts of the batch
    hold parts of one tensor), and each state moves on. Micro-batches and recomputation only raise a maximum, so that every
    plan comes to the same state. Collective over the ranks of a stage."""
    if not states:
        return
    observed = [s.tensor[..., 0] for s in states]
    flat = torch.cat([o.reshape(-1) for o in observed])
    world.largest(flat)
    for state, view, part in zip(states, observed, flat.split([o.numel() for o in observed]), strict=True):
        view.copy_(part.view_as(view))
        assert state.entry.advance is not None
        namespace, name = state.entry.advance.operator.split("::")
        getattr(getattr(torch.ops, namespace), name)(state.tensor, **state.entry.advance.options)
