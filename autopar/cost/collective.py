"""Seconds of a collective over one mesh axis: α–β by algorithm, rings that leave a host going over all of its rails."""

from __future__ import annotations

import math

import numpy as np

from autopar.cluster import AxisLink, Device
from autopar.sharding.redistribute import Collective

TREE = 0.92
"""Bandwidth of NCCL's tree beside its ring's, where it leaves a host (NCCL src/graph/tuning.cc: .92 for trees of LL128)."""
HELD = 0.15
"""Share of a device's multiprocessors that the kernels of a collective hold while it lasts, waiting or not: 20 of 132
(DeepSeek-AI 2024, DeepSeek-V3, section 3.2.2); NCCL runs up to 24 channels, a multiprocessor each, on an A100."""
PASSES = 2.5
"""Bytes of memory that pass for a byte on a link: a ring reads what it sends on and writes what it gets; reducing reads once
more (2 and 3)."""
COPYING = 0.45  # the same share of a device without multiprocessors of its own: its cores do both


def gather(bytes: float, link: AxisLink) -> float:
    """All-gather (or reduce-scatter) of a tensor of ``bytes`` in all: n - 1 steps of a ring."""
    return moving(bytes, link) + ring_wait(link) if link.members > 1 else 0.0


def moving(bytes: float, link: AxisLink) -> float:
    """Seconds of bandwidth: (n-1)/n of the bytes pass every device, and every host's k rails together.

    A ring visits all members of a host one after the other and leaves it once, and there is one for every rail
    (NCCL's rail-aligned rings): across hosts the bytes are shared by the k members' rails.
    """
    n, k = link.members, link.per_host
    share = bytes * (n - 1) / n
    if not link.spans_hosts:
        return share / (link.bandwidth * link.efficiency)
    across = share / (k * link.bandwidth * link.efficiency)
    return max(across, share / (link.inner.bandwidth * link.inner.efficiency)) if link.inner and k > 1 else across


def ring_wait(link: AxisLink) -> float:
    """Latency of n - 1 steps, as many of them across hosts as there are hosts but one."""
    n, across = link.members, link.hosts - 1
    inner = link.inner.latency if link.inner else link.latency
    return (n - 1 - across) * inner + across * link.latency


def all_reduce(bytes: float, link: AxisLink) -> float:
    """The better of a ring (reduce-scatter, then all-gather) and a tree over hosts with a chain in each (NCCL's two)."""
    if link.members <= 1:
        return 0.0
    ring = 2 * (moving(bytes, link) + ring_wait(link))
    return min(ring, 2 * (moving(bytes, link) / TREE + tree_wait(link)))


def tree_wait(link: AxisLink) -> float:
    """Latency of one way through the tree: up the hosts' binary tree, along the chain inside one."""
    hosts = link.hosts if link.spans_hosts else 1
    inner = link.inner.latency if link.inner else link.latency
    return steps(hosts) * link.latency + (min(link.per_host, link.members) - 1) * inner


def steps(n: int) -> int:
    return math.ceil(math.log2(n)) if n > 1 else 0


def exchange(bytes: float, link: AxisLink) -> float:
    """All-to-all of a tensor of ``bytes`` in all: each device sends its 1/n, all but what stays, to all others at once."""
    n, k = link.members, link.per_host
    if n <= 1:
        return 0.0
    own = bytes / n
    outside = own * (n - k) / n / (link.bandwidth * link.efficiency) if link.spans_hosts else 0.0
    peers = k if link.spans_hosts else n
    near = link.inner if link.inner else link
    return max(outside, own * (peers - 1) / n / (near.bandwidth * near.efficiency)) + steps(n) * link.latency


def seconds(kind: Collective, bytes: float, link: AxisLink) -> float:
    """One collective on a tensor of ``bytes`` (the whole, not a shard) over the members of ``link``."""
    if kind in ("none", "slice") or link.members <= 1:
        return 0.0
    if kind == "all_reduce":
        return all_reduce(bytes, link)
    if kind == "all_to_all":
        return exchange(bytes, link)
    return gather(bytes, link)


def send(bytes: float, link: AxisLink) -> float:
    """One message to a neighbour along an axis."""
    return link.latency + bytes / (link.bandwidth * link.efficiency) if link.members > 1 and bytes else 0.0


def speed(link: AxisLink) -> float:
    """Bytes a second that pass each member in a large collective."""
    return 1.0 / moving(1.0, link) * (link.members - 1) / link.members if link.members > 1 else 0.0


def contention(link: AxisLink, device: Device) -> float:
    """Share of its own time by which a collective delays the kernels it runs beside: the multiprocessors it holds, which
    waves of tiles then lack, and the memory bandwidth it takes. A slow network takes little of that."""
    if device.units is None:
        return COPYING
    return min(1.0, HELD + PASSES * speed(link) / device.bandwidth)


def behind(talk: np.ndarray | float, compute: np.ndarray | float, delay: float) -> np.ndarray:
    """Seconds that show of a collective run behind a computation: what is longer, and, of the rest, the share ``delay``
    (`contention`) that it takes from it meanwhile."""
    return np.maximum(0.0, np.asarray(talk) - compute) + delay * np.minimum(talk, compute)
