"""Planning for clusters of unlike hosts: the best mesh on the best layout, and why some devices are left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from autopar.cluster import Cluster
from autopar.cluster.layout import Layout
from autopar.errors import InfeasibleError, PlanError
from autopar.ir.program import Program
from autopar.plan.plan import Host, Plan, PlanDocument
from autopar.solve import report, shortage
from autopar.solve.fleet import Fleet, Grid
from autopar.solve.mixing import whole_batches
from autopar.solve.outcome import Outcome
from autopar.solve.prepare import setting_of
from autopar.solve.saving import check_pin
from autopar.solve.search import CLOSE, COMPARING, Search, candidate_of, outcome_of
from autopar.solve.space import check_batch, no_schedule
from autopar.spec.job import Job
from autopar.spec.quantity import show_bytes, show_seconds

TOGETHER = 8  # grids whose candidates are searched at once
ASKING = 2.0  # seconds spent on what the best plan that uses left-out devices would take
EXPLAINED = 64  # grids whose candidates are looked at where nothing fits


def solve(program: Program | Callable[[int], Program], cluster: Cluster, job: Job) -> PlanDocument:
    """As `search.solve`, where hosts are unlike. Devices may stay unused; the document says why."""
    began = time.perf_counter()
    if isinstance(program, Program):
        job = whole_batches(program, job)
    fleet = fleet_of(program, cluster, job)
    grids = fleet.grids()
    check(fleet, grids)
    search = Search(fleet, fleet.setting)
    count = explore(search, fleet, grids, began + job.search.seconds)
    if search.best is None:
        refuse(fleet, grids)
    search.compare(nearest(search, fleet, grids), time.perf_counter() + COMPARING)
    took = time.perf_counter() - began
    document = report.document(fleet, fleet.setting, fleet.batch, search, count, took)
    return placed(document, fleet, search.best, grids)


def fleet_of(program: Program | Callable[[int], Program], cluster: Cluster, job: Job) -> Fleet:
    if job.batch is None:
        raise PlanError("the job has no batch; give its sequences and length")
    if job.pins.cp not in (None, 1):
        raise PlanError(f"cp={job.pins.cp}: context parallelism is not planned on unlike hosts; leave cp at 1")
    if isinstance(program, Program):
        check_pin(program, job.pins.recompute)
    return Fleet(program, cluster, setting_of(program, cluster, job), job)


def check(fleet: Fleet, grids: list[Grid]) -> None:
    """Raise PlanError where pins, batch and devices leave no mesh, with the numbers."""
    pins, batch = fleet.pins, fleet.batch
    if grids:
        check_batch(batch, [g.mesh for g in grids], pins)
        return
    named = " · ".join(f"{k}={v}" for k in ("pp", "dp", "tp", "dp_shard", "dp_replicate") if (v := getattr(pins, k)))
    if pins.pp and pins.pp > max(1, fleet.calls):
        raise PlanError(f"pp={pins.pp} needs at least {pins.pp} blocks; the model has {fleet.calls}")
    split = [f"{glob}: {text}" for glob, text in (pins.placements or {}).items() if text != "R"]
    if split and pins.tp in (None, 1):
        raise PlanError(f"placements {', '.join(split)} need tp > 1")
    sizes = ", ".join(f"{g.name} {show_sizes(g.live)}" for g in fleet.cluster.groups)
    raise PlanError(
        f"no mesh of {fleet.cluster.devices} devices at most goes with {f'the pins {named}' if named else 'the batch'}: dp must "
        f"divide the {batch.sequences} sequences, tp groups lie within a host, pp within the {fleet.calls} blocks (devices a "
        f"host: {sizes})"
    )


def show_sizes(live: tuple[int, ...]) -> str:
    """``7 × 8, 1 × 7``."""
    return ", ".join(f"{live.count(n)} × {n}" for n in sorted(set(live), reverse=True))


def explore(search: Search, fleet: Fleet, grids: list[Grid], until: float) -> int:
    """Search grids in the order of their bounds until none can be better; how many candidates that were."""
    count = 0
    for at in range(0, len(grids), TOGETHER):
        best = search.best
        if best is not None and grids[at].floor >= best.seconds * (1 - CLOSE):
            break
        if best is not None and (search.stopped or time.perf_counter() > until):
            search.stopped, search.bound = True, min(search.bound, grids[at].floor)
            break
        found = [pair for grid in grids[at : at + TOGETHER] for pair in fleet.expanded(grid)]
        count += len(found)
        search.run(sorted(found, key=lambda f: f[0]), until)
    return count


def nearest(search: Search, fleet: Fleet, grids: list[Grid]) -> list:
    """Candidates of the grids with the least bounds, for comparison."""
    found = [pair for grid in grids[:TOGETHER] for pair in fleet.expanded(grid)]
    return sorted(found, key=lambda f: f[0])


def refuse(fleet: Fleet, grids: list[Grid]) -> None:
    """Raise InfeasibleError (or PlanError where no schedule is left)."""
    ordered = sorted(grids, key=lambda g: -g.layout.devices)[:EXPLAINED]
    legal = [c for grid in ordered for c in fleet.legal(grid)]
    if not legal:
        raise PlanError(no_schedule(fleet.batch, [g.mesh for g in grids], fleet.pins))
    raise InfeasibleError(shortage.message(fleet, fleet.setting, fleet.batch, fleet.job, legal))


# ------------------------------------------------------------------ where it stands


def placed(document: PlanDocument, fleet: Fleet, best: Outcome | None, grids: list[Grid]) -> PlanDocument:
    """The document with the hosts of its ranks, and the devices that are not used and why."""
    assert best is not None and best.candidate.layout is not None
    layout = best.candidate.layout
    plan = document.plan.model_copy(update={"hosts": hosts(layout)})
    left = layout.unused()
    return document.model_copy(
        update={
            "plan": plan,
            "unused_devices": sum(left.values()),
            "unused": tuple(reasons(fleet, best, layout, left, grids)),
        }
    )


def hosts(layout: Layout) -> tuple[Host, ...]:
    found = []
    for share in layout.shares:
        for used in share.hosts:
            group = layout.whole.groups[used.group]
            gone = dict(group.dead).get(used.host, ())
            working = [d for d in range(group.devices_per_host) if d not in gone][: used.devices]
            found.append(Host(group=group.name, host=used.host, device=group.device.name, devices=tuple(working)))
    return tuple(found)


def reasons(fleet: Fleet, best: Outcome, layout: Layout, left: dict[int, int], grids: list[Grid]) -> Iterable[str]:
    """For every group with unused devices, what the best plan that uses more of them takes."""
    for g, count in left.items():
        group = fleet.cluster.groups[g]
        used = group.devices - count
        more = [grid for grid in grids if grid.layout.unused().get(g, 0) < count]
        text = f"{group.name}: {count} of {group.devices} devices ({group.device.name}) are not used: "
        if not more:
            yield text + (f"no mesh of equal stages takes more than {used} of them with {fleet.batch.sequences} sequences and "
                          f"{fleet.calls} blocks")  # fmt: skip
            continue
        other = Search(fleet, fleet.setting)
        explore(other, fleet, more, time.perf_counter() + ASKING)
        which = "that uses more of them" if used else "with some of them"
        if other.best is None:
            memory = show_bytes(group.device.memory)
            yield f"{text}no plan {which} fits the memory ({memory} a device there)"
            continue
        slower = other.best.seconds / best.seconds - 1
        taken = show_seconds(other.best.seconds)
        bound = " that was found" if other.stopped else ""
        how = f"{slower:.1%} more than this" if slower > 5e-4 else "as long as this"
        yield f"{text}the best plan {which}{bound} takes {taken}, {how} ({report.summary(other.best)})"


# ------------------------------------------------------------------ a given plan


def evaluate(program: Program | Callable[[int], Program], cluster: Cluster, job: Job, plan: Plan) -> PlanDocument:
    """What a given plan costs on the hosts that it names."""
    began = time.perf_counter()
    fleet = fleet_of(program, cluster, job)
    layout = layout_of(fleet, plan)
    variant = fleet.lead(plan.mesh.tp).adopt(plan)
    made = outcome_of(fleet, plan, replace(candidate_of(plan, variant), layout=layout))
    search = Search(fleet, fleet.setting, made, bound=made.seconds, seen=1)
    document = report.document(fleet, fleet.setting, fleet.batch, search, 1, time.perf_counter() - began)
    return placed(document, fleet, made, [])


def layout_of(fleet: Fleet, plan: Plan) -> Layout:
    """The layout whose hosts, in order, are the plan's."""
    shape = plan.mesh
    for layout in fleet.layouts.all(shape.tp, shape.tp * shape.dp, max(1, fleet.calls), shape.pp):
        if hosts(layout) == plan.hosts:
            return layout
    named = ", ".join(f"{h.group} host {h.host} × {len(h.devices)}" for h in plan.hosts) or "none"
    raise PlanError(f"the plan stands on other hosts than {fleet.cluster} has for pp {shape.pp}: {named}")
