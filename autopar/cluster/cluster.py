"""The machine a plan is for: devices, hosts and the links between them, in SI units."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.cluster.link import Link
from autopar.cluster.mesh import AxisLink, Degrees, lay, lay_uneven
from autopar.errors import SpecError
from autopar.spec.cluster import ClusterSpec, DeviceSpec, EfficiencySpec, joined_links, read_cluster
from autopar.spec.dead import dead_devices
from autopar.spec.source import Source

_WIDER = {  # what a device without units of its own for a dtype computes in
    "float4": "float8",
    "float8": "bfloat16",
    "bfloat16": "float32",
    "float16": "float32",
    "tensorfloat32": "float32",
    "float32": "float64",
    "int8": "float16",
}


@dataclass(frozen=True)
class Device:
    """One accelerator: ``memory`` in bytes, its ``bandwidth`` in B/s, dense peaks in FLOP/s by dtype."""

    name: str
    memory: int
    bandwidth: float
    flops_per_second: Mapping[str, float] = field(hash=False)
    vector_flops_per_second: float
    kernel_latency: float = 0.0
    host_bandwidth: float | None = None
    efficiency: EfficiencySpec = EfficiencySpec()
    units: int | None = None

    @staticmethod
    def of(spec: DeviceSpec) -> Device:
        rates = spec.flops_per_second
        vector = spec.vector_flops_per_second or rates.get("float32", max(rates.values()))
        return Device(
            name=spec.name,
            memory=spec.memory,
            bandwidth=spec.bandwidth * spec.share,
            flops_per_second={dtype: rate * spec.share for dtype, rate in rates.items()},
            vector_flops_per_second=vector * spec.share,
            kernel_latency=spec.kernel_latency,
            host_bandwidth=spec.host_bandwidth,
            efficiency=spec.efficiency,
            units=spec.units,
        )

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s in a dtype (``bfloat16`` or ``torch.bfloat16``); without it, in the next wider one it has."""
        name = str(dtype).removeprefix("torch.")
        name = "float8" if name.startswith("float8") else name
        while name not in self.flops_per_second and name in _WIDER:
            name = _WIDER[name]
        return self.flops_per_second.get(name, min(self.flops_per_second.values()))

    def share(self, kind: str, size: float) -> float:
        """The share of the peak that one call reaches; ``kind``: matmul, vector (FLOPs) or memory (bytes)."""
        curve = {"matmul": self.efficiency.matmul, "vector": self.efficiency.vector, "memory": self.efficiency.memory}
        return interpolate(curve[kind], size)


def interpolate(curve: tuple[tuple[float, float], ...], size: float) -> float:
    """A share from rising points (size, share): straight lines between, constant outside, 1 without points."""
    if not curve:
        return 1.0
    at = bisect_right([x for x, _ in curve], size)
    if at in (0, len(curve)):
        return curve[min(at, len(curve) - 1)][1]
    (x0, y0), (x1, y1) = curve[at - 1], curve[at]
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


@dataclass(frozen=True)
class Group:
    """Hosts of one kind; ``links`` are those inside the group, innermost first; ``dead``: (host, its dead devices)."""

    name: str
    device: Device
    devices_per_host: int
    hosts: int
    links: tuple[Link, ...]
    dead: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def devices(self) -> int:
        """How many devices work."""
        return self.devices_per_host * self.hosts - sum(len(devices) for _, devices in self.dead)

    @property
    def live(self) -> tuple[int, ...]:
        """How many devices of every host work."""
        gone = {host: len(devices) for host, devices in self.dead}
        return tuple(self.devices_per_host - gone.get(host, 0) for host in range(self.hosts))

    @property
    def places(self) -> list[int]:
        """The working devices by their places in the group, dead ones counted."""
        gone = {host * self.devices_per_host + device for host, devices in self.dead for device in devices}
        return [place for place in range(self.devices_per_host * self.hosts) if place not in gone]


@dataclass(frozen=True)
class Cluster:
    """Groups of like hosts, numbered device by device in their order; ``links`` (innermost first) join all of them.

    A cluster of one kind of host has one group. The one ``device`` of a mixed cluster is the weakest in each respect,
    which holds for every device. ``sizes``: how many devices each host has, in order, where hosts of one group differ.
    """

    name: str
    groups: tuple[Group, ...]
    links: tuple[Link, ...]
    sizes: tuple[int, ...] = ()

    @staticmethod
    def load(spec: Cluster | ClusterSpec | str | Path | dict[str, Any]) -> Cluster:
        """A cluster from a name in `clusters/`, a path, a mapping or a ClusterSpec; SpecError says what is wrong."""
        if isinstance(spec, Cluster):
            return spec
        if not isinstance(spec, ClusterSpec):
            data = str(spec) if isinstance(spec, Path) else spec
            if not isinstance(data, (str, dict)):
                raise SpecError(f"a cluster is a name, a path, a mapping or a Cluster, not {type(spec).__name__}")
            spec = read_cluster(Source(data, "cluster"))
        return _of_groups(spec) if spec.groups else _of_one_kind(spec)

    @property
    def uniform(self) -> bool:
        return len({(g.device, g.devices_per_host) for g in self.groups}) == 1

    @property
    def uneven(self) -> bool:
        """Whether hosts are unlike: several groups, or dead devices."""
        return len(self.groups) > 1 or any(group.dead for group in self.groups)

    @property
    def devices(self) -> int:
        """How many devices there are that work."""
        return sum(self.sizes) or sum(group.devices for group in self.groups)

    @property
    def hosts(self) -> int:
        return sum(group.hosts for group in self.groups)

    @property
    def devices_per_host(self) -> int:
        """Devices of one host; of unlike hosts, what divides all of them."""
        return functools.reduce(_common, (group.devices_per_host for group in self.groups))

    @property
    def device(self) -> Device:
        return self.groups[0].device if len(self.groups) == 1 else weakest([g.device for g in self.groups])

    def device_at(self, index: int) -> Device:
        """The device of one number, 0 to ``devices`` - 1."""
        for group in self.groups:
            if index < group.devices:
                return group.device
            index -= group.devices
        raise IndexError(index)

    def axis_link(self, mesh: Degrees, axis: str) -> AxisLink:
        """What the ring of one axis (``tp``, ``cp``, ``dp``, ``pp``) of a mesh crosses, where it is worst."""
        degrees = (mesh.tp, mesh.cp, mesh.dp, mesh.pp)
        if self.sizes:
            return lay_uneven(degrees, axis, self.links, self.sizes)
        return lay(degrees, axis, self.links, self.devices_per_host)

    def __str__(self) -> str:
        kinds = " + ".join(
            f"{g.hosts} × {g.devices_per_host} {g.device.name}{f' ({gone} dead)' if gone else ''}"
            for g in self.groups
            for gone in [g.devices_per_host * g.hosts - g.devices]
        )
        return f"{self.name} ({kinds})"


def _of_one_kind(spec: ClusterSpec) -> Cluster:
    if spec.device is None or spec.devices_per_host is None:
        raise SpecError(f"cluster {spec.name}: device and devices_per_host are missing")
    links = tuple(Link.of(link, spec.devices_per_host, spec.hosts) for link in spec.links)
    dead = dead_devices(spec.dead, spec.devices_per_host, spec.hosts)
    group = Group(spec.name, Device.of(spec.device), spec.devices_per_host, spec.hosts, links, tuple(dead.items()))
    return Cluster(spec.name, (group,), links, group.live if dead else ())


def _of_groups(spec: ClusterSpec) -> Cluster:
    names = [g.name for g in spec.groups]
    groups = tuple(
        Group(
            f"{g.name}#{i}" if names.count(g.name) > 1 else g.name,
            Device.of(g.device),
            g.devices_per_host,
            g.hosts,
            tuple(Link.of(link, g.devices_per_host, g.hosts) for link in joined_links(g, spec.links)),
            tuple(dead_devices(g.dead, g.devices_per_host, g.hosts).items()),
        )
        for i, g in enumerate(spec.groups)
    )
    per_host = functools.reduce(_common, (g.devices_per_host for g in groups))
    total = sum(g.devices_per_host * g.hosts for g in groups)
    own = {str(link.span) for link in spec.links}
    inner = [] if "host" in own else [slowest([g.links[0] for g in groups if g.links], per_host)]
    outer = [Link.of(link, per_host, total // per_host) for link in spec.links]
    return Cluster(spec.name, groups, tuple([*filter(None, inner), *outer]))


def slowest(links: list[Link], devices: int, span: str = "host") -> Link | None:
    """The weakest of some links in each respect, joining so many devices."""
    if not links:
        return None
    return Link(
        span,
        devices,
        min(link.bandwidth for link in links),
        max(link.latency for link in links),
        min(link.efficiency for link in links),
    )


def weakest(devices: list[Device]) -> Device:
    """A device that is as weak as the weakest in each respect."""
    if len(set(devices)) == 1:
        return devices[0]
    shared = set.intersection(*(set(d.flops_per_second) for d in devices))
    rates = {dtype: min(d.peak(dtype) for d in devices) for dtype in sorted(shared)}
    hosts = [d.host_bandwidth for d in devices]
    slowest = min(devices, key=lambda d: max(d.flops_per_second.values()))
    return Device(
        name=" / ".join(dict.fromkeys(d.name for d in devices)),
        memory=min(d.memory for d in devices),
        bandwidth=min(d.bandwidth for d in devices),
        flops_per_second=rates,
        vector_flops_per_second=min(d.vector_flops_per_second for d in devices),
        kernel_latency=max(d.kernel_latency for d in devices),
        host_bandwidth=None if None in hosts else min(h for h in hosts if h is not None),
        efficiency=slowest.efficiency,
        units=slowest.units,
    )


def _common(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a
