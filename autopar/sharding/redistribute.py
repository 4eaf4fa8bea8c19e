"""The law of an edge: which collectives bring a value, and its gradient, from where it is to where it is wanted.

A producer places its output as ``p``, a reader wants ``q``. Forward moves p → q. The reader's gradient for that input
comes out as `grad_placement` says, the producer wants it as `wanted` says; backward moves the one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from autopar.sharding.placement import P, Placement, R, glue, local

Collective = Literal["none", "slice", "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "all_gather_slice"]


@dataclass(frozen=True)
class Moves:
    """The two halves of an edge."""

    forward: Collective
    backward: Collective


def grad_placement(q: Placement, replicated: bool) -> Placement:
    """How the gradient of an input placed as ``q`` comes out of a reader; ``replicated``: `Strategy.replicated`."""
    if q.sharded:
        return q
    return R if q == P or replicated else P


def wanted(p: Placement) -> Placement:
    """How a producer wants the gradient of an output placed as ``p``."""
    return p if p.sharded else R


def legal(p: Placement, q: Placement) -> bool:
    """Whether a value placed as ``p`` can be brought to ``q``: everything, but a partial sum is never made."""
    return q != P or p == P


def collective(p: Placement, q: Placement) -> Collective:
    """The one collective that brings ``p`` to ``q``; ``all_gather_slice``: a dim in other pieces, cut anew."""
    if not legal(p, q):
        raise ValueError(f"{p} cannot become {q}: only an operator makes a partial sum")
    if p == q:
        return "none"
    if p == R:
        return "slice"
    if p == P:
        return "all_reduce" if q == R else "reduce_scatter"
    if q == R:
        return "all_gather"
    return "all_to_all" if p.dim != q.dim else "all_gather_slice"


def moves(p: Placement, q: Placement, grad: Placement | None) -> Moves | None:
    """The collectives of an edge p → q. ``grad``: `grad_placement` of the reader, None where no gradient flows.

    None if the edge is not possible. (A gradient always can be moved: it is never wanted as a partial sum.)
    """
    if not legal(p, q):
        return None
    return Moves(collective(p, q), "none" if grad is None else collective(grad, wanted(p)))


def volume(kind: Collective, bytes: float, degree: int) -> float:
    """Bytes each device sends in a collective over ``degree`` devices on a tensor of ``bytes`` (all of it, no shard).

    Ring algorithms: Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH".
    """
    each = bytes * (degree - 1) / degree
    if kind in ("none", "slice"):
        return 0.0
    if kind == "all_reduce":
        return 2 * each
    if kind == "all_to_all":
        return each / degree
    return each


def redistribute(p: Placement, q: Placement, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """What every device holds after p → q, from what every device held; all devices simulated in one process."""
    if collective(p, q) == "none":
        return shards
    whole = glue(p, shards)
    return [local(q, whole, rank, len(shards)) for rank in range(len(shards))]
