"""The points of the outer search that the job's pins and the arithmetic allow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from autopar.cost.schedules import SPLIT, V_SHAPED, runs
from autopar.errors import PlanError
from autopar.plan.plan import MeshShape
from autopar.solve.pipeline import Candidate
from autopar.spec.job import Batch, Pins

MOST_VIRTUAL = 8  # stages a device under interleaving: more only multiply messages
WHOLE = ("1f1b", "gpipe", "interleaved1f1b")  # schedules whose backwards are whole, which the search begins with
APART = ("interleavedzerobubble", "zbvzerobubble", "dualpipev")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n < 4096 else sorted(
        {e for d in range(1, int(n**0.5) + 1) if n % d == 0 for e in (d, n // d)}
    )  # fmt: skip


def meshes(
    devices: int, per_host: int, blocks: int, sequences: int, pins: Pins, contexts: Sequence[int] = (1,)
) -> list[MeshShape]:
    """Every mesh that uses all devices; ``contexts``: the degrees of cp. tp stays within a host unless it is pinned. Raises
    `PlanError` if there is none."""
    product = (pins.tp or 1) * (pins.pp or 1) * (pins.dp or 1) * (pins.cp or 1)
    if devices % product:
        named = " · ".join(f"{k}={getattr(pins, k)}" for k in ("tp", "pp", "dp", "cp") if getattr(pins, k))
        raise PlanError(
            f"pins {named} take {product} devices a copy, which does not divide the {devices} devices there"
        )
    found = []
    split = [f"{glob}: {text}" for glob, text in (pins.placements or {}).items() if text != "R"]
    if split and (pins.tp or devices) == 1:
        raise PlanError(f"placements {', '.join(split)} need tp > 1")
    for tp in [pins.tp] if pins.tp else [d for d in divisors(devices) if d <= per_host and (d > 1 or not split)]:
        for cp, pp in itertools.product(contexts, [pins.pp] if pins.pp else divisors(devices // tp)):
            if devices % (tp * pp * cp) or pp > max(1, blocks):
                continue
            dp = devices // (tp * pp * cp)
            parts = (pins.dp_shard or 1, pins.dp_replicate or 1)
            if pins.dp in (None, dp) and sequences % dp == 0 and not any(dp % part for part in parts):
                found.append(MeshShape(pp=pp, dp=dp, cp=cp, tp=tp))
    if not found:
        raise PlanError(impossible(devices, blocks, sequences, pins))
    return found


def impossible(devices: int, blocks: int, sequences: int, pins: Pins) -> str:
    """Why no mesh is left, with the numbers."""
    if pins.pp and pins.pp > max(1, blocks):
        return f"pp={pins.pp} needs at least {pins.pp} blocks; the model has {blocks}"
    cp = f" · cp={pins.cp}" if (pins.cp or 1) > 1 else ""
    if pins.tp and pins.pp and pins.dp and pins.tp * pins.pp * pins.dp * (pins.cp or 1) != devices:
        total = pins.tp * pins.pp * pins.dp * (pins.cp or 1)
        return f"tp={pins.tp} · pp={pins.pp} · dp={pins.dp}{cp} = {total}, but there are {devices} devices"
    model = (pins.tp or 1) * (pins.pp or 1) * (pins.cp or 1)
    shard = pins.dp_shard or pins.dp_replicate
    parts = f", and {shard} (dp_{'shard' if pins.dp_shard else 'replicate'}) divide the replicas" if shard else ""
    return (
        f"{devices} devices and {sequences} sequences a step do not go together: the replicas (dp = {devices} / (tp · pp)"
        f"{f', at most {devices // model} here' if model > 1 else ''}) must divide the sequences, tp stay within a host "
        f"and pp within the {blocks} blocks{parts}; take sequences that a divisor of {devices} divides"
    )


def candidates(
    mesh: MeshShape, sequences: int, blocks: int, per_host: int, pins: Pins, variant: str, names: Sequence[str] = WHOLE
) -> Iterator[Candidate]:
    """Every ZeRO stage (and how many devices share a state), micro-batch and schedule on a mesh; schedules of ``names``
    where none is pinned."""
    each = sequences // mesh.dp
    if pins.microbatch and each % pins.microbatch:
        return
    states = list(shardings(mesh, per_host, pins))
    for b in [pins.microbatch] if pins.microbatch else divisors(each):
        for schedule, virtual in schedules(mesh.pp, each // b, blocks, pins, names):
            for shape, zero in states:
                if schedule in SPLIT and zero > 1 and mesh.copies > 1:
                    continue  # wrong gradients, without a word (torch 2.13)
                yield Candidate(shape, zero, b, each // b, schedule, virtual, variant)


def shardings(mesh: MeshShape, per_host: int, pins: Pins) -> Iterator[tuple[MeshShape, int]]:
    """The mesh with every ZeRO stage, over all of dp and over every part of it that may share a state."""
    degrees = replicas(mesh, per_host, pins)
    for zero in [pins.zero] if pins.zero is not None else [0] if mesh.copies == 1 else [0, 1, 2, 3]:
        for degree in degrees:
            divided = degree < mesh.dp or mesh.cp > 1  # along cp states are divided always
            if mesh.copies == 1 or (divided if zero else degree == mesh.dp):
                yield mesh.model_copy(update={"dp_replicate": degree if zero else 1}), zero


def replicas(mesh: MeshShape, per_host: int, pins: Pins) -> list[int]:
    """How often a state may be held along dp, from once (divided among all) to dp times (not divided).

    Where dp leaves a host, the devices that share a state lie within a host or are whole hosts: other numbers pay for the
    links between hosts as these do and spare less memory.
    """
    if pins.dp_shard or pins.dp_replicate:
        return [pins.dp_replicate or mesh.dp // (pins.dp_shard or 1)]
    inner = mesh.tp * mesh.cp
    if mesh.dp * inner <= per_host:
        return sorted({1, mesh.dp})
    fits = [s for s in divisors(mesh.dp) if per_host % (inner * s) == 0 or inner * s % per_host == 0]
    return [mesh.dp // s for s in sorted({1, *fits, mesh.dp}, reverse=True)]


def schedules(
    pp: int, microbatches: int, blocks: int, pins: Pins, names: Sequence[str] = WHOLE
) -> Iterator[tuple[str, int]]:
    """Schedules with their stages per device, of those that torch runs with so many micro-batches."""
    if pp == 1:
        if pins.virtual_stages in (None, 1):
            yield pins.schedule or "1f1b", 1
        return
    for name in [pins.schedule] if pins.schedule else names:
        if not runs(name, pp, microbatches):
            continue
        for v in virtual_stages(name, pins):
            if v * pp <= blocks or v == 1:
                yield name, v


def virtual_stages(schedule: str, pins: Pins) -> list[int]:
    """The stages per device that a schedule may have."""
    if schedule in ("gpipe", "1f1b"):
        found = [1]
    elif schedule in V_SHAPED:
        found = [2]
    else:
        found = [v for v in range(1, MOST_VIRTUAL + 1) if (v & (v - 1) == 0 if schedule in SPLIT else v > 1)]
    if pins.virtual_stages is None or pins.virtual_stages in found:
        return found if pins.virtual_stages is None else [pins.virtual_stages]
    return [pins.virtual_stages] if pins.schedule == schedule and schedule not in ("gpipe", "1f1b", *V_SHAPED) else []


def no_schedule(batch: Batch, found: list[MeshShape], pins: Pins) -> str:
    """Why no schedule is left, with the numbers."""
    wanted = " · ".join(
        f"{k} {v}" for k in ("schedule", "virtual_stages", "zero") if (v := getattr(pins, k)) is not None
    )
    mesh = max(found, key=lambda m: (m.pp, -m.dp))
    if mesh.pp == 1:
        return f"pins: {wanted} need a pipeline, pp > 1; leave them out"
    share = batch.sequences // mesh.dp
    count = share // (pins.microbatch or 1)
    start = f"pins: {wanted or 'these pins'} cannot run with pp {mesh.pp} and {count} micro-batches"
    if count < mesh.pp:
        return f"{start}, of {share} sequences a replica; at least {mesh.pp} are needed, or schedule gpipe"
    if pins.schedule == "dualpipev" and count < 2 * mesh.pp:
        return f"{start}; dualpipev takes at least a micro-batch for each of its {2 * mesh.pp} stages"
    if pins.schedule in SPLIT and (pins.zero or 0) > 1:
        return f"{start}; schedules that run the gradients of weights apart take zero 0 and 1 only"
    return f"{start}; interleaved schedules take multiples of pp and no more stages than blocks"


def check_batch(batch: Batch, found: list[MeshShape], pins: Pins) -> None:
    """A pinned micro-batch must divide a replica's share."""
    if pins.microbatch and all(batch.sequences // m.dp % pins.microbatch for m in found):
        shares = sorted({batch.sequences // m.dp for m in found})
        raise PlanError(
            f"microbatch={pins.microbatch} does not divide the {shares[0]} sequences of a replica "
            f"({batch.sequences} a step over dp={batch.sequences // shares[0]}); one of {divisors(shares[0])} would"
        )
