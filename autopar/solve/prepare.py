"""What the search asks again and again, computed once: static programs, assignments along tp, profiles, lower bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from autopar.cluster import Cluster
from autopar.cost.memory import states
from autopar.cost.precision import Precision
from autopar.cost.regions import Prices, Region
from autopar.cost.saving import Selection
from autopar.cost.timeline import SIMULATED, simulate
from autopar.errors import PlanError
from autopar.ir.program import Program
from autopar.plan.plan import MeshShape, Plan
from autopar.solve import bounds
from autopar.solve.assignment import Assignment, from_choices, replicated
from autopar.solve.blocks import BEFORE, Held, Profile, profile
from autopar.solve.formulation import assign
from autopar.solve.outcome import Outcome, Refusal, settle
from autopar.solve.pipeline import Blocks, Candidate, Setting, blocks
from autopar.solve.saving import adopted
from autopar.solve.space import divisors
from autopar.solve.stages import Cutter, sharding_of, walk
from autopar.spec.job import Job

Made = TypeVar("Made")

SPLIT, WHOLE, GIVEN = "split", "whole", "given"
"""Assignments along tp: parameters split wherever they can be (least memory), or whole where that is faster; or a plan's own."""


PROMISE = (
    0.99  # equation (1) of `stages` may be above the schedule's own time where stages are unlike, by less than this
)
LONG = 10_000  # stages × micro-batches from which on no bound is simulated: it would take some hundredths of a second


@dataclass(frozen=True)
class Totals:
    """Sums over a profile: seconds of one micro-batch, of the shortest block, elements, bytes saved with everything
    recomputed; and the bytes that the hungriest part needs by itself while it runs."""

    seconds: float
    block: float
    held: Held
    saved: float
    alone: float


class Source:
    """Caches of one job. ``calls``: how many block calls the program has; ``promise``: by how much equation (1) of `stages`
    may be above what a candidate takes."""

    promise = PROMISE

    def __init__(
        self, program: Program | Callable[[int], Program], cluster: Cluster, setting: Setting, job: Job
    ) -> None:
        assert job.batch is not None
        self.program, self.cluster, self.setting, self.job = program, cluster, setting, job
        self.length, self.pins = job.batch.length, job.pins
        self.statics: dict[int, Program] = {}
        self.assignments: dict[tuple[int, str], Assignment] = {}
        self.profiles: dict[tuple[int, str, int], Profile] = {}
        self.sums: dict[tuple[int, str, int], Totals] = {}
        self.most: dict[tuple[int, str], int] = {}
        self.ideals: dict[tuple, float] = {}
        self.cuts: dict[tuple, tuple[float, list[tuple[int, int]]]] = {}
        self.rows: dict[tuple[int, str, int], tuple[list[float], float, float]] = {}
        self.ready: dict[tuple, Blocks] = {}
        self.selections: dict[str, tuple[Selection, ...]] | None = None  # a given plan's own
        self.least_batch = job.pins.microbatch or 1
        self.calls = len(self.static(self.least_batch).calls())

    def static(self, batch: int) -> Program:
        """The static program of a micro-batch."""
        if batch not in self.statics:
            self.statics[batch] = self.remembered("static", (batch,), lambda: self.made_static(batch))
        return self.statics[batch]

    def made_static(self, batch: int) -> Program:
        if isinstance(self.program, Program):
            return self.program.at(batch=batch, length=self.length)
        return self.program(batch)

    def remembered(self, kind: str, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What ``make`` gives, once for a program: another plan of the same one needs most of it again.

        ``key`` holds everything it depends on but the program and the length, as values."""
        if not isinstance(self.program, Program):
            return make()
        memo, key = self.program.memo, (kind, self.length, *key)
        if key not in memo:
            memo[key] = make()
        return memo[key]

    # ---------------------------------------------------------------- assignments along tp

    def prices(self, tp: int) -> Prices:
        link = self.cluster.axis_link(MeshShape(tp=tp), "tp")
        return Prices(self.cluster.device, link, self.setting.precision)

    def variants(self, tp: int) -> list[str]:
        """Which assignments there are to choose from; one where both come out alike."""
        if tp == 1:
            return [SPLIT]
        a, b = self.assignment(tp, SPLIT), self.assignment(tp, WHOLE)
        return [SPLIT] if a.strategies == b.strategies else [SPLIT, WHOLE]

    def assignment(self, tp: int, variant: str) -> Assignment:
        """The ILP's answer, for the smallest micro-batch; its strategies serve the others."""
        if tp == 1:
            return replicated()
        if (tp, variant) not in self.assignments:
            key = (tp, variant, *self.decisive(tp))
            self.assignments[tp, variant] = self.remembered("assignment", key, lambda: self.assigned(tp, variant))
        return self.assignments[tp, variant]

    def decisive(self, tp: int) -> tuple[Any, ...]:
        """All that an assignment follows from, but the program, the degree and the variant."""
        placements = tuple((self.pins.placements or {}).items())
        return self.least_batch, self.pins.sequence_parallel, placements, priced(self.prices(tp))

    def assigned(self, tp: int, variant: str) -> Assignment:
        return assign(
            self.static(self.least_batch),
            tp,
            self.prices(tp),
            self.pins.sequence_parallel,
            self.job.search.seconds,
            spare=variant == SPLIT,
            pinned=self.pins.placements,
        )

    def adopt(self, plan: Plan) -> str:
        """The variant of a given plan's own choices."""
        if plan.recompute_groups:
            self.selections = adopted(plan.recompute_groups)
        if plan.mesh.tp == 1 or not plan.choices:
            return SPLIT
        self.assignments[plan.mesh.tp, GIVEN] = from_choices(plan.mesh.tp, plan.choices)
        return GIVEN

    def profile(self, c: Candidate) -> Profile:
        return self.profile_of(c.mesh.tp, c.variant, c.microbatch)

    def profile_of(self, tp: int, variant: str, batch: int) -> Profile:
        key = (tp, variant, batch)
        if key not in self.profiles:
            prices = self.prices(tp)
            make = partial(self.measured, tp, variant, batch, prices)
            whole, own = (*key, *self.decisive(tp)), variant == GIVEN or self.adopted
            self.profiles[key] = make() if own else self.remembered("profile", whole, make)
        return self.profiles[key]

    def measured(self, tp: int, variant: str, batch: int, prices: Prices) -> Profile:
        given = self.given(tp, variant, batch)
        return profile(self.static(batch), self.assignment(tp, variant), prices, given)

    @property
    def adopted(self) -> bool:
        """Whether selections are a given plan's own."""
        return self.selections is not None

    def given(self, tp: int, variant: str, batch: int) -> dict[str, tuple[Selection, ...]] | None:
        """Selections that are not to be looked for."""
        return self.selections

    # ---------------------------------------------------------------- lower bounds

    def totals(self, tp: int, variant: str, batch: int) -> Totals:
        key = (tp, variant, batch)
        if key not in self.sums:
            self.sums[key] = totals(self.profile_of(tp, variant, batch))
        return self.sums[key]

    def could_fit(self, c: Candidate) -> bool:
        """Whether the average device could hold a plan with everything recomputed: cheap, and never wrong to say no."""
        made = self.totals(c.mesh.tp, c.variant, self.least_batch)
        pp = c.mesh.pp
        held = states(sharding_of(c, self.setting), made.held.trained / pp, made.held.frozen / pp, 0.0, 0.0)
        scale = c.microbatch / self.least_batch
        saved = made.saved * scale / pp
        if made.alone * scale > self.setting.limit:
            return False
        return held.parameters + held.gradients + held.optimizer + saved <= self.setting.limit

    def least(self, c: Candidate) -> float:
        """Seconds that a step of this candidate takes at least.

        From x ≥ Σ (times before stage s) + m · (time of stage s) for every s follows x ≥ total / (1 - (1 - 1/m)^p). The
        time of a sequence falls with the micro-batch, so the largest one's serves all.
        """
        most = max(self.largest(c.mesh.tp, c.variant), c.microbatch)
        base = c.microbatch if (c.mesh.tp, c.variant, c.microbatch) in self.sums else most
        made, scale = self.totals(c.mesh.tp, c.variant, base), c.microbatch / base
        total, block, m, p = made.seconds * scale, made.block * scale, c.microbatches, c.mesh.pp
        even = total / (1 - (1 - 1 / m) ** p) if not c.evenly else m * total / p
        if self.setting.recompute is None and self.calls:
            return max(even, m * block * (-(-self.calls // p)))
        return even

    def largest(self, tp: int, variant: str) -> int:
        """The largest micro-batch that any mesh could hold with everything recomputed."""
        assert self.job.batch is not None
        if self.pins.microbatch:
            return self.pins.microbatch
        if (tp, variant) not in self.most:
            saved = self.totals(tp, variant, self.least_batch).saved
            pp = max(1, min(self.cluster.devices // tp, self.calls))
            need = max(saved / pp, self.totals(tp, variant, self.least_batch).alone)
            fits = [b for b in divisors(self.job.batch.sequences) if need * b <= self.setting.limit]
            self.most[tp, variant] = max(fits, default=1)
        return self.most[tp, variant]

    def times(self, c: Candidate) -> tuple[list[float], float, float]:
        """Seconds of every block, of what is before the first and after the last, forward and backward."""
        key = (c.mesh.tp, c.variant, c.microbatch)
        if key not in self.rows:
            made = self.profile(c)
            each = {k: taken(r) for k, r in made.regions.items()}
            blocks = [each[k] + (taken(made.outer[i]) if i in made.outer else 0.0) for i, k in enumerate(made.kinds)]
            first, last = (taken(made.outer.get(k, Region())) for k in (BEFORE, self.calls))
            self.rows[key] = blocks, first, last
        return self.rows[key]

    def blocks(self, c: Candidate) -> Blocks:
        """The candidate's blocks; schedules and their cuts share them."""
        key = (c.mesh, c.variant, c.microbatch, c.zero)
        if key not in self.ready:
            self.ready[key] = blocks(self.profile(c), c, self.setting)
        return self.ready[key]

    def cutter(self, c: Candidate) -> Cutter:
        return Cutter(self.blocks(c), c, self.setting)

    def settle(self, cutter: Cutter, spans: list[tuple[int, int]], limit: float = float("inf")) -> Outcome | Refusal:
        return settle(cutter, spans, limit / PROMISE)

    def carried(self, c: Candidate) -> float:
        """See `bounds.carried`; schedules of many micro-batches are extrapolated and come out up to 0.3 % too short, so a
        little less is promised."""
        if c.splits or not c.evenly:
            return 0.0
        return PROMISE * bounds.carried(self.blocks(c), c, self.setting, self.even(c)[1])

    def hopeless(self, c: Candidate, limit: float) -> bool:
        """Whether no cut of the candidate fits and takes less than ``limit``. See `bounds.hopeless`."""
        return not c.evenly and bounds.hopeless(self.blocks(c), c, self.setting, limit / PROMISE)

    def peak(self, c: Candidate, dtype: str) -> float:
        """Dense FLOP/s of all devices of a plan together."""
        return self.cluster.devices * self.cluster.device.peak(dtype)

    def place(self, c: Candidate, rank: int) -> tuple[str, str]:
        """Device and group of a pipeline rank."""
        return self.cluster.device.name, self.cluster.groups[0].name

    def even(self, c: Candidate) -> tuple[float, list[tuple[int, int]]]:
        """The cuts that make the longest stage as short as can be, and with them the time of a step, whatever ZeRO and
        recompute add: equation (1) of `stages`, or with several stages to a device, what each device has to do and to
        wait for before its first."""
        key = (c.mesh.tp, c.variant, c.microbatch, c.stages)
        if key not in self.cuts:
            self.cuts[key] = balanced(*self.times(c), c.stages)
        longest, spans = self.cuts[key]
        if c.splits and c.stages * min(c.microbatches, SIMULATED * c.mesh.pp) <= LONG:
            return PROMISE * self.ideal(c, spans), spans
        if c.splits:
            return self.least(c), spans
        if c.evenly:
            return self.devicewise(c, spans), spans
        blocks, first, last = self.times(c)
        return PROMISE * (sum(blocks) + first + last + (c.microbatches - 1) * longest), spans

    def devicewise(self, c: Candidate, spans: list[tuple[int, int]]) -> float:
        blocks, first, last = self.times(c)
        times = [sum(blocks[i:j]) for i, j in spans]
        times[0] += first
        times[-1] += last
        return max(sum(times[:d]) + c.microbatches * sum(times[d :: c.mesh.pp]) for d in range(c.mesh.pp))

    def ideal(self, c: Candidate, spans: list[tuple[int, int]]) -> float:
        """The schedule's own time where gradients of weights run apart, with nothing but the blocks' work: sending, ZeRO,
        recompute and the host only add to it. Stages that recompute, and so run whole, could be above it by a little."""
        key = (c.mesh.tp, c.variant, c.microbatch, c.mesh.pp, c.virtual, c.schedule, c.microbatches)
        if key not in self.ideals:
            made, last = self.profile(c), len(spans) - 1
            parts = [[made.regions[k] for k in made.kinds[i:j]] for i, j in spans]
            parts[0] = [made.outer.get(BEFORE, Region()), *parts[0]]
            parts[last] = [*parts[last], made.outer.get(self.calls, Region())]
            forward = [sum(r.forward + r.forward_talk for r in stage) for stage in parts]
            inputs = [sum(r.backward_input + r.backward_talk for r in stage) for stage in parts]
            weight = [sum(r.backward_weight for r in stage) for stage in parts]
            whole = [i + w for i, w in zip(inputs, weight, strict=True)]
            apart = [(0.0, whole[0]), *list(zip(inputs, weight, strict=True))[1:]]
            sends, pp = [0.0] * last, c.mesh.pp
            done = simulate(c.schedule, forward, whole, sends, pp, c.microbatches, parts=apart)
            self.ideals[key] = done.seconds
        return self.ideals[key]


def priced(prices: Prices) -> Prices:
    """What seconds depend on: how much memory a device has is no part of it."""
    return replace(prices, device=replace(prices.device, memory=0))


def balanced(times: list[float], first: float, last: float, stages: int) -> tuple[float, list[tuple[int, int]]]:
    """Contiguous runs of blocks, one at least each, with the least maximum; ``first`` and ``last`` are of the end stages."""
    n = len(times)
    if n == 0:
        return first + last, [(0, 0)]
    sums = np.concatenate([[0.0], np.cumsum(times)])
    inner = np.where(np.triu(np.ones((n + 1, n + 1), bool), 1), sums[None, :] - sums[:, None], np.inf)
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    links = []
    for s in range(stages):
        extra = (first if s == 0 else 0.0) + (last if s == stages - 1 else 0.0)
        value = np.maximum(best[:, None], inner + extra)
        links.append(np.argmin(value, axis=0))
        best = np.min(value, axis=0)
    return float(best[n]), walk(links, n)


def totals(made: Profile) -> Totals:
    """Seconds, elements and bytes of all parts of a profile."""
    regions = [made.regions[k] for k in made.kinds] + list(made.outer.values())
    held = Held()
    for k in made.kinds:
        held = held + made.holds[k]
    for h, _ in made.loose:
        held = held + h
    blocks = [taken(made.regions[k]) for k in made.kinds]
    saved = sum(min(r.saved) for r in regions)
    alone = [r.saved[0] + r.working[0] for r in made.outer.values()]
    alone += [min(s + w for s, w in zip(r.saved, r.working, strict=True)) for r in made.regions.values()]
    return Totals(sum(map(taken, regions)), min(blocks, default=0.0), held, saved, max(alone, default=0.0))


def taken(r: Region) -> float:
    return r.forward + r.forward_talk + r.backward_input + r.backward_weight + r.backward_talk


# ------------------------------------------------------------------ the job


def setting_of(program: Program | Callable[[int], Program], cluster: Cluster, job: Job) -> Setting:
    """Memory limit, dtypes, optimizer and pins of a job."""
    example = program if isinstance(program, Program) else program(1)
    precision = Precision.of(example, mixed(job)).with_state(job.optimizer.state)
    if job.optimizer.rounding == "stochastic" and precision.master != torch.bfloat16:
        raise PlanError(
            f"optimizer.rounding: stochastic rounding is for parameters kept in bfloat16; these are "
            f"{str(precision.master).removeprefix('torch.')} (passes: mixed_precision: {{master: bfloat16}} would keep them so)"
        )
    moments = 2 if job.optimizer.name == "adamw" else int(job.optimizer.momentum > 0)
    return Setting(
        cluster=cluster,
        precision=precision,
        limit=cluster.device.memory * (1 - job.search.memory_margin),
        moments=moments,
        clip=job.train.clip is not None,
        recompute=job.pins.recompute,
    )


def mixed(job: Job) -> Mapping[str, Any] | None:
    """Options of the job's mixed_precision, if there is one."""
    return next((entry["mixed_precision"] for entry in job.passes if "mixed_precision" in entry), None)
