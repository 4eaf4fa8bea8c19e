"""Why nothing fits: the least memory any plan needs, where, and the cheapest ways out, each with its number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from autopar.cluster import Cluster
from autopar.errors import PlanError
from autopar.plan.plan import Bytes
from autopar.solve.outcome import devices
from autopar.solve.pipeline import Candidate, Setting
from autopar.solve.prepare import Source
from autopar.solve.space import candidates, meshes
from autopar.solve.stages import Cutter, mode_name, mode_of, walk
from autopar.spec.job import Batch, Job, Pins
from autopar.spec.quantity import show_bytes

if TYPE_CHECKING:
    from autopar.solve.fleet import Fleet

GIB, MIB = 2**30, 2**20
TRIED = 40  # candidates whose need is computed
MORE_HOSTS = (2, 3, 4, 6, 8, 12, 16, 32, 64)


@dataclass(frozen=True)
class Need:
    """The least bytes with which a candidate runs, on the stage that has most beside its ``limit``, and what they are."""

    total: float
    limit: float
    candidate: Candidate
    stage: int
    bytes: Bytes
    recompute: str


def need(source: Source | Fleet, setting: Setting, candidate: Candidate) -> Need | None:
    """What a candidate could run with, with the least beside the memory of each stage's device; None if it cannot be cut."""
    cutter = source.cutter(candidate)
    n, stages = cutter.n, candidate.stages
    if stages > max(1, n):
        return None
    count = len(cutter.at(0).blocks.saved)
    modes = list(range(count)) if setting.recompute is None else [mode_of(setting.recompute, count)]
    if candidate.evenly:
        spans = source.even(candidate)[1]
        return needed(cutter, spans, modes) if spans else None
    legal = np.triu(np.ones((n + 1, n + 1), bool), 1 if n else 0)
    best, links = np.full(n + 1, np.inf), []
    best[0] = 0.0
    for s in range(stages):
        part = cutter.at(s)
        span = part.span(s)
        plain = part.held(s, span)
        held = [
            plain - cutter.flight[s] * (span.saved[0] - part.over(f"saved{k}")) + part.peak(k, span) - span.working[0]
            for k in modes
        ]
        share = np.minimum.reduce(held) / part.setting.limit
        value = np.maximum(best[:, None], np.where(legal, share, np.inf))
        links.append(np.argmin(value, axis=0))
        best = np.min(value, axis=0)
    if not np.isfinite(best[n]):
        return None
    return needed(cutter, walk(links, n), modes)


def needed(cutter: Cutter, spans: list[tuple[int, int]], modes: Sequence[int]) -> Need:
    """The bytes of the device that needs most, each with the recompute that spares most."""
    found = []
    for s, device in enumerate(devices(cutter, spans)):
        options = [device.bytes([(k,) * (j - i) for i, j in spans]) for k in modes]
        which = min(range(len(options)), key=lambda i: options[i].total)
        limit = device.cutter.setting.limit
        found.append((options[which].total / limit, -s, limit, options[which], mode_name(modes[which])))
    _, stage, limit, made, mode = max(found, key=lambda f: f[:2])
    return Need(float(made.total), limit, cutter.candidate, -stage, made, mode)


def smallest(source: Source | Fleet, setting: Setting, legal: list[Candidate]) -> Need | None:
    """The candidate that needs least: among those with the smallest micro-batch and one stage a device."""
    rank = sorted(
        (c for c in legal if c.virtual == 1 and c.schedule != "gpipe" or c.mesh.pp == 1),
        key=lambda c: (c.microbatch, -c.zero, c.mesh.dp_replicate, -c.mesh.tp * c.mesh.pp),
    )
    found = [made for c in rank[:TRIED] if (made := need(source, setting, c)) is not None]
    found = found or [made for c in legal[:TRIED] if (made := need(source, setting, c)) is not None]
    return min(found, key=lambda f: f.total / f.limit) if found else None


def message(source: Source | Fleet, setting: Setting, batch: Batch, job: Job, legal: list[Candidate]) -> str:
    """``no plan fits dgx-h100: 93.1 GiB per device needed at best (…), 76.0 GiB there; …``"""
    cluster = setting.cluster
    best = smallest(source, setting, legal)
    margin = 1 - job.search.memory_margin
    limit = setting.limit if best is None else best.limit
    there = f"{show_bytes(limit)} there ({margin:.0%} of {show_bytes(round(limit / margin))})"
    if best is None:
        return f"no plan fits {cluster.name}: no pipeline can be cut under these pins; {there}"
    c, b = best.candidate, best.bytes
    parts = {"parameters": b.parameters, "gradients": b.gradients, "optimizer state": b.optimizer,
             "activations": b.activations, "buffers at the peak": b.transient}  # fmt: skip
    largest = ", ".join(f"{k} {show_bytes(v)}" for k, v in sorted(parts.items(), key=lambda p: -p[1])[:3])
    where = f" on stage {best.stage}" if c.stages > 1 else ""
    where += f" ({source.place(c, best.stage)[1]})" if cluster.uneven else ""
    hybrid = f", dp_shard={c.mesh.dp_shard}" if c.mesh.dp_replicate > 1 else ""
    cp = f", cp={c.mesh.cp}" if c.mesh.cp > 1 else ""
    text = (
        f"no plan fits {cluster.name} ({cluster.devices} devices): {show_bytes(best.total)} per device needed at best{where} "
        f"(tp={c.mesh.tp}, pp={c.mesh.pp}, dp={c.mesh.dp}{hybrid}{cp}, zero={c.zero}, microbatch={c.microbatch}, recompute "
        f"{best.recompute}), {there}; {largest}"
    )
    ways = relaxations(source, setting, batch, job, best)
    return f"{text}. Any of these would do: {'; '.join(ways)}" if ways else text


def relaxations(source: Source | Fleet, setting: Setting, batch: Batch, job: Job, best: Need) -> list[str]:
    """More memory, other pins, more hosts: what each would have to be."""
    margin = 1 - job.search.memory_margin
    found = []
    free = {
        k
        for k in ("tp", "pp", "dp", "dp_replicate", "dp_shard", "cp", "zero", "microbatch", "recompute", "schedule")
        if getattr(job.pins, k) is not None
    }
    if free and not setting.cluster.uneven:
        loose = unpinned(source, setting, batch, job)
        if loose is not None and loose.total < best.total * 0.999:
            c = loose.candidate
            found.append(
                f"leave out the pins ({', '.join(sorted(free))}): {show_bytes(loose.total)} with tp={c.mesh.tp}, "
                f"pp={c.mesh.pp}, zero={c.zero}, recompute {loose.recompute}"
            )
    if best.total > best.limit:
        found.append(f"{enough(best.total / margin)} of memory per device")
    hosts = more_hosts(source, setting, batch, job)
    if hosts is not None:
        found.append(hosts)
    return found


def enough(bytes: float) -> str:
    """Bytes rounded up, so that so much is enough: whole GiB where there are some."""
    if bytes >= GIB:
        return f"{math.ceil(bytes / GIB)} GiB"
    return show_bytes(math.ceil(10 * bytes / MIB) * MIB / 10)


def unpinned(source: Source | Fleet, setting: Setting, batch: Batch, job: Job) -> Need | None:
    free = Job(batch=job.batch, passes=job.passes, optimizer=job.optimizer, search=job.search)
    other = Source(source.program, setting.cluster, replace(setting, recompute=None), free)
    return least_on(other, replace(setting, recompute=None), setting.cluster, batch, Pins())


def more_hosts(source: Source | Fleet, setting: Setting, batch: Batch, job: Job) -> str | None:
    """The fewest hosts of the same kind on which something fits."""
    if setting.cluster.uneven:
        return None
    for times in MORE_HOSTS:
        cluster = grown(setting.cluster, times)
        wider = replace(setting, cluster=cluster)
        pins = job.pins.model_copy(update={"dp": None, "dp_replicate": None, "pp": None, "cp": None, "context": None})
        made = least_on(Source(source.program, cluster, wider, job), wider, cluster, batch, pins)
        if made is not None and made.total <= setting.limit:
            return f"{cluster.hosts} hosts ({show_bytes(made.total)} per device)"
    return None


def grown(cluster: Cluster, times: int) -> Cluster:
    """A cluster of one kind with more hosts; links over the whole cluster reach all of them."""
    group = cluster.groups[0]
    links = tuple(replace(k, devices=k.devices * times) if k.span == "cluster" else k for k in cluster.links)
    return Cluster(cluster.name, (replace(group, hosts=group.hosts * times, links=links),), links)


def least_on(source: Source, setting: Setting, cluster: Cluster, batch: Batch, pins: Pins) -> Need | None:
    try:
        grids = meshes(cluster.devices, cluster.devices_per_host, source.calls, batch.sequences, pins)
        legal = [c for m in grids for c in candidates(m, batch.sequences, source.calls, cluster.devices_per_host, pins,
                                                      source.variants(m.tp)[0])]  # fmt: skip
    except PlanError:
        return None
    return smallest(source, setting, legal)
