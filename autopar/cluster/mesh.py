"""How a mesh lies on the devices: tp innermost, then cp, dp and pp, and which links the ring of an axis crosses."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from autopar.cluster.link import Link

AXES = ("tp", "cp", "dp", "pp")  # innermost first


class Degrees(Protocol):
    """Anything with a degree for each axis, such as a plan's MeshShape."""

    @property
    def tp(self) -> int: ...
    @property
    def cp(self) -> int: ...
    @property
    def dp(self) -> int: ...
    @property
    def pp(self) -> int: ...


@dataclass(frozen=True)
class AxisLink:
    """What a ring over one axis crosses: the outermost link it needs, and how its members lie on the hosts.

    ``per_host``: members that share a host (the fewest, if groups differ); ``inner``: the link that members inside one
    host use, if that is another one.
    """

    span: str
    bandwidth: float
    latency: float
    efficiency: float
    members: int
    per_host: int
    inner: Link | None = None

    @property
    def spans_hosts(self) -> bool:
        return self.per_host < self.members

    @property
    def hosts(self) -> int:
        """How many hosts one ring visits."""
        return math.ceil(self.members / self.per_host)


def stride(degrees: tuple[int, int, int, int], axis: str) -> int:
    """The distance in device numbers between neighbours along an axis; degrees innermost first."""
    return math.prod(degrees[: AXES.index(axis)])


def members(degrees: tuple[int, int, int, int], axis: str, device: int = 0) -> list[int]:
    """The device numbers of the ring along ``axis`` that a device belongs to."""
    step, degree = stride(degrees, axis), degrees[AXES.index(axis)]
    base = device - (device // step % degree) * step
    return [base + i * step for i in range(degree)]


@functools.lru_cache(maxsize=4096)
def lay(degrees: tuple[int, int, int, int], axis: str, levels: tuple[Link, ...], per_host: int) -> AxisLink:
    """The links of an axis. ``degrees``: of tp, cp, dp, pp; ``levels``: innermost first; ``per_host``: devices."""
    step, degree = stride(degrees, axis), degrees[AXES.index(axis)]
    if degree == 1 or not levels:
        return AxisLink("device", math.inf, 0.0, 1.0, degree, degree)
    joined = next((level for level in levels if aligned(step, degree, level.devices)), levels[-1])
    together = neighbours(step, degree, per_host)
    inside = next((k for k in levels if aligned(step, together, k.devices)), None) if 1 < together < degree else None
    inner = inside if inside is not joined else None
    return AxisLink(joined.span, joined.bandwidth, joined.latency, joined.efficiency, degree, together, inner)


@functools.lru_cache(maxsize=4096)
def lay_uneven(
    degrees: tuple[int, int, int, int], axis: str, levels: tuple[Link, ...], sizes: tuple[int, ...]
) -> AxisLink:
    """The same where hosts have ``sizes`` devices, counted ring by ring: levels below a host do not hold there."""
    step, degree = stride(degrees, axis), degrees[AXES.index(axis)]
    if degree == 1 or not levels:
        return AxisLink("device", math.inf, 0.0, 1.0, degree, degree)
    host_of = [host for host, size in enumerate(sizes) for _ in range(size)]
    shared: Counter[tuple[int, int]] = Counter()  # members of a ring on a host
    for device in range(len(host_of) // (step * degree) * step * degree):
        shared[device // (step * degree) * step + device % step, host_of[device]] += 1
    together = min(shared.values(), default=1)
    near = next((level for level in levels if level.devices >= max(sizes)), levels[-1])
    if together == degree:
        return AxisLink(near.span, near.bandwidth, near.latency, near.efficiency, degree, degree)
    far = levels[-1]
    inner = near if together > 1 and near is not far else None
    return AxisLink(far.span, far.bandwidth, far.latency, far.efficiency, degree, together, inner)


def aligned(step: int, degree: int, size: int) -> bool:
    """Whether every ring of ``degree`` members, ``step`` apart, lies within one aligned run of ``size`` devices."""
    return step * degree <= size and size % (step * degree) == 0


def neighbours(step: int, degree: int, size: int) -> int:
    """The fewest members of a ring that share an aligned run of ``size`` devices (1 or more)."""
    if aligned(step, degree, size):
        return degree
    if step >= size:
        return 1
    if size % step == 0 and (size // step) and degree % (size // step) == 0:
        return size // step
    return 1
