"""Bytes a device holds between and during the micro-batches of a step: parameters, gradients, optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from autopar.cost.precision import Precision

Number = TypeVar("Number", float, np.ndarray)


@dataclass(frozen=True)
class Sharding:
    """How the states of a step lie on the replicas.

    ``bare``: inside a pipeline torch's `PipelineStage` keeps ZeRO 0 and 1 gathered and unreduced to the end of the step
    (ZeRO 2 and 3 are wrapped and do what they promise). ``accumulates``: more than one micro-batch adds up.
    """

    zero: int
    dp: int
    precision: Precision
    moments: int = 2  # tensors of optimizer state for each parameter: AdamW two, SGD with momentum one
    accumulates: bool = True

    @property
    def split(self) -> int:
        """Among how many replicas optimizer state (and gradients, parameters) are divided."""
        return self.dp if self.zero else 1


@dataclass(frozen=True)
class States(Generic[Number]):
    """Bytes on one device."""

    parameters: Number
    gradients: Number
    optimizer: Number
    transient: Number


def states(sharding: Sharding, trained: Number, frozen: Number, unit: Number, unit_trained: Number) -> States[Number]:
    """States of a device that has ``trained`` and ``frozen`` elements along tp.

    ``unit``: elements that are gathered at a time at ZeRO 3 (the root's and two blocks': one computes, one is fetched);
    ``unit_trained``: trained elements of the largest unit, whose gradients are in the making.

    ZeRO 0 holds everything. 1 divides the optimizer's state and the parameters between steps, but the copy that is
    computed with and the gradients that add up stay whole; 2 divides gradients, too; 3 gathers each unit when needed
    (Rajbhandari et al. 2019; what FSDP2 holds was measured with torch 2.13).
    """
    p, n = sharding.precision, sharding.split
    held = (p.master.itemsize * trained + p.frozen.itemsize * frozen) / n
    copy = p.compute.itemsize * (trained + frozen) if p.mixed or n > 1 else 0 * trained
    gathered = 0 * trained
    if sharding.zero == 3 and n > 1:
        copy, gathered = 0 * trained, p.compute.itemsize * unit
    shard = p.gradients.itemsize * trained / n
    if sharding.zero == 1 and n > 1 and sharding.accumulates:
        shard = p.reduce.itemsize * trained  # whole, until they are reduced one unit after the other
    making = p.compute.itemsize * unit_trained
    if n > 1 and sharding.zero:
        making = making + p.reduce.itemsize * unit_trained
    if sharding.zero == 0 and sharding.dp > 1 and p.reduce != p.gradients:
        making = making + p.reduce.itemsize * trained  # copies in the dtype of the sums, until the last sum is there
    return States(
        parameters=held + copy,
        gradients=shard,
        optimizer=sharding.moments * p.state.itemsize * trained / n,
        transient=gathered + making,
    )


def handled_bytes(sharding: Sharding, trained: Number, frozen: Number) -> tuple[Number, Number]:
    """Bytes that a micro-batch moves, forward and backward, to bring parameters to where they are computed with and their
    gradients to where they add up.

    FSDP2 copies what it gathered to each parameter (``split_with_sizes_copy``); gradients are copied into one buffer of
    the dtype they are summed in (``chunk_cat``), or, where whole ones add up over micro-batches, added there. Parameters
    that are not gathered are cast where they are read, in every micro-batch, and their gradients back.
    """
    p, n = sharding.precision, sharding.split
    if n == 1:
        there = cast_bytes(p.master, p.compute) * trained
        back = there + (3 * p.gradients.itemsize * trained if sharding.accumulates else 0 * trained)
        return there + cast_bytes(p.frozen, p.compute) * frozen, back
    once = 2 * p.compute.itemsize * (trained + frozen) if sharding.zero == 3 else 0 * trained
    if sharding.zero > 1:
        return once, once + (p.compute.itemsize + p.reduce.itemsize) * trained
    return once, once + (p.compute.itemsize + 2 * p.reduce.itemsize if sharding.accumulates else 0) * trained


def cast_bytes(kept: torch.dtype, read: torch.dtype) -> int:
    """Bytes moved for one element that is kept in one dtype and read in another."""
    return kept.itemsize + read.itemsize if kept != read else 0


def optimizer_bytes(sharding: Sharding, trained: Number, clip: bool) -> Number:
    """Bytes that one optimizer step moves: each tensor read once, all but the gradient written once; with ``clip`` the
    gradients are read for their norm, read and written again; a computed-with copy is written where it is held."""
    p, n = sharding.precision, sharding.split
    each = 2 * p.master.itemsize + p.gradients.itemsize + 2 * sharding.moments * p.state.itemsize
    if clip:
        each += 3 * p.gradients.itemsize
    copied = p.compute.itemsize * trained if p.mixed and sharding.zero in (1, 2) and n > 1 else 0 * trained
    return each * trained / n + copied
