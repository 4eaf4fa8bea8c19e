"""Seconds of a collective over one mesh axis: latency and bytes over bandwidth, hierarchical where a ring leaves a host."""

from __future__ import annotations

import math

from autopar.cluster import AxisLink
from autopar.sharding.redistribute import Collective


def gather(bytes: float, link: AxisLink) -> float:
    """All-gather (or reduce-scatter) of a tensor of ``bytes`` in all.

    Each member of a host gathers its share from its peers on the other hosts over its own rail, then the members of a
    host exchange their shares (Thakur, Rabenseifner, Gropp 2005; NCCL's rail-aligned rings). Latency grows with the
    logarithm of the members: NCCL's tree and PAT algorithms for short messages.
    """
    n, k = link.members, link.per_host
    if n <= 1:
        return 0.0
    if not link.spans_hosts:
        return steps(n) * link.latency + bytes * (n - 1) / n / (link.bandwidth * link.efficiency)
    hosts = n // k if n % k == 0 else link.hosts
    across = bytes / k * (hosts - 1) / hosts / (link.bandwidth * link.efficiency)
    inside, wait = 0.0, steps(hosts) * link.latency
    if k > 1:
        inner = link.inner
        bandwidth = inner.bandwidth * inner.efficiency if inner else link.bandwidth * link.efficiency
        inside = bytes * (k - 1) / k / bandwidth
        wait += steps(k) * (inner.latency if inner else link.latency)
    return across + inside + wait


def steps(n: int) -> int:
    return math.ceil(math.log2(n)) if n > 1 else 0


def exchange(bytes: float, link: AxisLink) -> float:
    """All-to-all of a tensor of ``bytes`` in all: each device sends its 1/n, all but what stays."""
    n, k = link.members, link.per_host
    if n <= 1:
        return 0.0
    own = bytes / n
    outside = own * (n - k) / n / (link.bandwidth * link.efficiency) if link.spans_hosts else 0.0
    peers = k if link.spans_hosts else n
    near = link.inner if link.inner else link
    return outside + own * (peers - 1) / n / (near.bandwidth * near.efficiency) + steps(n) * link.latency


def seconds(kind: Collective, bytes: float, link: AxisLink) -> float:
    """One collective on a tensor of ``bytes`` (the whole, not a shard) over the members of ``link``."""
    if kind in ("none", "slice") or link.members <= 1:
        return 0.0
    if kind == "all_reduce":
        return 2 * gather(bytes, link)
    if kind == "all_to_all":
        return exchange(bytes, link)
    return gather(bytes, link)


def send(bytes: float, link: AxisLink) -> float:
    """One message to a neighbour along an axis."""
    return link.latency + bytes / (link.bandwidth * link.efficiency) if link.members > 1 and bytes else 0.0
