"""A job's cluster as processes of this machine: what a proof runs on."""

from __future__ import annotations

import math

from autopar.cluster.cluster import Cluster
from autopar.spec.cluster import ClusterSpec, read_cluster
from autopar.spec.job import Job, Pins
from autopar.spec.source import Source

IDEAL_LINK = {"span": "host", "bandwidth": "1000000 GB/s", "latency": "1 ns"}
"""What a proof's plan is priced with: links so fast that whatever may be split is split, and so is proved."""
LOCAL_MEMORY = 2**34
"""Bytes that a process of a proof on unlike hosts counts as having, where its device has most."""


def local_cluster(job: Job, ranks: int | None) -> ClusterSpec:
    """The job's devices as processes of this machine."""
    pins, cluster = job.pins, Cluster.load(job.cluster)
    product = (pins.tp or 1) * (pins.pp or 1) * (pins.dp or 1) * (pins.cp or 1)
    devices = ranks or (product if product > 1 else min(cluster.devices, 4))
    if len(cluster.groups) > 1 and devices >= len(cluster.groups):
        return local_groups(cluster, devices)
    spec = {"name": "local-cpu", "devices_per_host": devices, "hosts": 1, "links": [IDEAL_LINK]}
    return read_cluster(Source(spec, "cluster"))


def local_groups(cluster: Cluster, devices: int) -> ClusterSpec:
    """A cluster of unlike hosts as processes of this machine: a host for each group, with a share of the processes by its
    number of devices, as fast and as large beside the others' as its devices are."""
    groups, total = cluster.groups, cluster.devices
    counts = [max(1, devices * g.devices // total) for g in groups]
    while sum(counts) != devices:
        step = 1 if sum(counts) < devices else -1
        at = max(range(len(groups)), key=lambda i: step * (devices * groups[i].devices / total - counts[i])
                 if counts[i] + step > 0 else float("-inf"))  # fmt: skip
        counts[at] += step
    fastest, largest = max(g.device.peak("bfloat16") for g in groups), max(g.device.memory for g in groups)
    own = read_cluster(Source("local-cpu", "cluster")).model_dump(mode="json")["device"]
    specs = []
    for group, count in zip(groups, counts, strict=True):
        pace = group.device.peak("bfloat16") / fastest
        size = int(LOCAL_MEMORY * group.device.memory / largest)
        device = {**own, "name": f"cpu as {group.device.name}", "memory": size, "share": pace}
        specs.append({"name": f"{group.name} here", "device": device, "devices_per_host": count, "links": [IDEAL_LINK]})
    joined = {"groups": specs, "links": [{**IDEAL_LINK, "span": "cluster"}]}
    return read_cluster(Source(joined, "cluster"))


def everywhere(pins: Pins, cluster: Cluster) -> Pins:
    """Pins that make a proof stand on every group of unlike hosts and use all devices, where the groups' devices are
    multiples of one number: so many are a stage's replicas. Where something is pinned that says otherwise, it holds."""
    counts = [g.devices for g in cluster.groups]
    if len(counts) < 2 or pins.pp is not None or pins.dp is not None:
        return pins
    tp = pins.tp or 1
    if any(n % tp for n in counts):
        return pins
    wide = math.gcd(*counts)
    return pins.model_copy(update={"pp": sum(counts) // wide, "tp": tp, "dp": wide // tp})
