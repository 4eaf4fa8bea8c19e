"""A cluster file: the device, how many of them, and the links between them. SI units once it is read."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_serializer, model_validator

from autopar.errors import SpecError, suggestion
from autopar.spec import library
from autopar.spec.base import (
    Bandwidth,
    Count,
    Efficiency,
    FlopRate,
    Memory,
    NonNegative,
    Positive,
    Seconds,
    Spec,
    build,
)
from autopar.spec.dead import Dead, dead_devices
from autopar.spec.quantity import short
from autopar.spec.source import Source, read

DTYPES = ("float64", "float32", "tensorfloat32", "bfloat16", "float16", "float8", "float4", "int8")
AUTO = "auto"  # this machine's own number
NONE_DEAD = ("dead", 0)
Curve = tuple[tuple[NonNegative, Efficiency], ...]


class EfficiencySpec(Spec):
    """The share of a peak that is reached, by the size of one kernel: rising points (size, share), lines between.

    ``matmul`` and ``vector`` over FLOPs per call, ``memory`` over bytes moved per call. ``attention``: the shares of the
    matrix units' peak that a fused attention kernel reaches, forward and backward.
    """

    matmul: Curve = ()
    vector: Curve = ()
    memory: Curve = ()
    attention: tuple[Efficiency, Efficiency] | None = None

    @field_validator("matmul", "vector", "memory")
    @classmethod
    def _rising(cls, curve: Curve) -> Curve:
        sizes = [size for size, _ in curve]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"must have rising sizes, not {sizes}")
        return curve


class DeviceSpec(Spec):
    """One accelerator: ``memory`` in bytes, its ``bandwidth`` in B/s, dense peaks in FLOP/s for each dtype."""

    name: str
    memory: Memory
    bandwidth: Bandwidth
    flops_per_second: dict[str, FlopRate] = Field(min_length=1)
    vector_flops_per_second: FlopRate | None = None  # outside of matrix units, float32; default: float32's peak
    kernel_latency: Seconds = 0.0  # launching one kernel
    units: Count | None = None  # multiprocessors, over which the tiles of a matrix product are spread
    host_bandwidth: Bandwidth | None = None  # to the host's memory, one direction, for offload
    share: Positive = 1.0  # of the numbers above one process has: processes that share this machine's cores have less
    efficiency: EfficiencySpec = EfficiencySpec()

    @field_validator("flops_per_second")
    @classmethod
    def _known_dtypes(cls, rates: dict[str, float]) -> dict[str, float]:
        for dtype in rates:
            if dtype not in DTYPES:
                near = suggestion(dtype, DTYPES) or f" (known: {', '.join(DTYPES)})"
                raise ValueError(f"has the unknown dtype '{dtype}'{near}")
        return rates


def _span(value: object) -> object:
    if value in ("host", "cluster") or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**53):
        return value
    raise ValueError(f"must be host, cluster or a number of devices, not {short(value)}")


class LinkSpec(Spec):
    """One level of links, per device and one direction.

    ``span``: ``host``, ``cluster``, or a number of consecutive devices. ``efficiency``: the share of the bandwidth that
    large collectives reach.
    """

    span: Annotated[str | int, BeforeValidator(_span)]
    bandwidth: Bandwidth
    latency: Seconds
    efficiency: Efficiency = 1.0


class GroupSpec(Spec):
    """Some hosts of one kind in a cluster of unlike hosts; ``links`` are those inside the group.

    Where the group has no links between its devices, or between its hosts, those of the cluster hold.
    """

    name: str
    device: DeviceSpec
    devices_per_host: Count
    hosts: Count = 1
    dead: Dead = 0
    links: tuple[LinkSpec, ...] = ()

    @model_validator(mode="after")
    def _some_are_alive(self) -> GroupSpec:
        dead_devices(self.dead, self.devices_per_host, self.hosts)
        return self

    @model_serializer(mode="wrap")
    def _written(self, handler: Any) -> Any:
        return {
            key: value for key, value in handler(self).items() if value not in ((), []) and (key, value) != NONE_DEAD
        }


class ClusterSpec(Spec):
    """A cluster: ``device`` and ``devices_per_host``, or ``groups`` of unlike hosts with ``links`` between them."""

    name: str = "cluster"
    device: DeviceSpec | None = None
    devices_per_host: Count | None = None
    hosts: Count = 1
    dead: Dead = 0
    links: tuple[LinkSpec, ...] = ()
    groups: tuple[GroupSpec, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> ClusterSpec:
        if self.groups:
            if self.device or self.devices_per_host or self.hosts != 1 or self.dead:
                raise ValueError("has groups; device, devices_per_host, hosts and dead belong into the groups")
            check_groups(self.groups, self.links)
            return self
        if self.device is None or self.devices_per_host is None:
            raise ValueError(f"needs '{'devices_per_host' if self.device else 'device'}' (or 'groups' of hosts)")
        check_links(self.links, self.devices_per_host, self.hosts)
        dead_devices(self.dead, self.devices_per_host, self.hosts)
        return self

    @model_serializer(mode="wrap")
    def _written(self, handler: Any) -> Any:
        given = {key: value for key, value in handler(self).items() if value not in (None, (), [])}
        return {key: value for key, value in given.items() if (key, value) != NONE_DEAD}

    @property
    def devices(self) -> int:
        """How many devices there are that work."""
        return sum(
            (of.devices_per_host or 1) * of.hosts
            - sum(map(len, dead_devices(of.dead, of.devices_per_host or 1, of.hosts).values()))
            for of in (self.groups or (self,))
        )

    @property
    def uneven(self) -> bool:
        """Whether hosts are unlike: several groups, or dead devices."""
        return bool(self.groups) or bool(self.dead)


def check_groups(groups: tuple[GroupSpec, ...], links: tuple[LinkSpec, ...]) -> None:
    """Every two devices joined, by links of a group or of the cluster; ValueError otherwise."""
    if not links:
        raise ValueError("has groups of hosts and needs 'links' that join them, such as "
                         "links: [{span: cluster, bandwidth: 25 GB/s, latency: 10 us}]")  # fmt: skip
    if links[-1].span != "cluster":
        raise ValueError(f"has groups of hosts, but its links end with span: {links[-1].span}; links needs an entry with "
                         "span: cluster that joins them")  # fmt: skip
    outer = [k for k in links if k.span != "host"]
    sizes = [k.span for k in outer[:-1]]
    if sizes != sorted(sizes) or "host" in [k.span for k in links[1:]]:
        raise ValueError(f"has links that are not in order, innermost first: {[str(k.span) for k in links]}")
    for i, group in enumerate(groups):
        try:
            check_links(joined_links(group, links), group.devices_per_host, group.hosts)
        except ValueError as error:
            raise ValueError(f"groups.{i} ({group.name}) {error}, in the group or in the cluster") from None


def joined_links(group: GroupSpec, links: tuple[LinkSpec, ...]) -> tuple[LinkSpec, ...]:
    """The links inside a group: its own, and those of the cluster where it has none inside or between its hosts."""
    sizes = [{"host": group.devices_per_host}.get(str(k.span), k.span) for k in group.links]
    inside = any(size == "cluster" or int(size) >= group.devices_per_host for size in sizes)
    across = any(size == "cluster" or int(size) > group.devices_per_host for size in sizes)
    below = tuple(k for k in links if k.span == "host") if not inside and group.devices_per_host > 1 else ()
    above = tuple(k for k in links if k.span == "cluster") if not across and group.hosts > 1 else ()
    return (*group.links, *below, *above)


def check_links(links: tuple[LinkSpec, ...], per_host: int, hosts: int) -> None:
    """Innermost first, and every pair of devices joined; ValueError otherwise."""
    sizes = [{"host": per_host, "cluster": per_host * hosts}.get(str(link.span), link.span) for link in links]
    order = [int(size) for size in sizes]
    if order != sorted(order):
        raise ValueError(f"has links that are not in order, innermost first: {[str(link.span) for link in links]}")
    widest = order[-1] if order else 1
    if widest < per_host * hosts:
        missing = "cluster" if widest >= per_host else "host"
        raise ValueError(f"has {per_host * hosts} devices, but its links join {widest}; "
                         f"links needs an entry with span: {missing}")  # fmt: skip


def read_cluster(source: Source) -> ClusterSpec:
    """A job's `cluster:` entry: a name, a named cluster with changes, a path, or a whole cluster inline."""
    written = _written(source)
    if isinstance(written.data, dict) and isinstance(written.data.get("groups"), list):
        groups = Source(list(written.data["groups"]), written.where(("groups",)), dict(written.sub("groups").marks))
        for i in range(len(groups.data)):
            groups.put(i, _group(written.sub("groups").sub(i)))
        written.put("groups", groups)
    if isinstance(written.data, dict):
        _fill_in_this_machine(written)
    return build(ClusterSpec, written, "cluster")


def _written(source: Source) -> Source:
    """The cluster's mapping, with what a name stands for filled in under the changes."""
    data = source.data
    if isinstance(data, str):
        path = library.lookup("clusters", data)
        if path is None and data.endswith((".yaml", ".yml", ".json")):
            path = _beside(data, source)
        return read(path or library.find("clusters", data, source.where()))
    if not isinstance(data, dict):
        raise source.error(f"cluster must be a name or a mapping, not {short(data)}")
    name = data.get("name")
    path = library.lookup("clusters", name) if isinstance(name, str) else None
    if path is not None:
        return _over(read(path), source)
    if isinstance(name, str) and "groups" not in data and not _is_whole(data):
        library.find("clusters", name, source.where(("name",)))
    return Source(dict(data), source.label, dict(source.marks))


def _is_whole(data: dict[str, Any]) -> bool:
    """Whether a mapping describes a cluster by itself, so that its name is its own."""
    device = data.get("device")
    return isinstance(device, dict) and "flops_per_second" in device


def _beside(name: str, source: Source) -> Any:
    from pathlib import Path

    beside = Path(source.where().rpartition(":")[0]).parent / name
    return beside if beside.is_file() else Path(name)


def _group(source: Source) -> Source:
    if not isinstance(source.data, dict):
        raise source.error(f"a group must be a mapping such as {{name: dgx-a100, hosts: 2}}, not {short(source.data)}")
    written = _written(source)
    if isinstance(written.data, dict):
        _fill_in_this_machine(written)
    return written


def _over(base: Source, changes: Source) -> Source:
    """``changes`` over ``base``; mappings are merged key by key, everything else is replaced."""
    merged = Source(dict(base.data), changes.label, {**base.marks, (): changes.where()})
    for key, value in changes.data.items():
        old = merged.data.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged.put(key, _over(base.sub(key), changes.sub(key)))
        else:
            merged.data[key] = None
            merged.marks.pop((key,), None)
            merged.put(key, changes.sub(key))
    return merged


def _fill_in_this_machine(source: Source) -> None:
    """``devices_per_host: auto`` is this machine's cores, ``memory: auto`` an even share of its memory (and of its cores)."""
    data = source.data
    if data.get("devices_per_host") == AUTO:
        data["devices_per_host"] = os.cpu_count() or 1
    device = data.get("device")
    if isinstance(device, dict) and device.get("memory") == AUTO:
        count = data.get("devices_per_host")
        share = this_machines_memory() // count if isinstance(count, int) and count > 0 else this_machines_memory()
        cores = (os.cpu_count() or 1) / count if isinstance(count, int) and count > 0 else 1.0
        data["device"] = {**device, "memory": share, "share": device.get("share", min(1.0, cores))}


def this_machines_memory() -> int:
    """Bytes of this machine's main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        raise SpecError("this machine does not tell its memory; give device.memory, such as '16 GiB'") from None
