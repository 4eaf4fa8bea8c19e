"""Where a pipeline is cut, and which blocks of a stage are recomputed, by dynamic programming.

With blocks i … j-1 on stage s, a step of GPipe or 1F1B takes about (and, stages being alike, just) the time of one
micro-batch through all stages, and of the others through the longest stage:

    Σ over s of (f + b)[s]  +  max over s of ( (m - 1) · (f + b + again)[s] + again[s] + end[s] )  +  2 · Σ sends            (1)

    best[s, j] = min over i < j of  max( best[s-1, i], the s-term of the maximum in (1) for [i, j] )                        (2)

``again`` is the least time of recomputing that makes [i, j] fit the memory of stage s: blocks are recomputed selectively,
fully, or all selectively and some fully, or all at one of the blocks' selections (`saving`) and some at the next, whichever
is least (3). What does not fit is infinite. ``end``: once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.cost import collective
from autopar.cost.memory import Sharding, States, states
from autopar.cost.regions import CUSTOM, RECOMPUTE, Region
from autopar.cost.schedules import device_of, stages_of
from autopar.cost.timeline import in_flight, moments
from autopar.solve.blocks import BEFORE
from autopar.solve.pipeline import Array, Blocks, Candidate, Setting, once_a_step, travel

SINGLE = 0.5  # weight of the longest stage where a single micro-batch would leave the cuts open
At = tuple[int, int] | None


@dataclass
class Span:
    """Stage s as [i, j] matrices (or, for one span, numbers): seconds of one micro-batch, elements, and bytes.

    ``talk`` and ``weight`` are parts of forward and backward. ``waiting``, ``groups`` and ``steps`` are
    those of a `Region`. ``saved`` per micro-batch in flight and ``working`` have an
    entry for each of none, selective, full; so has ``again`` (seconds). ``outside``: the working bytes without blocks'.
    """

    forward: Array
    backward: Array
    talk: Array
    again: list[Array]
    saved: list[Array]
    fixed: Array
    working: list[Array]
    outside: Array
    trained: Array
    frozen: Array
    partial: Array
    unit: Array
    largest: Array
    weight: Array
    waiting: Array
    freed: Array
    groups: Array
    steps: Array

    @property
    def all(self) -> Array:
        return self.trained + self.frozen


class Cutter:
    """The matrices of a candidate, stage by stage."""

    def __init__(self, blocks: Blocks, candidate: Candidate, setting: Setting) -> None:
        self.blocks, self.candidate, self.setting = blocks, candidate, setting
        self.n = len(blocks.forward)
        self.sharding = sharding_of(candidate, setting)
        mesh = candidate.mesh
        self.within = setting.cluster.axis_link(mesh.within, "dp")
        pp = setting.cluster.axis_link(mesh, "pp")
        self.sends = [collective.send(float(b), pp) for b in blocks.cuts]
        self.flight = flights(candidate)
        self.sums = {k: np.concatenate([[0.0], np.cumsum(v)]) for k, v in self.rows().items()}
        self.received = np.concatenate([[0.0], blocks.cuts, [0.0]])
        self.cells: dict[str, Array] = {}
        self.spans: dict[tuple[bool, bool], Span] = {}
        self.fixed_terms: dict[tuple[bool, bool], Array] = {}
        self.rises: tuple[Array, Array, Array] | None = None

    def at(self, s: int) -> Cutter:
        """What knows stage s; where devices are unlike, each has its own."""
        return self

    def sending(self, s: int, j: int) -> float:
        """Seconds to send a micro-batch from stage s, which ends before block j, to the next."""
        return self.sends[j - 1]

    def rows(self) -> dict[str, Array]:
        b = self.blocks
        found = {"forward": b.forward, "backward": b.backward, "talk": b.talk, "trained": b.trained, "frozen": b.frozen,
                 "partial": b.partial, "weight": b.weight, "waiting": b.waiting, "groups": b.groups,
                 "steps": b.steps}  # fmt: skip
        for mode in range(len(b.saved)):
            found |= {
                f"saved{mode}": b.saved[mode],
                f"again{mode}": b.again[mode],
                f"again_talk{mode}": b.again_talk[mode],
            }
        return found

    def over(self, key: str, at: At = None) -> Array:
        """Sums over blocks i … j-1: for one [i, j], or as an (n+1)×(n+1) matrix, where what is not i < j means nothing."""
        if at is not None:
            return self.sums[key][at[1]] - self.sums[key][at[0]]
        if key not in self.cells:
            self.cells[key] = self.sums[key][None, :] - self.sums[key][:, None]
        return self.cells[key]

    def most(self, name: str, row: Array, at: At = None) -> Array:
        """Maxima over blocks i … j-1."""
        if at is not None:
            return row[at[0] : at[1]].max(initial=0.0)
        if name not in self.cells and self.n and row.min() == row.max():
            self.cells[name] = np.triu(np.full((self.n + 1, self.n + 1), row[0]), 1)
        if name not in self.cells:
            made = np.zeros((self.n + 1, self.n + 1))
            for i in range(self.n):
                made[i, i + 1 :] = np.maximum.accumulate(row[i:])
            self.cells[name] = made
        return self.cells[name]

    def ends(self, s: int) -> list[Region]:
        """What a stage runs beside its blocks."""
        found = [self.blocks.every]
        if s == 0:
            found.append(self.blocks.first)
        if s == self.candidate.stages - 1:
            found.append(self.blocks.last)
        return found

    def loose(self, s: int, at: At = None) -> tuple[Array, Array, Array, Array]:
        """Elements trained, frozen, partial of parameters outside of blocks, and the largest of them trained."""
        if at is not None:
            return self.loose_of(s, *at)
        trained, frozen, partial, largest = (np.zeros_like(self.over("trained")) for _ in range(4))
        index = np.arange(self.n + 1)
        for held, positions in self.blocks.loose:
            here = s == 0 and BEFORE in positions or s == self.candidate.stages - 1 and self.n in positions
            inside = [k for k in positions if 0 <= k < self.n]
            mask = np.full_like(trained, float(here))
            for k in inside if not here else ():
                mask = np.maximum(mask, (index[:, None] <= k) & (k < index[None, :]))
            trained, frozen = trained + mask * held.trained, frozen + mask * held.frozen
            partial, largest = partial + mask * held.partial, np.maximum(largest, mask * held.trained)
        return trained, frozen, partial, largest

    def loose_of(self, s: int, i: int, j: int) -> tuple[Array, Array, Array, Array]:
        """The same for one [i, j]."""
        ends = {BEFORE} if s == 0 else set()
        ends |= {self.n} if s == self.candidate.stages - 1 else set()
        here = [h for h, at in self.blocks.loose if at & ends or any(i <= k < j for k in at)]
        sums = (sum(h.trained for h in here), sum(h.frozen for h in here), sum(h.partial for h in here))
        return tuple(np.float64(x) for x in (*sums, max((h.trained for h in here), default=0)))  # type: ignore[return-value]

    def span(self, s: int) -> Span:
        """All matrices of stage s; stages that are neither first nor last share them."""
        role = (s == 0, s == self.candidate.stages - 1)
        if role not in self.spans:
            self.spans[role] = self.measured(s)
        return self.spans[role]

    def measured(self, s: int, at: At = None) -> Span:
        """Stage s with blocks i … j-1: for one [i, j] or for all."""
        b, ends = self.blocks, self.ends(s)
        trained, frozen, partial, biggest = self.loose(s, at)
        root = trained + frozen
        per = self.most("unit", b.trained + b.frozen, at)
        largest = np.maximum(self.most("unit_trained", b.trained, at), biggest)
        forward = self.over("forward", at) + sum(e.forward + e.forward_talk for e in ends)
        backward = self.over("backward", at) + sum(e.backward_input + e.backward_weight + e.backward_talk for e in ends)
        talk = self.over("talk", at) + sum(e.forward_talk + e.backward_talk for e in ends)
        outside = max(e.working[0] for e in ends)
        shown_f, shown_b = self.shown(root, trained, per, largest)
        return Span(
            forward=forward + shown_f,
            backward=backward + shown_b,
            talk=talk + shown_f + shown_b,
            again=[self.over(f"again{k}", at) + self.over(f"again_talk{k}", at) for k in range(3)],
            saved=[self.over(f"saved{k}", at) for k in range(3)],
            fixed=np.full_like(forward, sum(e.saved[0] for e in ends) + b.shared_bytes),
            working=[np.maximum(self.most(f"working{k}", b.working[k], at), outside) for k in range(3)],
            outside=np.full_like(forward, outside),
            trained=self.over("trained", at) + trained,
            frozen=self.over("frozen", at) + frozen,
            partial=self.over("partial", at) + partial,
            unit=root + 2 * per,
            largest=largest,
            weight=self.over("weight", at) + sum(e.backward_weight for e in ends),
            waiting=self.over("waiting", at) + sum(e.waiting for e in ends),
            freed=np.full_like(forward, sum(e.freed for e in ends)),
            groups=self.over("groups", at) + sum(e.groups for e in ends),
            steps=self.over("steps", at) + sum(e.steps for e in ends),
        )

    def shown(self, root: Array, root_trained: Array, unit: Array, largest: Array) -> tuple[Array, Array]:
        """What shows of ZeRO's traffic in every micro-batch: the first gathers, the last reductions, the root's."""
        p, zero = self.setting.precision, self.candidate.zero
        if self.candidate.mesh.copies == 1 or zero < 2:
            return np.zeros_like(root), np.zeros_like(root)
        reduce = travel(collective.gather, self.within, p.reduce.itemsize * (root_trained + largest * (unit > 0)))
        if zero == 2:
            return np.zeros_like(root), reduce
        gather = travel(collective.gather, self.within, p.compute.itemsize * (root + unit))
        return gather, gather + reduce

    # ---------------------------------------------------------------- memory

    def buffers(self, s: int) -> Array:
        """Bytes that torch's `PipelineStage` keeps to receive in: one for every micro-batch (those in flight are what
        the first block saves and counted there)."""
        m, stages = self.candidate.microbatches, self.candidate.stages
        if stages == 1:
            return np.zeros((1, 1))
        return (m - self.flight[s]) * self.received[:, None] * (s > 0) + m * self.received[None, :] * (s < stages - 1)

    def buffer(self, s: int, i: int, j: int) -> float:
        """The same of one stage."""
        m, stages = self.candidate.microbatches, self.candidate.stages
        got = (m - self.flight[s]) * self.received[i] * (s > 0) + m * self.received[j] * (s < stages - 1)
        return float(got) if stages > 1 else 0.0

    def sent(self, s: int, j: int) -> float:
        """Bytes of what stage s sends behind block j - 1, kept until the answer comes; to itself a device sends nothing."""
        c = self.candidate
        last = s == c.stages - 1
        if last or device_of(c.schedule, c.mesh.pp, s) == device_of(c.schedule, c.mesh.pp, s + 1):
            return 0.0
        return float(self.flight[s] * self.received[j])

    def states(self, span: Span) -> States:
        return states(self.sharding, span.trained, span.frozen, span.unit, span.largest)

    def held(self, s: int, span: Span) -> Array:
        """Bytes of stage s without recompute, at the peak."""
        made = self.states(span)
        saved = self.flight[s] * (span.saved[0] + span.fixed)
        fixed = made.parameters + made.gradients + made.optimizer + made.transient
        return fixed + saved + span.working[0] + self.buffers(s)

    def again(self, s: int, span: Span, limit: float | Array) -> Array:
        """(3): the least seconds of recomputing a micro-batch with which the stage fits ``limit``."""
        flight, need = self.flight[s], self.held(s, span) - limit
        if self.setting.recompute is not None:
            k = mode_of(self.setting.recompute, len(self.blocks.saved))
            need = need - flight * (span.saved[0] - self.over(f"saved{k}")) + self.peak(k, span) - span.working[0]
            return np.where(need <= 0, self.seconds(k), np.inf)
        least = np.where(need <= 0, 0.0, np.inf)
        at = np.nonzero(np.triu(need > 0, 1))
        if len(at[0]):
            least[at] = self.recomputed(at, need[at], flight, span)
        return least

    def recomputed(self, at: Sequence[Array], need: Array, flight: int, span: Span) -> Array:
        """The same for some [i, j], which lack ``need`` bytes: few blocks selectively, or fully; all selectively and few
        fully; all at one selection, the last with which they do not fit, and few at the next."""
        count, every = (at[1] - at[0]).astype(float), np.arange(len(need))
        spared, seconds, working = (rows[:, *at] for rows in self.levels())
        spared, extra = flight * spared, np.maximum(working, span.outside[at]) - span.working[0][at]

        def mixed(a: Array | int, b: Array | int) -> Array:
            x, y = (a, every), (b, every)
            short = need + extra[y] - spared[x]
            return seconds[x] + self.part(short, spared[y] - spared[x], seconds[y] - seconds[x], count)

        found = [mixed(0, 1), mixed(0, 2), mixed(1, 2)]
        if len(spared) > 3:
            chain = np.array(chained(len(spared)))
            fits = need + extra[chain] - spared[chain] <= 0
            to = np.maximum(np.argmax(fits, axis=0), 1)
            found.append(np.where(fits.any(axis=0), mixed(chain[to - 1], chain[to]), np.inf))
        return np.minimum.reduce(found)

    def levels(self) -> tuple[Array, Array, Array]:
        """For every mode and [i, j]: bytes spared of a micro-batch, seconds added, bytes at the peak of blocks."""
        if self.rises is None:
            modes = range(len(self.blocks.saved))
            spared = np.stack([self.over("saved0") - self.over(f"saved{k}") for k in modes])
            working = np.stack([self.most(f"working{k}", self.blocks.working[k]) for k in modes])
            self.rises = spared, np.stack([self.seconds(k) for k in modes]), working
        return self.rises

    def seconds(self, mode: int) -> Array:
        """Seconds that a mode adds to every [i, j]."""
        return self.over(f"again{mode}") + self.over(f"again_talk{mode}")

    def peak(self, mode: int, span: Span) -> Array:
        """Bytes of a mode beside what is saved."""
        return np.maximum(self.most(f"working{mode}", self.blocks.working[mode]), span.outside)

    @staticmethod
    def part(need: Array, spared: Array, seconds: Array, count: Array) -> Array:
        """Seconds of recomputing as few blocks as spare ``need`` bytes; infinite if all do not suffice."""
        safe = np.where(spared > 0, spared, 1.0)
        blocks = np.where(spared > 0, np.ceil(np.maximum(need, 0) * count / safe - 1e-9), count + 1)
        return np.where(need <= 0, 0.0, np.where(blocks <= count, blocks * seconds / count, np.inf))

    # ---------------------------------------------------------------- the cuts

    def terms(self, s: int) -> Array:
        """The s-term of (1) for every [i, j]."""
        span, c = self.span(s), self.candidate
        role = (s == 0, s == c.stages - 1)
        more = max(c.microbatches - 1, SINGLE)
        if role not in self.fixed_terms:
            exposed, optimizer = once_a_step(c, self.setting, self.sharding, span)
            self.fixed_terms[role] = more * (span.forward + span.backward) + exposed + optimizer
        return self.fixed_terms[role] + (more + 1) * self.again(s, span, self.setting.limit)

    def through(self) -> float:
        """Seconds of one micro-batch through all stages, without what ZeRO and recompute add to the stages' ends."""
        ends = [total(e) for s in (0, self.candidate.stages - 1) for e in self.ends(s)]
        once = (
            sum(ends)
            if self.candidate.stages > 1
            else total(self.blocks.every) + total(self.blocks.first) + total(self.blocks.last)
        )
        return (
            float(self.sums["forward"][-1] + self.sums["backward"][-1])
            + once
            + 2 * sum(sorted(self.sends)[: self.candidate.stages - 1])
        )

    def cut(self) -> tuple[float, list[tuple[int, int]]]:
        """(2): the least value of (1) and the blocks of every stage; infinite and empty where nothing fits."""
        n, stages = self.n, self.candidate.stages
        if stages > max(n, 1):
            return float("inf"), []
        spare = max(self.candidate.microbatches - 1, SINGLE) - (self.candidate.microbatches - 1)
        if stages == 1:
            span = self.span(0)
            twice = spare * float((span.forward + span.backward + self.again(0, span, self.setting.limit))[0, n])
            alone = self.through() + float(self.terms(0)[0, n])
            return (alone - twice, [(0, n)]) if np.isfinite(alone) else (float("inf"), [])
        legal = np.triu(np.ones((n + 1, n + 1), bool), 1)
        best = np.full(n + 1, np.inf)
        best[0] = -np.inf
        links: list[Array] = []
        for s in range(stages):
            value = np.maximum(best[:, None], np.where(legal, self.terms(s), np.inf))
            links.append(np.argmin(value, axis=0))
            best = np.min(value, axis=0)
        if not np.isfinite(best[n]):
            return float("inf"), []
        return self.through() + (0.0 if spare else float(best[n])), walk(links, n)


def chained(modes: int) -> tuple[int, ...]:
    """Modes in the order of what they keep, each kept part of the next but for the attention core: none, selections, full."""
    return (0, *range(3, modes), 2)


def mode_of(name: str, modes: int) -> int:
    """The row of a mode; of a selection that the blocks do not have, the last they have."""
    if name in RECOMPUTE:
        return RECOMPUTE.index(name)
    number = int(name.removeprefix(CUSTOM))
    return min(2 + number, modes - 1) if modes > 3 else 0


def mode_name(mode: int) -> str:
    return RECOMPUTE[mode] if mode < len(RECOMPUTE) else f"{CUSTOM}{mode - 2}"


def total(region: Region) -> float:
    """Seconds of a region's forward and backward."""
    return region.forward + region.forward_talk + region.backward_input + region.backward_weight + region.backward_talk


def walk(links: list[Array], n: int) -> list[tuple[int, int]]:
    found, j = [], n
    for link in reversed(links):
        i = int(link[j])
        found.append((i, j))
        j = i
    return found[::-1]


def sharding_of(candidate: Candidate, setting: Setting) -> Sharding:
    accumulates = candidate.microbatches > 1 or candidate.mesh.pp > 1
    return Sharding(candidate.zero, candidate.mesh.sharing, setting.precision, setting.moments, accumulates)


def flights(candidate: Candidate) -> tuple[int, ...]:
    """Micro-batches in flight per stage; of several stages on a device, at the time when the device holds most."""
    c, pp = candidate, candidate.mesh.pp
    if pp == 1:
        return (1,)
    if c.virtual == 1 and not c.splits:
        return in_flight(c.schedule, pp, 1, c.microbatches)
    found = [0] * c.stages
    for d in range(pp):
        states = moments(c.schedule, pp, c.virtual, c.microbatches, d)
        fullest = max((s.flying for s in states), key=sum)
        for stage, count in zip(stages_of(c.schedule, pp, c.stages, d), fullest, strict=True):
            found[stage] = count
    return tuple(found)
