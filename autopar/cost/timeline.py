"""A pipeline schedule as events: when every forward and backward runs, how long devices wait, how much is in flight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

FORWARD, BACKWARD, WEIGHT = 0, 1, 2
Action = tuple[int, int, int]
"""(FORWARD, BACKWARD or WEIGHT, stage, micro-batch)."""

SIMULATED = 4
"""So many rounds of micro-batches over the pipeline are simulated before the steady state is extrapolated."""
SPLIT = frozenset({"interleavedzerobubble"})  # schedules that run the gradients of weights apart


@dataclass(frozen=True)
class Timeline:
    """``seconds`` from the first start to the last end; ``busy`` and ``ends`` by device; ``events`` of
    (device, action, start, end) in the order they start where they were asked for."""

    seconds: float
    busy: tuple[float, ...]
    ends: tuple[float, ...]
    events: tuple[tuple[int, Action, float, float], ...] = ()


def rounds(microbatches: int, devices: int) -> int | None:
    """Micro-batches in one round of an interleaved schedule; None where torch refuses the number."""
    count = max(1, microbatches // devices)
    return microbatches // count if microbatches % count == 0 else None


@lru_cache(maxsize=512)
def actions(schedule: str, devices: int, virtual: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """What every device does, in order. Source: torch.distributed.pipelining.schedules (2.13)."""
    if schedule == "gpipe":
        fill = [tuple((FORWARD, d, m) for m in range(microbatches)) for d in range(devices)]
        return tuple(f + tuple((BACKWARD, d, m) for m in range(microbatches)) for d, f in enumerate(fill))
    if schedule == "1f1b":
        return tuple(one_forward_one_backward(d, devices, microbatches) for d in range(devices))
    if schedule in ("interleaved1f1b", "interleavedzerobubble"):
        return tuple(interleaved(d, devices, virtual, microbatches, schedule in SPLIT) for d in range(devices))
    raise ValueError(f"no timeline for the schedule {schedule!r}")


def one_forward_one_backward(device: int, devices: int, microbatches: int) -> tuple[Action, ...]:
    warm = min(microbatches, devices - device)
    order: list[Action] = [(FORWARD, device, m) for m in range(warm)]
    for m in range(microbatches):
        order.append((BACKWARD, device, m))
        if warm + m < microbatches:
            order.append((FORWARD, device, warm + m))
    return tuple(order)


def interleaved(device: int, devices: int, virtual: int, microbatches: int, split: bool) -> tuple[Action, ...]:
    """torch's `_get_1f1b_rank_ops`; with ``split`` the gradients of weights run apart, ``device`` steps later."""
    each = rounds(microbatches, devices)
    if each is None:
        raise ValueError(f"{microbatches} micro-batches are no multiple of the rounds over {devices} devices")
    total = virtual * microbatches
    warm = min((virtual - 1) * each + (1 if split else 2) * (devices - 1 - device), total)
    done: dict[tuple[int, int], int] = {}
    order: list[Action] = []
    backwards: list[int] = []
    weights = 0

    def put(kind: int, local: int) -> int:
        stage = local * devices + device
        m = done.get((kind, stage), 0)
        done[kind, stage] = m + 1
        order.append((kind, stage, m))
        return stage

    for step in range(total + warm):
        if step < total:
            put(FORWARD, step // each % virtual)
        if step >= warm:
            local = virtual - 1 - (step - warm) // each % virtual
            put(BACKWARD, local)
            backwards.append(local)
            if split and step - warm >= device:
                put(WEIGHT, backwards[weights])
                weights += 1
    while split and weights < len(backwards):
        put(WEIGHT, backwards[weights])
        weights += 1
    return tuple(order)


@lru_cache(maxsize=4096)
def in_flight(schedule: str, devices: int, virtual: int, microbatches: int) -> tuple[int, ...]:
    """For every stage, the most micro-batches whose activations a device holds of it at one time (each at its own peak)."""
    if schedule == "gpipe":
        return (microbatches,) * devices
    if schedule == "1f1b":
        return tuple(min(microbatches, devices - d) for d in range(devices))
    return tuple(max(counts[s] for counts in stage_counts(schedule, devices, virtual, microbatches, s % devices))
                 for s in range(devices * virtual))  # fmt: skip


@lru_cache(maxsize=4096)
def stage_counts(
    schedule: str, devices: int, virtual: int, microbatches: int, device: int
) -> tuple[dict[int, int], ...]:
    """The distinct states of a device: how many micro-batches of each of its stages are in flight."""
    few = settled(microbatches, devices, virtual)
    ends = WEIGHT if schedule in SPLIT else BACKWARD
    now = {d * devices + device: 0 for d in range(virtual)}
    seen: dict[tuple[int, ...], dict[int, int]] = {}
    for kind, stage, _ in actions(schedule, devices, virtual, few)[device]:
        if kind == FORWARD:
            now[stage] += 1
            seen[tuple(now.values())] = dict(now)
        elif kind == ends:
            now[stage] -= 1
    return tuple(seen.values())


def settled(microbatches: int, devices: int, virtual: int) -> int:
    """A smaller number of micro-batches with the same rounds, after which nothing new happens."""
    if virtual > 1:
        each = rounds(microbatches, devices)
        if each is None:
            return microbatches
        if each != devices:  # rounds of another length: extrapolating would change them
            return microbatches
        return min(microbatches, SIMULATED * devices)
    return min(microbatches, SIMULATED * devices)


def simulate(
    schedule: str,
    forward: Sequence[float],
    backward: Sequence[float],
    send: Sequence[float],
    devices: int,
    microbatches: int,
    *,
    weight: Sequence[float] = (),
    events: bool = False,
) -> Timeline:
    """Seconds of ``microbatches`` through stages with these times; stage s runs on device s % devices.

    ``send[s]``: seconds from stage s to s + 1 (and back); sending does not keep a device busy, waiting does. Of many
    micro-batches some are simulated and the steady state is extrapolated, unless ``events`` are wanted.
    """
    virtual = len(forward) // devices
    few = microbatches if events else settled(microbatches, devices, virtual)
    done = run(schedule, forward, backward, send, devices, few, weight, events)
    if few == microbatches:
        return done
    less = run(schedule, forward, backward, send, devices, few - devices, weight, False)
    more = (microbatches - few) / devices
    period = done.seconds - less.seconds
    per = [
        sum(forward[s] + backward[s] + (weight[s] if weight else 0.0) for s in range(d, len(forward), devices))
        for d in range(devices)
    ]  # noqa: E501
    return Timeline(
        done.seconds + more * period,
        tuple(microbatches * p for p in per),
        tuple(e + more * period for e in done.ends),
    )


def run(
    schedule: str, forward: Sequence[float], backward: Sequence[float], send: Sequence[float], devices: int,
    microbatches: int, weight: Sequence[float], events: bool,
) -> Timeline:  # fmt: skip
    stages = len(forward)
    orders = actions(schedule, devices, stages // devices, microbatches)
    ended = [[math.nan] * (stages * microbatches) for _ in range(2)]
    free, at, busy = [0.0] * devices, [0] * devices, [0.0] * devices
    log: list[tuple[int, Action, float, float]] = []
    cost = (forward, backward, weight)
    left = sum(map(len, orders))
    while left:
        moved = False
        for d in range(devices):
            order, i, now = orders[d], at[d], free[d]
            while i < len(order):
                kind, stage, m = order[i]
                if kind == FORWARD:
                    ready = ended[0][(stage - 1) * microbatches + m] + send[stage - 1] if stage else 0.0
                elif kind == BACKWARD:
                    own = ended[0][stage * microbatches + m]
                    after = ended[1][(stage + 1) * microbatches + m] + send[stage] if stage + 1 < stages else own
                    ready = after if after > own else own if after == after else after
                else:
                    ready = 0.0
                if ready != ready:
                    break
                begin = ready if ready > now else now
                now = begin + cost[kind][stage]
                busy[d] += cost[kind][stage]
                if kind != WEIGHT:
                    ended[kind][stage * microbatches + m] = now
                if events:
                    log.append((d, order[i], begin, now))
                i += 1
                moved = True
            left -= i - at[d]
            at[d], free[d] = i, now
        if not moved:
            raise AssertionError(f"the schedule {schedule} of {microbatches} micro-batches waits for itself")
    log.sort(key=lambda e: (e[2], e[0]))
    return Timeline(max(free), tuple(busy), tuple(free), tuple(log))
