"""A pipeline schedule as events: when every forward and backward runs, how long devices wait, how much is in flight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.cost.schedules import (
    BACKWARD,
    FORWARD,
    INPUT,
    V_SHAPED,
    WEIGHT,
    Action,
    actions,
    rounds,
    stages_of,
)

SIMULATED = 4
"""So many rounds of micro-batches over the pipeline are simulated before the steady state is extrapolated."""


@dataclass(frozen=True)
class Timeline:
    """``seconds`` from the first start to the last end; ``busy`` and ``ends`` by device; ``events`` of
    (device, action, start, end) in the order they start where they were asked for."""

    seconds: float
    busy: tuple[float, ...]
    ends: tuple[float, ...]
    events: tuple[tuple[int, Action, float, float], ...] = ()


@lru_cache(maxsize=4096)
def in_flight(schedule: str, devices: int, virtual: int, microbatches: int) -> tuple[int, ...]:
    """For every stage, the most micro-batches whose activations a device holds of it at one time (each at its own peak)."""
    if schedule == "gpipe":
        return (microbatches,) * devices
    if schedule == "1f1b":
        return tuple(min(microbatches, devices - d) for d in range(devices))
    found = [0] * (devices * virtual)
    for d in range(devices):
        states = moments(schedule, devices, virtual, microbatches, d)
        for i, s in enumerate(stages_of(schedule, devices, devices * virtual, d)):
            found[s] = max(m.flying[i] for m in states)
    return tuple(found)


@dataclass(frozen=True)
class Moment:
    """A state of a device, for each of its stages: micro-batches in flight, from the forward to the end of the backward, and
    how many of those wait for the gradients of weights alone. ``after``: for which of its stages a backward's
    first part has just ended; otherwise (-1) some action begins."""

    flying: tuple[int, ...]
    waiting: tuple[int, ...]
    after: int = -1


@lru_cache(maxsize=4096)
def moments(schedule: str, devices: int, virtual: int, microbatches: int, device: int) -> tuple[Moment, ...]:
    """The distinct states of a device in which a forward (already counted) or a backward begins, or has ended in part."""
    few = settled(schedule, microbatches, devices, virtual)
    place = {s: i for i, s in enumerate(stages_of(schedule, devices, devices * virtual, device))}
    flying, waiting = [0] * len(place), [0] * len(place)
    seen: dict[Moment, None] = {}

    def see(after: int = -1) -> None:
        seen.setdefault(Moment(tuple(flying), tuple(waiting), after))

    for kind, stage, _ in actions(schedule, devices, virtual, few)[device]:
        i = place[stage]
        if kind == FORWARD:
            flying[i] += 1
            see()
        elif kind == INPUT:
            see()
            waiting[i] += 1
            see(after=i)
        else:
            flying[i] -= 1
            waiting[i] -= kind == WEIGHT
    return tuple(seen)


def settled(schedule: str, microbatches: int, devices: int, virtual: int) -> int:
    """A smaller number of micro-batches with the same rounds, after which nothing new happens."""
    if virtual > 1 and schedule not in V_SHAPED and rounds(microbatches, devices) != devices:
        return microbatches  # rounds of another length: extrapolating would change them
    return min(microbatches, SIMULATED * devices)


def simulate(
    schedule: str,
    forward: Sequence[float],
    backward: Sequence[float],
    send: Sequence[float],
    devices: int,
    microbatches: int,
    *,
    parts: Sequence[tuple[float, float]] = (),
    events: bool = False,
) -> Timeline:
    """Seconds of ``microbatches`` through stages with these times; `device_of` says where a stage runs.

    ``parts``: seconds of each stage's backward where the schedule runs it in two, for its inputs and for its weights.
    ``send[s]``: seconds from stage s to s + 1 (and back); sending does not keep a device busy, waiting does. Of many
    micro-batches some are simulated and the steady state is extrapolated, unless ``events`` are wanted.
    """
    virtual = len(forward) // devices
    few = microbatches if events else settled(schedule, microbatches, devices, virtual)
    done = run(schedule, forward, backward, send, devices, few, parts, events)
    if few == microbatches:
        return done
    less = run(schedule, forward, backward, send, devices, few - devices, parts, False)
    more = (microbatches - few) / devices
    period = done.seconds - less.seconds
    return Timeline(
        done.seconds + more * period,
        tuple(b + more * (b - c) for b, c in zip(done.busy, less.busy, strict=True)),
        tuple(e + more * period for e in done.ends),
    )


def run(
    schedule: str, forward: Sequence[float], backward: Sequence[float], send: Sequence[float], devices: int,
    microbatches: int, parts: Sequence[tuple[float, float]], events: bool,
) -> Timeline:  # fmt: skip
    stages = len(forward)
    orders = actions(schedule, devices, stages // devices, microbatches)
    ended = [[math.nan] * (stages * microbatches) for _ in range(2)]
    free, at, busy = [0.0] * devices, [0] * devices, [0.0] * devices
    log: list[tuple[int, Action, float, float]] = []
    cost = {FORWARD: forward, BACKWARD: backward, INPUT: [i for i, _ in parts], WEIGHT: [w for _, w in parts]}
    left = sum(map(len, orders))
    while left:
        moved = False
        for d in range(devices):
            order, i, now = orders[d], at[d], free[d]
            while i < len(order):
                kind, stage, m = order[i]
                if kind == FORWARD:
                    ready = ended[0][(stage - 1) * microbatches + m] + send[stage - 1] if stage else 0.0
                elif kind == WEIGHT:
                    ready = 0.0
                else:
                    own = ended[0][stage * microbatches + m]
                    after = ended[1][(stage + 1) * microbatches + m] + send[stage] if stage + 1 < stages else own
                    ready = after if after > own else own if after == after else after
                if ready != ready:
                    break
                begin = ready if ready > now else now
                now = begin + cost[kind][stage]
                busy[d] += cost[kind][stage]
                if kind != WEIGHT:
                    ended[kind != FORWARD][stage * microbatches + m] = now
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
