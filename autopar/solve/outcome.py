"""A candidate with its stages fixed: recompute of every block, the timeline, the ledger, and the bytes of every device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.cost.memory import States
from autopar.cost.regions import RECOMPUTE
from autopar.cost.timeline import Timeline, simulate, stage_counts
from autopar.plan.plan import Bytes
from autopar.solve.pipeline import Candidate, once_a_step
from autopar.solve.stages import Cutter, Span


@dataclass(frozen=True)
class Part:
    """One stage: blocks i … j-1, the recompute of each, seconds of a micro-batch, bytes it saves for one."""

    blocks: tuple[int, int]
    recompute: tuple[int, ...]
    forward: float
    backward: float
    talk: float
    saved: float
    working: float
    buffers: float
    states: States[float]


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
    slowest: int
    fullest: int
    timeline: Timeline


def settle(cutter: Cutter, spans: list[tuple[int, int]]) -> Outcome | None:
    """The outcome of stages cut at ``spans``; None if a device cannot hold its stages."""
    modes = recompute(cutter, spans)
    if modes is None:
        return None
    return outcome(cutter, spans, modes)


# ------------------------------------------------------------------ recompute


def devices_of(cutter: Cutter, count: int) -> list[list[int]]:
    """The stages of every device along pp."""
    pp = cutter.candidate.mesh.pp
    return [list(range(d, count, pp)) for d in range(pp)]


def recompute(cutter: Cutter, spans: list[tuple[int, int]]) -> list[tuple[int, ...]] | None:
    """For every stage the mode (0 none, 1 selective, 2 full) of each block: the least time that fits its device."""
    found: list[tuple[int, ...]] = [()] * len(spans)
    pinned = cutter.setting.recompute
    for stages in devices_of(cutter, len(spans)):
        blocks = [(s, k) for s in stages for k in range(*spans[s])]
        if pinned is not None:
            chosen = np.full(len(blocks), RECOMPUTE.index(pinned))
            if shortage(cutter, spans, stages, blocks, chosen) > 0:
                return None
        else:
            chosen = least(cutter, spans, stages, blocks)
            if chosen is None:
                return None
        for s in stages:
            found[s] = tuple(int(m) for (t, _), m in zip(blocks, chosen, strict=True) if t == s)
    return found


def least(cutter: Cutter, spans: list, stages: list[int], blocks: list[tuple[int, int]]) -> np.ndarray | None:
    """Modes of the blocks of one device: nothing, or few blocks selectively, fully, or all selectively and few fully."""
    none = np.zeros(len(blocks), int)
    if shortage(cutter, spans, stages, blocks, none) <= 0:
        return none
    b = cutter.blocks
    flight = np.array([cutter.flight[s] for s, _ in blocks], float)
    at = [k for _, k in blocks]
    saved, took = b.saved[:, at] * flight, (b.again + b.again_talk)[:, at]
    tries = []
    for start, to in ((0, 1), (0, 2), (1, 2)):
        modes = grown(cutter, spans, stages, blocks, start, to, saved[start] - saved[to], took[to] - took[start])
        if modes is not None:
            tries.append((float(sum(took[m, i] for i, m in enumerate(modes))), len(tries), modes))
    return min(tries, key=lambda t: t[:2])[2] if tries else None


def grown(
    cutter: Cutter, spans: list, stages: list[int], blocks: list, start: int, to: int, spared: np.ndarray, took: np.ndarray
) -> np.ndarray | None:  # fmt: skip
    """As few blocks as possible from mode ``start`` to mode ``to``, the cheapest a byte first; None if all do not fit."""
    rate = np.where(spared > 0, took / np.maximum(spared, 1e-30), np.inf)
    order = np.argsort(rate, kind="stable")
    low, high = 0, int(np.isfinite(rate).sum())

    def modes(count: int) -> np.ndarray:
        made = np.full(len(blocks), start)
        made[order[:count]] = to
        return made

    if shortage(cutter, spans, stages, blocks, modes(high)) > 0:
        return None
    while low < high:
        middle = (low + high) // 2
        if shortage(cutter, spans, stages, blocks, modes(middle)) > 0:
            low = middle + 1
        else:
            high = middle
    return modes(low)


def shortage(cutter: Cutter, spans: list, stages: list[int], blocks: list, modes: np.ndarray) -> float:
    """Bytes that a device lacks."""
    parts = [part(cutter, s, spans[s], tuple(m for (t, _), m in zip(blocks, modes, strict=True) if t == s)) for s in stages]
    return peak(cutter, stages, parts)[1] - cutter.setting.limit


# ------------------------------------------------------------------ one stage, one device


def part(cutter: Cutter, s: int, span: tuple[int, int], modes: tuple[int, ...]) -> Part:
    """The numbers of one stage."""
    i, j = span
    b, cells = cutter.blocks, cutter.span(s)
    index = np.array(modes, int), np.arange(i, j)
    again, talk = float(b.again[index].sum()), float(b.again_talk[index].sum())
    working = max([float(cells.working[0][i, j]), *b.working[index]])
    return Part(
        blocks=span,
        recompute=modes,
        forward=float(cells.forward[i, j]),
        backward=float(cells.backward[i, j]) + again + talk,
        talk=float(cells.talk[i, j]) + talk,
        saved=float(b.saved[index].sum()) + float(cells.fixed[i, j]),
        working=working,
        buffers=float(cutter.buffers(s)[i, j]),
        states=cutter.states(at(cells, i, j)),
    )


def at(span: Span, i: int, j: int) -> Span:
    """The numbers of one [i, j]."""
    return Span(**{k: [x[i, j] for x in v] if isinstance(v, list) else v[i, j] for k, v in vars(span).items()})


def peak(cutter: Cutter, stages: list[int], parts: list[Part]) -> tuple[Bytes, float]:
    """Bytes of one device at its peak, by kind: of micro-batches in flight the worst moment of the schedule."""
    c = cutter.candidate
    if c.virtual == 1:
        activations = sum(cutter.flight[s] * p.saved for s, p in zip(stages, parts, strict=True))
    else:
        saved = dict(zip(stages, (p.saved for p in parts), strict=True))
        moments = stage_counts(c.schedule, c.mesh.pp, c.virtual, c.microbatches, stages[0])
        activations = max(sum(n * saved[s] for s, n in counts.items()) for counts in moments)
    transient = max(p.working for p in parts) + sum(p.buffers for p in parts) + max(p.states.transient for p in parts)
    made = Bytes(
        parameters=round(sum(p.states.parameters for p in parts)),
        gradients=round(sum(p.states.gradients for p in parts)),
        optimizer=round(sum(p.states.optimizer for p in parts)),
        activations=round(activations),
        transient=round(transient),
    )
    return made, float(made.total)


def outcome(cutter: Cutter, spans: list[tuple[int, int]], modes: list[tuple[int, ...]]) -> Outcome:
    """Run the schedule and add up."""
    c = cutter.candidate
    parts = [part(cutter, s, span, m) for s, (span, m) in enumerate(zip(spans, modes, strict=True))]
    groups = devices_of(cutter, len(parts))
    sends = [cutter.sends[span[1] - 1] for span in spans[:-1]]
    line = timeline(cutter, parts, sends)
    ends = [[once_a_step(c, cutter.setting, cutter.sharding, at(cutter.span(s), *spans[s])) for s in g] for g in groups]
    shown = [sum(float(e) for e, _ in group) for group in ends]
    updating = [sum(float(o) for _, o in group) for group in ends]
    step = max(line.ends[d] + shown[d] + updating[d] for d in range(len(groups)))
    talks = [c.microbatches * sum(parts[s].talk for s in g) for g in groups]
    busy = [c.microbatches * sum(parts[s].forward + parts[s].backward for s in g) for g in groups]
    slowest = max(range(len(groups)), key=lambda d: (busy[d] + shown[d] + updating[d], -d))
    held = [peak(cutter, g, [parts[s] for s in g]) for g in groups]
    fullest = max(range(len(groups)), key=lambda d: (held[d][1], -d))
    waiting = step - busy[slowest] - shown[slowest] - updating[slowest]
    return Outcome(
        candidate=c,
        parts=tuple(parts),
        seconds=step,
        compute=busy[slowest] - talks[slowest],
        exposed=talks[slowest] + shown[slowest],
        bubble=max(0.0, waiting) if len(groups) > 1 else 0.0,
        optimizer=updating[slowest],
        bytes=held[fullest][0],
        peaks=tuple(held[s % len(groups)][1] for s in range(len(parts))),
        slowest=slowest,
        fullest=fullest,
        timeline=line,
    )


def timeline(cutter: Cutter, parts: list[Part], sends: list[float], *, events: bool = False) -> Timeline:
    """The schedule with the stages' own times. A schedule that splits the backward gets weights' gradients apart."""
    c = cutter.candidate
    backward = [p.backward for p in parts]
    weight: list[float] = []
    if c.schedule == "interleavedzerobubble":
        share = cutter.blocks.weight_share
        weight = [b * share for b in backward]
        backward = [b - w for b, w in zip(backward, weight, strict=True)]
    if c.mesh.pp == 1:
        total = c.microbatches * (parts[0].forward + parts[0].backward)
        return Timeline(total, (total,), (total,))
    return simulate(
        c.schedule, [p.forward for p in parts], backward, sends, c.mesh.pp, c.microbatches, weight=weight, events=events
    )
