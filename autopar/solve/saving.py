"""Which tensors of a block are kept and which are made again: the least seconds for every number of bytes.

For a price λ (bytes for a second) the problem of `cost.saving` is a minimum cut: with x[t] = 1 where tensor t is there in the
backward pass, y[s] = 1 where step s runs again,

    min  Σ bytes[t] · x[t] · (1 - y[step of t]) + Σ inner[s] · (1 - y[s]) + λ · Σ seconds[s] · y[s],  x[t] ≥ y[s], s reads t  (1)

every term a cut edge, and so is solved exactly. All λ give the lower convex hull of (seconds, bytes) (2): a stage that recomputes
some of its blocks a little more than others mixes neighbours on it. One budget alone is a small integer program (3).
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Mapping
from dataclasses import replace
from itertools import count

from torch import fx

from autopar.cost.regions import CUSTOM, RECOMPUTE, Measure, Region
from autopar.cost.saving import Saving, Selection, saving
from autopar.errors import PlanError
from autopar.ir.attention import cores
from autopar.ir.groups import allowed
from autopar.ir.program import Program
from autopar.plan.plan import Selected

FULL = RECOMPUTE.index("full")
POINTS = 5
"""Selections offered beside none, selective and full."""
FINE = 1e-3  # a hull's corner that spares less than this share of what can be spared is not looked for


def cheapest(saving: Saving, price: float) -> Selection:
    """(1): the selection of least bytes + ``price`` · seconds; of several, the one that runs least again."""
    from ortools.graph.python import max_flow

    source, sink, t0 = 0, 1, 2
    s0 = t0 + len(saving.tensors)
    arcs: list[tuple[int, int, int | None]] = []  # None: never cut
    for t, x in enumerate(saving.tensors):
        if x.wanted:
            arcs.append((source, t0 + t, None))
        size = max(1, round(x.bytes)) if x.keepable else None
        arcs.append((t0 + t, sink if x.step is None else s0 + x.step, size))
    for s, step in enumerate(saving.steps):
        arcs.append((s0 + s, sink, max(1, round(price * step.seconds)) if step.may else None))
        if step.inner:
            arcs.append((source, s0 + s, round(step.inner)))
        arcs += [(s0 + s, t0 + t, None) for t in step.reads]
    never = 1 + sum(c for _, _, c in arcs if c is not None)
    flow = max_flow.SimpleMaxFlow()
    for a, b, c in arcs:
        flow.add_arc_with_capacity(a, b, never if c is None else c)
    if flow.solve(source, sink) != flow.OPTIMAL or flow.optimal_flow() >= never:
        raise AssertionError(f"no selection: flow {flow.optimal_flow()} of {never}")
    side = set(flow.get_source_side_min_cut())
    made = saving.selection({step.name for s, step in enumerate(saving.steps) if s0 + s in side})
    assert made is not None, "a cut of finite value is a selection"
    return made


def hull(saving: Saving, points: int = POINTS) -> tuple[Selection, ...]:
    """(2): corners of the lower convex hull between keeping everything and keeping least, both left out but the latter;
    fewer than all where there are more than ``points``: those that stand out most. Most bytes first."""
    first, last = saving.selection(frozenset()), least(saving)
    assert first is not None, "what no part is run again for can be kept"
    found, order = [first], count()
    if last.bytes >= first.bytes:
        return ()
    found.append(last)
    heap = [(-area(first, last), next(order), first, last)]
    while heap and len(found) < points + 1:
        _, _, a, b = heapq.heappop(heap)
        if b.seconds <= a.seconds or a.bytes - b.bytes < FINE * (first.bytes - last.bytes):
            continue
        price = (a.bytes - b.bytes) / (b.seconds - a.seconds)
        c = cheapest(saving, price)
        known = a.bytes + price * a.seconds
        if c.bytes + price * c.seconds < known * (1 - 1e-9) and a.bytes > c.bytes > b.bytes:
            found.append(c)
            for pair in ((a, c), (c, b)):
                heapq.heappush(heap, (-area(*pair), next(order), *pair))
    return tuple(sorted(found[1:], key=lambda s: -s.bytes))


def recomputing(
    measured: Mapping[str, Measure], given: Mapping[str, tuple[Selection, ...]] | None = None
) -> tuple[dict[str, Region], dict[str, tuple[Selection, ...]]]:
    """Regions of blocks with their selections behind none, selective and full; every block gets as many rows."""
    regions = {name: restricted(m.program, name, m.region()) for name, m in measured.items()}
    if given is None:
        found = {name: offered(saving(m), regions[name]) for name, m in measured.items()}
    else:
        found = {name: repriced(name, saving(m), given.get(name, ())) for name, m in measured.items()}
    rows = max((len(f) for f in found.values()), default=0)
    return {name: extended(regions[name], found[name], rows) for name in measured}, found


def offered(problem: Saving, region: Region) -> tuple[Selection, ...]:
    """The hull without what whole blocks and attention cores are anyway."""
    if not any(step.may for step in problem.steps):
        return ()
    spared = region.saved[0] - region.saved[FULL]
    return tuple(s for s in hull(problem) if s.bytes > region.saved[FULL] + FINE * spared or spared <= 0)


def repriced(name: str, problem: Saving, known: tuple[Selection, ...]) -> tuple[Selection, ...]:
    """A plan's own selections at this micro-batch and on these devices."""
    found = []
    for s in known:
        missing = s.again - {step.name for step in problem.steps}
        made = None if missing else problem.selection(s.again)
        if made is None:
            what = (
                f"{min(missing)}, which is not there"
                if missing
                else "what may not run again, or keeps what cannot be kept"
            )
            raise PlanError(f"the plan was made for another program: it recomputes of {name} {what}")
        found.append(made)
    return tuple(found)


def adopted(groups: Mapping[str, Mapping[str, Selected]]) -> dict[str, tuple[Selection, ...]]:
    """A plan's selections by number; numbers that a block does not use repeat another of its own."""
    found = {}
    for block, known in groups.items():
        numbered = {
            int(mode.removeprefix(CUSTOM)): Selection(frozenset(s.again), s.saved, s.saved_bytes, s.seconds)
            for mode, s in known.items()
        }
        some = next(iter(numbered.values()), None)
        found[block] = tuple(numbered.get(i) or some for i in range(1, max(numbered, default=0) + 1))
    return found  # type: ignore[return-value]


def check_pin(program: Program, pinned: str | None) -> None:
    """Raise `PlanError` where a pass says that what a pin recomputes may not run again."""
    for name, graph in program.blocks.items() if program.recompute is not None else ():
        wanted = core_names(graph) if pinned == "selective" else operators(graph) if pinned == "full" else set()
        missing = sorted(wanted - allowed(program, name, graph))
        if missing:
            raise PlanError(
                f"pins.recompute: {pinned} runs {missing[0]} of {name} again, and the recompute pass says only "
                f"{', '.join(program.recompute or ()) or 'nothing'} may; leave out the pin or the pass"
            )


def core_names(graph: fx.Graph) -> set[str]:
    return {n.name for c in cores(graph) for n in c.nodes if n.target is not operator.getitem}


def operators(graph: fx.Graph) -> set[str]:
    return {n.name for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem}


def restricted(program: Program, name: str, region: Region) -> Region:
    """The region without the modes that run again what may not: they become none's."""
    if program.recompute is None:
        return region
    may, graph = allowed(program, name, program.blocks[name]), program.blocks[name]
    rules = (True, bool(core_names(graph)) and core_names(graph) <= may, operators(graph) <= may)

    def kept(row: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(x if ok else row[0] for x, ok in zip(row, rules, strict=True))

    return replace(
        region,
        saved=kept(region.saved),
        again=kept(region.again),
        again_talk=kept(region.again_talk),
        working=kept(region.working),
    )


def extended(region: Region, selections: tuple[Selection, ...], rows: int) -> Region:
    """The region with a row for each selection; where a block has fewer than others, its last again."""
    if not rows:
        return region
    none = Selection(frozenset(), (), region.saved[0], 0.0)
    chosen = [*selections, *[selections[-1] if selections else none] * (rows - len(selections))]
    return replace(
        region,
        saved=(*region.saved, *(s.bytes for s in chosen)),
        again=(*region.again, *(s.seconds - s.talk for s in chosen)),
        again_talk=(*region.again_talk, *(s.talk for s in chosen)),
        working=(*region.working, *(region.working[0] + s.interior for s in chosen)),
    )


def area(a: Selection, b: Selection) -> float:
    """How much may lie between two corners."""
    return (a.bytes - b.bytes) * (b.seconds - a.seconds)


def least(saving: Saving) -> Selection:
    """The selection of least bytes; of several, of least seconds."""
    total = sum(s.seconds for s in saving.steps if s.may)
    return cheapest(saving, 0.25 / total if total else 0.0)


def within(saving: Saving, budget: float) -> Selection:
    """(3): the selection of least seconds that keeps at most ``budget`` bytes. Raises `PlanError` where there is none."""
    from ortools.math_opt.python import mathopt

    model = mathopt.Model()
    again = [model.add_binary_variable() for s in saving.steps]
    kept = [model.add_binary_variable() for t in saving.tensors]
    for s, step in enumerate(saving.steps):
        if not step.may:
            again[s].upper_bound = 0
    size: list = [s.inner * (1 - y) for s, y in zip(saving.steps, again, strict=True) if s.inner]
    for t, x in enumerate(saving.tensors):
        if not x.keepable:
            kept[t].upper_bound = 0
        size.append(x.bytes * kept[t])
        there = kept[t] + again[x.step] if x.step is not None else 1 * kept[t]
        if x.wanted:
            model.add_linear_constraint(there >= 1)
        for s, step in enumerate(saving.steps):
            if t in step.reads:
                model.add_linear_constraint(there >= again[s])
    unit = (
        max((s.seconds for s in saving.steps), default=1.0) or 1.0
    )  # numbers near one: the solver's tolerances are absolute
    model.add_linear_constraint(sum(size) / max(budget, 1.0) <= 1.0)
    model.minimize(sum(s.seconds / unit * y for s, y in zip(saving.steps, again, strict=True)))
    result = mathopt.solve(model, mathopt.SolverType.HIGHS)
    if not result.has_primal_feasible_solution():
        raise PlanError(f"recompute: nothing keeps at most {budget:,.0f} bytes; least is {least(saving).bytes:,.0f}")
    values = result.variable_values()
    made = saving.selection({s.name for s, y in zip(saving.steps, again, strict=True) if values[y] > 0.5})
    assert made is not None, "the program's constraints are the selection's"
    return made
