"""What a candidate takes at least, with ZeRO's traffic and the recompute that its memory asks for: before stages are cut.

Cutting stages and running a schedule is most of a search's time, and most candidates cannot beat what is known. Both bounds
here leave things out (buffers, what shows of communication once a step), never add any, so no plan is lost by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autopar.cost.memory import states
from autopar.cost.regions import RECOMPUTE
from autopar.cost.schedules import SPLIT
from autopar.cost.timeline import moments
from autopar.solve.blocks import BEFORE
from autopar.solve.pipeline import Array, Blocks, Candidate, Setting
from autopar.solve.stages import flights, sharding_of, total

Spans = list[tuple[int, int]]


def standing(c: Candidate, setting: Setting, trained: Array, frozen: Array) -> Array:
    """Bytes of states that are there when most activations are: of gradients, where a backward was before."""
    made = states(sharding_of(c, setting), trained, frozen, 0.0 * trained, 0.0 * trained)
    started = c.microbatches > c.mesh.pp and (c.schedule != "gpipe" or c.mesh.pp == 1)
    return made.parameters + made.optimizer + (made.gradients if started else 0.0)


@dataclass(frozen=True)
class Kept:
    """What blocks save for a micro-batch: ``whole`` without recompute, ``least`` with the most of it; ``surely``: seconds of
    recomputing that are pinned; ``rate``: the most bytes that a second of it spares, over blocks and modes."""

    whole: Array
    least: Array
    surely: Array
    rate: float


def kept(b: Blocks, setting: Setting) -> Kept:
    if setting.recompute in RECOMPUTE:
        mode = RECOMPUTE.index(setting.recompute)
        return Kept(b.saved[mode], b.saved[mode], b.again[mode] + b.again_talk[mode], 0.0)
    return Kept(b.saved[0], b.saved.min(axis=0), 0.0 * b.forward, spared(b))


def spared(b: Blocks) -> float:
    bytes, seconds = b.saved[:1] - b.saved, b.again + b.again_talk
    helps = bytes > 0
    if not helps.any():
        return 0.0
    return float(np.max(np.where(helps, bytes, 0.0) / np.maximum(seconds, 1e-30)))


# ------------------------------------------------------------------ one stage a device: cuts are still open


def hopeless(b: Blocks, c: Candidate, setting: Setting, target: float) -> bool:
    """Whether no cut of the blocks reaches ``target`` seconds, or none fits.

    Stage s can have at most k[s] blocks, each as light and quick as the lightest and the quickest: so many as fit its memory
    with full recompute, and as keep (1) of `stages` below the target with the least recompute that makes them fit. If these
    do not add up to all blocks, no cut does.
    """
    n, p = len(b.forward), c.mesh.pp
    if n == 0:
        return False
    k, flight = np.arange(n + 1, dtype=float)[None, :], np.array(flights(c), float)[:, None]
    ends = np.full((p, 1), total(b.every))
    ends[0] += total(b.first)
    ends[-1] += total(b.last)
    through = float((b.forward + b.backward).sum()) + total(b.first) + total(b.last) + total(b.every) * p
    saves, (trained, frozen) = kept(b, setting), beside(b, p)
    held = standing(c, setting, trained + k * float(b.trained.min()), frozen + k * float(b.frozen.min()))
    lack = np.maximum(0.0, held + flight * (k * float(saves.whole.min()) + b.shared_bytes) - setting.limit)
    again = k * float(saves.surely.min()) + seconds_sparing(lack / flight, saves.rate)
    room = target - through - (c.microbatches - 1) * (ends + k * float((b.forward + b.backward).min()))
    room = np.where(np.isinf(again), -np.inf, room - c.microbatches * np.where(np.isinf(again), 0.0, again))
    room[held + flight * (k * float(saves.least.min()) + b.shared_bytes) > setting.limit] = -np.inf
    most = np.where(room >= 0, k, 0).max(axis=1)
    return bool(most.min() < 1 or most.sum() < n)


def seconds_sparing(bytes: Array, rate: float) -> Array:
    """Seconds of recomputing a micro-batch that spare so many of its bytes."""
    return bytes / rate if rate else np.where(bytes > 0, np.inf, 0.0)


def beside(b: Blocks, p: int) -> tuple[Array, Array]:
    """Elements, trained and frozen, of parameters that the first and the last stage have beside their blocks'."""
    trained, frozen, n = np.zeros((p, 1)), np.zeros((p, 1)), len(b.forward)
    for held, positions in b.loose:
        for stage, position in ((0, BEFORE), (p - 1, n)):
            if position in positions:
                trained[stage] += held.trained
                frozen[stage] += held.frozen
                if p == 1:
                    break
    return trained, frozen


# ------------------------------------------------------------------ several stages a device: cuts are given


def carried(b: Blocks, c: Candidate, setting: Setting, spans: Spans) -> float:
    """Seconds of a step that interleaved stages cut at ``spans`` take at least; infinite where a device cannot hold its own.

    A device waits for the stages before its first, then does its own for every micro-batch; and one micro-batch goes through
    all stages, in either direction behind the others on the slowest.
    """
    if c.schedule in SPLIT:  # the gradients of weights may wait: what follows counts them in what others wait for
        return 0.0
    p, m = c.mesh.pp, c.microbatches
    forward, backward = over(b.forward, spans), over(b.backward, spans)
    ahead = np.concatenate([[0.0], np.cumsum(forward + backward)])[:p]  # of blocks alone, as `settle` has it
    for e, stages in ((b.every, slice(None)), (b.first, slice(0, 1)), (b.last, slice(-1, None))):
        forward[stages] += e.forward + e.forward_talk
        backward[stages] += e.backward_input + e.backward_weight + e.backward_talk
    times = forward + backward
    saves = kept(b, setting)
    lack, least = lacking(b, c, setting, spans, saves)
    if np.any(least > 0):
        return float("inf")
    again = over(saves.surely, spans).reshape(-1, p).sum(axis=0) + seconds_sparing(lack, saves.rate)
    devices = ahead + m * (times.reshape(-1, p).sum(axis=0) + again)
    chain = float(times.sum()) + (m - 1) * max(float(forward.max()), float(backward.max()))
    return max(float(devices.max()), chain)


def over(row: Array, spans: Spans) -> Array:
    """Sums of a row over the blocks of every stage."""
    sums = np.concatenate([[0.0], np.cumsum(row)])
    at = np.array(spans)
    return sums[at[:, 1]] - sums[at[:, 0]]


def lacking(b: Blocks, c: Candidate, setting: Setting, spans: Spans, saves: Kept) -> tuple[Array, Array]:
    """Per device, bytes above the limit: per micro-batch in flight without recompute; in all with the most of it (negative
    where there is room)."""
    p = c.mesh.pp
    trained, frozen = (over(row, spans).reshape(-1, p).sum(axis=0) for row in (b.trained, b.frozen))
    extra = beside(b, p)
    held = standing(c, setting, trained + extra[0][:, 0], frozen + extra[1][:, 0])
    whole, least = (over(row, spans).reshape(-1, p) for row in (saves.whole, saves.least))
    lack, worst = np.zeros(p), np.zeros(p)
    for d in range(p):
        flying = counts(c.schedule, p, c.virtual, c.microbatches, d)
        lack[d] = max(0.0, held[d] + float((flying @ whole[:, d]).max()) - setting.limit) / flying.max()
        worst[d] = held[d] + float((flying @ least[:, d]).max()) - setting.limit
    return lack, worst


@lru_cache(maxsize=4096)
def counts(schedule: str, devices: int, virtual: int, microbatches: int, device: int) -> Array:
    """Micro-batches in flight of each of a device's stages (columns) at every distinct moment (rows)."""
    return np.array([m.flying for m in moments(schedule, devices, virtual, microbatches, device)], float)
