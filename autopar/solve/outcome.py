"""A candidate with its stages fixed: recompute of every block, the timeline, the ledger, and the bytes of every device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from autopar.cost.apart import in_two
from autopar.cost.schedules import device_of, stages_of
from autopar.cost.timeline import Moment, Timeline, moments, simulate
from autopar.plan.plan import Bytes
from autopar.solve.pipeline import Array, Candidate, once_a_step
from autopar.solve.stages import Cutter, chained, mode_of


@dataclass(frozen=True)
class Part:
    """One stage: blocks i … j-1, the recompute of each, seconds of a micro-batch, bytes it saves for one. ``apart``: the
    seconds of its backward's two parts, for its inputs and for its weights, where the schedule runs them apart."""

    blocks: tuple[int, int]
    recompute: tuple[int, ...]
    forward: float
    backward: float
    talk: float
    saved: float
    apart: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Outcome:
    """What a candidate comes to. ``slowest`` and ``fullest`` are devices along pp."""

    candidate: Candidate
    parts: tuple[Part, ...]
    seconds: float
    compute: float
    exposed: float
    bubble: float
    optimizer: float
    bytes: Bytes
    peaks: tuple[float, ...]  # of every stage: its device's
    held: tuple[Bytes, ...]  # of every device along pp
    limits: tuple[float, ...]  # bytes that each of them may hold
    slowest: int
    fullest: int
    timeline: Timeline


FEW = 3  # blocks of a device for which all choices of recompute are tried


@lru_cache(maxsize=64)
def choices(modes: int, blocks: int) -> Array:
    """Every choice of a mode for each block."""
    return np.array(list(itertools.product(range(modes), repeat=blocks)), int).reshape(-1, blocks)


Refusal = Literal["slow", "full"]
"""A device takes longer than what is known already, or cannot hold its stages."""


def settle(cutter: Cutter, spans: list[tuple[int, int]], best: float = float("inf")) -> Outcome | Refusal:
    """The outcome of stages cut at ``spans``, or why there is none worth having: ``best`` seconds are reached already."""
    modes: list[tuple[int, ...]] = [()] * len(spans)
    owners: list[Device] = []
    c = cutter.candidate
    m, last = c.microbatches, 0.0 if c.splits else 1.0  # none waits for a device that ends with gradients of weights
    for d in reversed(range(c.mesh.pp)):  # the last waits longest for its first micro-batch
        ahead = sum(
            float(cutter.at(s).over("forward", at) + last * cutter.at(s).over("backward", at))
            for s, at in enumerate(spans[:d])
        )
        device = Device(cutter, spans, stages_of(c.schedule, c.mesh.pp, len(spans), d))
        once = sum(device.once())
        each = sum(float(c.forward) + float(c.backward) for c in device.cells)
        if ahead + m * each + once >= best:
            return "slow"
        chosen = device.least()
        if chosen is None:
            return "full"
        again = float(device.seconds[chosen, np.arange(len(chosen))].sum())
        if ahead + m * (each + again) + once >= best:
            return "slow"
        owners.insert(0, device)
        for s in device.stages:
            modes[s] = tuple(int(m) for m in chosen[device.stage_of == s])
    return outcome(cutter, spans, modes, owners)


def devices(cutter: Cutter, spans: list[tuple[int, int]]) -> list[Device]:
    c = cutter.candidate
    return [Device(cutter, spans, stages_of(c.schedule, c.mesh.pp, len(spans), d)) for d in range(c.mesh.pp)]


# ------------------------------------------------------------------ one device


class Device:
    """The stages of one device along pp, and what recompute of their blocks spares.

    A choice of recompute is an array with the mode (0 none, 1 selective, 2 full, 3 … the selections) of each of the
    device's blocks.
    """

    def __init__(self, cutter: Cutter, spans: list[tuple[int, int]], stages: list[int]) -> None:
        cutter = cutter.at(stages[0])
        b, c = cutter.blocks, cutter.candidate
        self.cutter, self.stages = cutter, stages
        self.cells = [cutter.measured(s, spans[s]) for s in stages]
        self.states = [cutter.states(cell) for cell in self.cells]
        self.buffers = [cutter.buffer(s, *spans[s]) for s in stages]
        if c.evenly:
            self.buffers = [b + cutter.sent(s, spans[s][1]) for s, b in zip(stages, self.buffers, strict=True)]
        self.stage_of = np.array([s for s in stages for _ in range(*spans[s])], int)
        self.index = np.array([k for s in stages for k in range(*spans[s])], int)
        self.saved = b.saved[:, self.index]
        self.working = b.working[:, self.index]
        self.seconds = (b.again + b.again_talk)[:, self.index]
        self.talk = b.again_talk[:, self.index]
        if c.evenly:
            states = moments(c.schedule, c.mesh.pp, c.virtual, c.microbatches, stages[0])
        else:
            states = (Moment(tuple(cutter.flight[s] for s in stages), (0,) * len(stages)),)
        self.moments = np.array([m.flying for m in states], float)
        self.waits = np.array([m.waiting for m in states], float)
        self.after = np.array([m.after for m in states])
        self.splits = c.splits
        self.freed = np.array([float(cell.freed) for cell in self.cells])
        self.waiting = np.array([float(cell.waiting) for cell in self.cells]) - self.freed
        self.waiting[[s == 0 for s in stages]] = 0.0
        self.member = np.array([self.stage_of == s for s in stages], float).reshape(len(stages), -1)
        self.beside = np.array([float(cell.fixed) for cell in self.cells])
        self.base = sum(s.parameters + s.gradients + s.optimizer for s in self.states) + sum(self.buffers)
        self.gathered = max(s.transient for s in self.states)
        self.outside = max(float(cell.outside) for cell in self.cells)

    def saves(self, modes: Array) -> Array:
        """Bytes that each stage saves for one micro-batch."""
        return self.member @ self.saved[modes, np.arange(len(modes))] + self.beside

    def worst(self, modes: Array) -> tuple[float, float]:
        """At the schedule's worst moment, bytes that are saved, and bytes at the peak of what runs beside them.

        The first part of a backward ends in its stage's first block. A stage whose blocks are recomputed runs its backward
        whole, as soon as the first part is due; stage 0, which sends no gradient, as late as the second.
        """
        works = self.working[modes, np.arange(len(modes))].max(initial=0.0)
        held = self.moments @ self.saves(modes)
        if self.splits:
            held = held + self.waits @ self.between(modes)
        running = np.where(self.after < 0, max(self.outside, works), works + self.freed[self.after])
        at = int(np.argmax(held + running))
        return float(held[at]), float(running[at])

    def between(self, modes: Array) -> Array:
        """Bytes that each stage holds more for a micro-batch whose gradients of weights wait."""
        whole = self.whole(modes)
        return np.where(whole, -self.saves(modes), self.waiting)

    def whole(self, modes: Array) -> Array:
        """Which stages run their backward whole although the schedule has it in two parts."""
        return np.array([s > 0 and bool((modes[self.stage_of == s] > 0).any()) for s in self.stages])

    def total(self, modes: Array) -> float:
        """Bytes at the worst moment of the schedule."""
        return self.base + self.gathered + sum(self.worst(modes))

    def lacks(self, modes: Array) -> bool:
        return self.total(modes) > self.cutter.setting.limit

    def least(self) -> Array | None:
        """The modes that fit with the least time of recomputing: none; few blocks selectively, or fully; all selectively
        and few fully; all at one selection and few at the next. None if nothing fits; the pinned mode where there is one."""
        pinned = self.cutter.setting.recompute
        none = np.zeros(len(self.index), int)
        if pinned is not None:
            none += mode_of(pinned, len(self.saved))
            return None if self.lacks(none) else none
        if not self.lacks(none):
            return none
        found = [
            m for start, to in ((0, 1), (0, 2), (1, 2), *self.neighbours()) if (m := self.grown(start, to)) is not None
        ]
        if len(self.index) <= FEW:
            found += self.tried()
        return min(found, key=self.again) if found else None

    def again(self, modes: Array) -> float:
        """Seconds of recomputing a micro-batch."""
        return float(self.seconds[modes, np.arange(len(modes))].sum())

    def tried(self) -> list[Array]:
        """Of all choices for a few blocks that fit, the one with the least seconds."""
        every, blocks = choices(len(self.saved), len(self.index)), np.arange(len(self.index))
        held = self.moments @ (self.member @ self.saved[every, blocks].T + self.beside[:, None])
        works = np.maximum(self.outside, self.working[every, blocks].max(1, initial=0.0))
        fits = every[self.base + self.gathered + works + held.max(0) <= self.cutter.setting.limit]
        order = np.argsort(self.seconds[fits, blocks].sum(1), kind="stable")
        return [m for m in fits[order[:1]] if not self.lacks(m)]

    def neighbours(self) -> list[tuple[int, int]]:
        """The two selections (or none, or full) between which all blocks just fit."""
        chain = chained(len(self.saved))
        every = np.zeros(len(self.index), int)
        low, high = 1, len(chain) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.lacks(every + chain[middle]) else (low, middle)
        return [(chain[low - 1], chain[low])] if len(chain) > 2 else []

    def grown(self, start: int, to: int) -> Array | None:
        """As few blocks as possible from mode ``start`` to ``to``, the cheapest a byte first; None if all do not suffice."""
        weight = (self.moments.max(0) @ self.member) if len(self.index) else np.zeros(0)
        spared = (self.saved[start] - self.saved[to]) * weight
        took = self.seconds[to] - self.seconds[start]
        rate = np.where(spared > 0, took / np.maximum(spared, 1e-30), np.inf)
        order = np.argsort(rate, kind="stable")
        low, high = 0, int(np.isfinite(rate).sum())

        def modes(count: int) -> Array:
            made = np.full(len(self.index), start)
            made[order[:count]] = to
            return made

        if self.lacks(modes(high)):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.lacks(modes(middle)) else (low, middle)
        return modes(low)

    def parts(self, spans: list[tuple[int, int]], modes: list[tuple[int, ...]]) -> list[Part]:
        """The numbers of each stage under its blocks' modes."""
        chosen = np.array([m for s in self.stages for m in modes[s]], int)
        every = np.arange(len(chosen))
        again, talk, saved = self.seconds[chosen, every], self.talk[chosen, every], self.saves(chosen)
        whole = self.whole(chosen)
        found = []
        for k, s in enumerate(self.stages):
            mine, cell = self.stage_of == s, self.cells[k]
            backward = float(cell.backward) + float(again[mine].sum())
            parts = float(cell.backward - cell.weight), float(cell.weight)
            parts = in_two(parts, int(cell.groups), int(cell.steps), self.cutter.setting.cluster.device)
            found.append(
                Part(
                    blocks=spans[s],
                    recompute=modes[s],
                    forward=float(cell.forward),
                    backward=backward,
                    talk=float(cell.talk) + float(talk[mine].sum()),
                    saved=float(saved[k]),
                    apart=(0.0, backward) if s == 0 else (backward, 0.0) if whole[k] else parts,
                )
            )
        return found

    def bytes(self, modes: list[tuple[int, ...]]) -> Bytes:
        """The device's bytes at the peak, by kind."""
        chosen = np.array([m for s in self.stages for m in modes[s]], int)
        saved, works = self.worst(chosen)
        return Bytes(
            parameters=round(sum(s.parameters for s in self.states)),
            gradients=round(sum(s.gradients for s in self.states)),
            optimizer=round(sum(s.optimizer for s in self.states)),
            activations=round(saved),
            transient=round(works + sum(self.buffers) + self.gathered),
        )

    def once(self) -> tuple[float, float]:
        """Seconds once a step: what shows of communication, and the optimizer."""
        c = self.cutter
        ends = [once_a_step(c.candidate, c.setting, c.sharding, cell) for cell in self.cells]
        return sum(float(e) for e, _ in ends), sum(float(o) for _, o in ends)


def outcome(
    cutter: Cutter, spans: list[tuple[int, int]], modes: list[tuple[int, ...]], owners: list[Device] | None = None
) -> Outcome:
    """Run the schedule and add up."""
    c, owners = cutter.candidate, owners or devices(cutter, spans)
    made = {s: part for d in owners for s, part in zip(d.stages, d.parts(spans, modes), strict=True)}
    parts = [made[s] for s in range(len(spans))]
    line = timeline(cutter, parts, sends(cutter, spans))
    once = [d.once() for d in owners]
    talks = [c.microbatches * sum(parts[s].talk for s in d.stages) for d in owners]
    busy = list(line.busy)
    step = max(end + shown + updating for end, (shown, updating) in zip(line.ends, once, strict=True))
    slowest = max(range(len(owners)), key=lambda d: (busy[d] + sum(once[d]), -d))
    held = [d.bytes(modes) for d in owners]
    limits = tuple(d.cutter.setting.limit for d in owners)
    fullest = max(range(len(owners)), key=lambda d: (held[d].total / limits[d], -d))
    waiting = step - busy[slowest] - sum(once[slowest])
    return Outcome(
        candidate=c,
        parts=tuple(parts),
        seconds=step,
        compute=busy[slowest] - talks[slowest],
        exposed=talks[slowest] + once[slowest][0],
        bubble=max(0.0, waiting) if len(owners) > 1 else 0.0,
        optimizer=once[slowest][1],
        bytes=held[fullest],
        held=tuple(held),
        limits=limits,
        peaks=tuple(float(held[device_of(c.schedule, len(owners), s)].total) for s in range(len(parts))),
        slowest=slowest,
        fullest=fullest,
        timeline=line,
    )


def sends(cutter: Cutter, spans: list[tuple[int, int]]) -> list[float]:
    """Seconds from every stage to the next; none to a stage of the same device."""
    c = cutter.candidate
    home = [device_of(c.schedule, c.mesh.pp, s) for s in range(len(spans))]
    return [0.0 if home[s] == home[s + 1] else cutter.sending(s, spans[s][1]) for s in range(len(spans) - 1)]


def timeline(cutter: Cutter, parts: list[Part], sends: list[float], *, events: bool = False) -> Timeline:
    """The schedule with the stages' own times."""
    c = cutter.candidate
    if c.mesh.pp == 1:
        total = c.microbatches * (parts[0].forward + parts[0].backward)
        return Timeline(total, (total,), (total,))
    apart = [p.apart for p in parts] if c.splits else []
    forward, backward = [p.forward for p in parts], [p.backward for p in parts]
    return simulate(c.schedule, forward, backward, sends, c.mesh.pp, c.microbatches, parts=apart, events=events)
