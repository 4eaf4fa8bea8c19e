"""The outer search: mesh, ZeRO stage, micro-batch, schedule, stages and recompute, by branch and bound."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from autopar.cluster import Cluster
from autopar.errors import InfeasibleError, PlanError
from autopar.ir.program import Program
from autopar.plan.plan import MeshShape, Plan, PlanDocument
from autopar.solve import report, shortage
from autopar.solve.mixing import whole_batches
from autopar.solve.outcome import Outcome, outcome
from autopar.solve.parts import Contexts
from autopar.solve.pipeline import Candidate, Setting
from autopar.solve.prepare import setting_of
from autopar.solve.saving import check_pin
from autopar.solve.space import APART, WHOLE, candidates, check_batch, meshes, no_schedule
from autopar.solve.stages import mode_of
from autopar.spec.job import Batch, Job, Pins

if TYPE_CHECKING:
    from autopar.solve.fleet import Fleet

CLOSE = 1e-4  # a candidate must promise to be this share faster than the best to be looked at
KEPT = 6  # plans kept as runners-up
COMPARING = 0.3  # seconds spent on what the nearest other meshes would have cost


@dataclass
class Search:
    """The state of one search. ``full``: how many replicas of a state are known to be too many, where all else is alike
    (states that more devices share take less memory)."""

    source: Contexts | Fleet
    setting: Setting
    best: Outcome | None = None
    others: list[Outcome] = field(default_factory=list)
    seen: int = 0
    bound: float = float("inf")
    stopped: bool = False
    full: dict[Candidate, int] = field(default_factory=dict)

    def run(self, found: list[tuple[float, Candidate]], until: float) -> None:
        """Candidates in the order of their lower bounds, each bound sharpened when it is the least; once the least is above
        the best plan, all further ones are."""
        heap = [(low, i, 0) for i, (low, _) in enumerate(found)]
        heapq.heapify(heap)
        while heap:
            low, i, sharpened = heapq.heappop(heap)
            if self.best is not None and low >= self.best.seconds * (1 - CLOSE):
                break
            if time.perf_counter() > until and self.best is not None:
                self.stopped = True
                self.bound = min(self.bound, low)
                break
            candidate = found[i][1]
            if sharpened < len(self.sharpenings):
                heapq.heappush(heap, (max(low, self.sharpenings[sharpened](candidate)), i, sharpened + 1))
            else:
                self.seen += 1
                self.look(candidate)
        if self.best is not None:
            self.bound = min(self.bound, self.best.seconds)

    @property
    def sharpenings(self) -> tuple[Callable[[Candidate], float], ...]:
        """Bounds of a candidate, each dearer and higher than the one before."""
        return self.evenly, self.source.carried

    def evenly(self, candidate: Candidate) -> float:
        return self.source.even(candidate)[0]

    def look(self, candidate: Candidate) -> None:
        """Cut, and if that promises to be better than the best so far, run the schedule."""
        alike = replace(candidate, mesh=candidate.mesh.model_copy(update={"dp_replicate": 1}))
        if candidate.mesh.dp_replicate >= self.full.get(alike, candidate.mesh.dp + 1):
            return
        limit = float("inf") if self.best is None else self.best.seconds
        if self.source.hopeless(candidate, limit):
            return
        cutter = self.source.cutter(candidate)
        value, spans = self.source.even(candidate) if candidate.evenly else cutter.cut()
        if spans and self.source.promise * value >= limit * (1 - CLOSE):
            return
        made = self.source.settle(cutter, spans, limit) if spans else "full"
        if made == "full" and (candidate.evenly or not spans):
            self.full[alike] = candidate.mesh.dp_replicate
        if isinstance(made, str):
            return
        if self.best is None or made.seconds < self.best.seconds * (1 - 1e-12):
            if self.best is not None:
                self.others.append(self.best)
            self.best = made
        else:
            self.others.append(made)

    def compare(self, found: list[tuple[float, Candidate]], until: float) -> None:
        """What the nearest other meshes would have cost: bounds ruled them out without a look, people want to see them."""
        assert self.best is not None
        looked = {(o.candidate.mesh, o.candidate.zero) for o in (self.best, *self.others)}
        for _, candidate in found:
            if len(self.others) >= KEPT or time.perf_counter() > until:
                return
            if any(mesh == candidate.mesh for mesh, _ in looked):
                continue
            cutter = self.source.cutter(candidate)
            spans = self.source.even(candidate)[1] if candidate.evenly else cutter.cut()[1]
            made = self.source.settle(cutter, spans) if spans else "full"
            if isinstance(made, Outcome):
                looked.add((candidate.mesh, candidate.zero))
                self.others.append(made)


def solve(program: Program | Callable[[int], Program], cluster: Cluster, job: Job) -> PlanDocument:
    """The fastest plan of one optimizer step that fits every device, with its bound and the runners-up.

    ``program`` is traced once; ``program.at(batch=, length=)`` (or the function itself) gives the static program of a
    micro-batch. Raises `PlanError` for pins that cannot be, `InfeasibleError` where nothing fits.
    """
    if cluster.uneven:
        from autopar.solve.groups import solve as solve_unlike

        return solve_unlike(program, cluster, job)
    began = time.perf_counter()
    if isinstance(program, Program):
        job = whole_batches(program, job)
    source, setting, batch = prepared(program, cluster, job)
    search = Search(source, setting)
    found = ordered(source, setting, batch, job.pins)
    search.run(found, began + job.search.seconds)
    if search.best is None:
        raise InfeasibleError(shortage.message(source, setting, batch, job, [c for _, c in found]))
    split = apart(source, setting, batch, job.pins, search.best.seconds * (1 - CLOSE))
    search.run(split, began + job.search.seconds)
    search.compare(found, time.perf_counter() + COMPARING)
    took = time.perf_counter() - began
    return report.document(source, setting, batch, search, len(found) + len(split), took)


def prepared(
    program: Program | Callable[[int], Program], cluster: Cluster, job: Job
) -> tuple[Contexts, Setting, Batch]:
    if job.batch is None:
        raise PlanError("the job has no batch; give its sequences and length")
    setting = setting_of(program, cluster, job)
    if isinstance(program, Program):
        check_pin(program, job.pins.recompute)
    return Contexts(program, cluster, setting, job), setting, job.batch


def ordered(source: Contexts, setting: Setting, batch: Batch, pins: Pins) -> list[tuple[float, Candidate]]:
    """All candidates whose parameters alone do not exceed the memory, with a lower bound on their step; least first."""
    cluster = setting.cluster
    grids = meshes(cluster.devices, cluster.devices_per_host, source.calls, batch.sequences, pins, source.degrees())
    check_batch(batch, grids, pins)
    found = [
        (source.least(c), c)
        for mesh in grids
        for kind, variant in variants(source, mesh)
        for c in every(source, batch, pins, mesh, kind, variant)
        if source.could_fit(c)
    ]
    if not found:
        firsts = [(m, kind, source.at(m.cp, kind).variants(m.tp)[0]) for m in grids for kind in source.kinds(m.cp)]
        legal = [c for m, kind, variant in firsts for c in every(source, batch, pins, m, kind, variant)]
        if not legal:
            raise PlanError(no_schedule(batch, grids, pins))
        raise InfeasibleError(shortage.message(source, setting, batch, source.job, legal))
    return sorted(found, key=lambda f: (f[0], order(f[1])))


def variants(source: Contexts, mesh: MeshShape) -> Iterator[tuple[str, str]]:
    """Kinds of context parallelism, and assignments along tp, that a mesh has to choose from."""
    yield from ((kind, v) for kind in source.kinds(mesh.cp) for v in source.at(mesh.cp, kind).variants(mesh.tp))


def every(
    source: Contexts, batch: Batch, pins: Pins, mesh: MeshShape, kind: str, variant: str, names: Sequence[str] = WHOLE
) -> Iterator[Candidate]:
    made = candidates(mesh, batch.sequences, source.calls, source.cluster.devices_per_host, pins, variant, names)
    return (replace(c, context=kind) for c in made) if kind else made


def apart(source: Contexts, setting: Setting, batch: Batch, pins: Pins, below: float) -> list[tuple[float, Candidate]]:
    """Candidates that run the gradients of weights apart, of those that could take less than ``below`` seconds if no device
    ever waited. So few are looked at, and the others cost one bound for all their schedules."""
    cluster, found = setting.cluster, []
    if pins.schedule is not None:
        return []
    grids = meshes(cluster.devices, cluster.devices_per_host, source.calls, batch.sequences, pins, source.degrees())
    for mesh in grids:
        for kind, variant in variants(source, mesh) if mesh.pp > 1 else ():
            known: dict[tuple, float] = {}
            for c in every(source, batch, pins, mesh, kind, variant, APART):
                key = (c.mesh, c.zero, c.microbatch)
                if key not in known:
                    known[key] = source.least(c) if source.could_fit(c) else float("inf")
                if known[key] < below:
                    found.append((known[key], c))
    return sorted(found, key=lambda f: (f[0], order(f[1])))


def order(c: Candidate) -> tuple:
    """Ties are broken the same way every time: simpler plans first."""
    mesh = c.mesh
    return (
        mesh.pp,
        mesh.tp,
        mesh.cp,
        c.zero,
        mesh.dp_replicate,
        c.virtual,
        c.schedule,
        -c.microbatch,
        c.variant,
        c.context,
    )


def evaluate(program: Program | Callable[[int], Program], cluster: Cluster, job: Job, plan: Plan) -> PlanDocument:
    """What a given plan costs: its mesh, stages, recompute and choices as they stand, fitting or not."""
    if cluster.uneven:
        from autopar.solve.groups import evaluate as evaluate_unlike

        return evaluate_unlike(program, cluster, job, plan)
    began = time.perf_counter()
    source, setting, batch = prepared(program, cluster, job)
    if plan.mesh.devices != cluster.devices:
        raise PlanError(f"the plan is for {plan.mesh.devices} devices, the cluster has {cluster.devices}")
    made = plan_outcome(source, plan)
    search = Search(source, setting, made, bound=made.seconds, seen=1)
    return report.document(source, setting, batch, search, 1, time.perf_counter() - began)


def plan_outcome(source: Contexts, plan: Plan) -> Outcome:
    variant = source.adopt(plan)
    return outcome_of(source, plan, candidate_of(plan, variant))


def candidate_of(plan: Plan, variant: str) -> Candidate:
    made = Candidate(
        plan.mesh, plan.zero, plan.microbatch, plan.microbatches, plan.schedule, plan.virtual_stages, variant
    )
    return made if plan.context is None else replace(made, context=plan.context.attention)


def outcome_of(source: Contexts | Fleet, plan: Plan, c: Candidate) -> Outcome:
    """What a candidate comes to with a plan's stages and recompute."""
    cutter = source.cutter(c)
    spans = [(s.blocks[0], s.blocks[1] + 1) for s in plan.stages]
    modes = [
        tuple(mode_of(r, len(cutter.at(0).blocks.saved)) for r in s.recompute) or (0,) * (j - i)
        for s, (i, j) in zip(plan.stages, spans, strict=True)
    ]  # noqa: E501
    return outcome(cutter, spans, modes)
