"""What splitting sequences over cp costs: seconds of its exchanges that show, and the buffers they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from autopar.cluster import AxisLink, Device
from autopar.cost import collective
from autopar.cost.values import flows, reads, tensor
from autopar.ir.context import AXIS, RING, ContextAttention
from autopar.sharding.redistribute import Collective

FORWARD: dict[str, Collective] = {
    "own_part": "none", "scatter_parts": "none", "gather_parts": "all_gather", "gather_parts_sum": "all_gather",
    "reduce_scatter_parts": "reduce_scatter", "all_reduce": "all_reduce", "all_reduce_both": "all_reduce", "copy_in": "none",
    "share_gradient": "none", "exchange_parts": "all_gather",
}  # fmt: skip
BACKWARD: dict[str, Collective] = {
    "own_part": "none", "scatter_parts": "all_gather", "gather_parts": "none", "gather_parts_sum": "reduce_scatter",
    "reduce_scatter_parts": "all_gather", "all_reduce": "none", "all_reduce_both": "all_reduce", "copy_in": "all_reduce",
    "share_gradient": "none", "exchange_parts": "all_gather",
}  # fmt: skip
"""The collective of each `context` operator, there and back."""
WHOLE_RESULT = ("gather_parts", "gather_parts_sum", "all_reduce", "all_reduce_both", "copy_in")
WIDE = 4  # bytes of an element that results over parts of the keys, and gradients that go round, are summed in


def over_cp(node: fx.Node) -> bool:
    """Whether a node is where devices along cp exchange something."""
    target = node.target
    return (
        isinstance(target, ContextAttention) or isinstance(target, torch._ops.OpOverload) and target.namespace == AXIS
    )


def talk(
    node: fx.Node,
    sizes: Sequence[float],
    result: float,
    link: AxisLink | None,
    computing: tuple[float, float],
    device: Device,
) -> tuple[float, float]:
    """Seconds, forward and backward, that a node's exchanges over cp show. ``sizes``, ``result``: bytes of its operands and
    its result on one device; ``computing``: its own seconds, which a ring runs behind."""
    if link is None or not over_cp(node):
        return 0.0, 0.0
    back = flows((node, 0))
    if isinstance(node.target, ContextAttention):
        is_ring = node.target.kind == RING
        there, again = ring(node, sizes, link, computing, device) if is_ring else heads(sizes, result, link)
        return there, again if back else 0.0
    name = node.target._schema.name.split("::")[-1]  # type: ignore[union-attr]
    size = max(sizes[0], result)  # the whole tensor
    return collective.seconds(FORWARD[name], size, link), collective.seconds(
        BACKWARD[name], size, link
    ) if back else 0.0


def ring(
    node: fx.Node, sizes: Sequence[float], link: AxisLink, computing: tuple[float, float], device: Device
) -> tuple[float, float]:
    """Keys and values are sent n - 1 times behind as many parts of the computation; in the backward they are, and the
    gradients n times, in the dtype they are summed in."""
    n, held, delay = link.members, sizes[1] + sizes[2], collective.contention(link, device)
    gradients = held * wide(node) / tensor(reads(node)[1]).element_size()
    forward = (n - 1) * float(collective.behind(collective.send(held, link), computing[0] / n, delay))
    backward = (n - 1) * float(collective.behind(collective.send(held + gradients, link), computing[1] / n, delay))
    return forward, backward + collective.send(gradients, link)


def heads(sizes: Sequence[float], result: float, link: AxisLink) -> tuple[float, float]:
    """Queries, keys, values and the mixture: an all-to-all each, there and back, and nothing to run them behind."""
    once = sum(collective.exchange(size * link.members, link) for size in (*sizes[:3], result))
    return once, once


def wide(node: fx.Node) -> int:
    return max(WIDE, tensor(reads(node)[0]).element_size())


def buffers(node: fx.Node, sizes: Sequence[float], result: float) -> tuple[float, float]:
    """Bytes that attention over cp holds while it runs forward and backward, beside its operands and results.

    A ring holds the keys and values that it computes with and those that arrive, and what it sums up in a wider dtype; the
    all-to-all what it sends and receives of one tensor, and the gradients with the heads split.
    """
    if not isinstance(node.target, ContextAttention):
        return 0.0, 0.0
    q, kv = sizes[0], sizes[1] + sizes[2]
    factor = wide(node) / tensor(reads(node)[0]).element_size()
    if node.target.kind == RING:
        return 2 * kv + 2 * result * factor, 2 * kv + (q + 2 * kv) * factor + q + kv
    return 2 * max(q, result), 2 * result + q + kv + 2 * max(q, result)
