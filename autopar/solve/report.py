"""The plan document: what was chosen, what it costs, how it was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.cost.schedules import device_of
from autopar.cost.values import dims, flows, tensor, tensors
from autopar.ir.program import Program
from autopar.plan.nodes import node_facts
from autopar.plan.plan import (
    Bytes,
    Context,
    Cost,
    ModelFacts,
    Plan,
    PlanDocument,
    RunnerUp,
    Seconds,
    Stage,
)
from autopar.plan.plan import Search as SearchFacts
from autopar.solve.assignment import Assignment, placeholders
from autopar.solve.outcome import Outcome, Part
from autopar.solve.parts import Contexts, PartSource
from autopar.solve.pipeline import Setting
from autopar.solve.selections import Selections
from autopar.spec.job import Batch

if TYPE_CHECKING:
    from autopar.solve.fleet import Fleet
    from autopar.solve.search import Search

GIB = 2**30
TIGHT = 0.9  # a device filled to this share of its limit counts as a binding constraint


def document(
    source: Contexts | Fleet, setting: Setting, batch: Batch, search: Search, count: int, seconds: float
) -> PlanDocument:
    best = search.best
    assert best is not None
    c = best.candidate
    profile = source.profile(c)
    part = source.along(c) if isinstance(source, Contexts) else source
    assignment = part.assignment(c.mesh.tp, c.variant)
    program = part.static(c.microbatch)
    flops = profile.flops / (c.microbatch * batch.length)
    slack = assignment.bound / assignment.objective if assignment.objective > 0 else 1.0
    bound = min(search.bound, best.seconds) * min(1.0, slack)
    gap = max(0.0, (best.seconds - bound) / best.seconds)
    status = "time limit" if search.stopped else "optimal" if gap <= 0.01 else "feasible"
    return PlanDocument(
        model=facts(program, flops),
        plan=plan(
            program, best, assignment, source, part.context(c.microbatch) if isinstance(part, PartSource) else None
        ),
        cost=cost(best, source.peak(c, str(setting.precision.compute)), batch, flops),
        search=SearchFacts(
            seconds=seconds,
            trace_seconds=0.0,
            status=status,
            objective=best.seconds,
            bound=bound,
            gap=gap,
            candidates=count,
        ),
        runners_up=runners_up(search),
        binding=binding(best, setting),
        nodes=node_facts(program, assignment, part.prices(c.mesh.tp)),
        memory_limit=round(best.limits[best.fullest]),
        rank_bytes=best.held,
        title=str(source.job.model) if source.job.model is not None else "",
        cluster=str(source.cluster),
    )


def facts(program: Program, flops: float) -> ModelFacts:
    own = [p for p in program.parameters.values() if p.alias_of is None]
    return ModelFacts(
        parameters=sum(p.numel for p in own),
        trainable_parameters=sum(p.numel for p in own if p.trainable),
        flops_per_token=flops,
    )


def plan(
    program: Program, best: Outcome, assignment: Assignment, source: Contexts | Fleet, context: Context | None
) -> Plan:
    c, profile = best.candidate, source.profile(best.candidate)
    kinds, described = profile.kinds, Selections(profile)
    places = [source.place(c, device_of(c.schedule, c.mesh.pp, s)) for s in range(len(best.parts))]
    return Plan(
        mesh=c.mesh,
        zero=c.zero,  # type: ignore[arg-type]
        microbatch=c.microbatch,
        microbatches=c.microbatches,
        schedule=c.schedule,
        virtual_stages=c.virtual,
        sequence_parallel=c.mesh.tp > 1 and splits_sequence(program, assignment),
        stages=tuple(
            Stage(
                blocks=(p.blocks[0], p.blocks[1] - 1),
                recompute=tuple(
                    described(kind, m) for kind, m in zip(kinds[slice(*p.blocks)], p.recompute, strict=True)
                ),
                peak_bytes=round(peak),
                seconds=seconds_of(p, c.splits),
                device=places[s][0],
                group=places[s][1],
                memory_limit=round(best.limits[device_of(c.schedule, c.mesh.pp, s)]),
            )
            for s, (p, peak) in enumerate(zip(best.parts, best.peaks, strict=True))
        ),
        choices=assignment.choices(program),
        placements=assignment.placements(program),
        unsplit=assignment.unsplit,
        recompute_groups=described.groups(program),
        context=context,
    )


def seconds_of(part: Part, splits: bool) -> Seconds:
    if not splits:
        return Seconds(forward=part.forward, backward=part.backward)
    return Seconds(forward=part.forward, backward=sum(part.apart), weight=part.apart[1])


def splits_sequence(program: Program, assignment: Assignment) -> bool:
    """Whether what flows from block to block is split over the sequence."""
    for name, body in program.blocks.items():
        for place in placeholders(body):
            p = assignment.of(name, place).outputs[0]
            v = (place, 0)
            if (
                place.meta["kind"] == "input"
                and p.sharded
                and flows(v)
                and tensors(place)
                and tensor(v).is_floating_point()
            ):
                return "sequence" in dims(v)[p.dim]
    return False


def cost(best: Outcome, peak: float, batch: Batch, flops: float) -> Cost:
    """``peak``: dense FLOP/s of all devices of the plan together."""
    tokens = batch.tokens / best.seconds
    return Cost(
        step_seconds=best.seconds,
        compute_seconds=best.compute,
        exposed_communication_seconds=best.exposed,
        bubble_seconds=best.bubble,
        optimizer_seconds=best.optimizer,
        tokens_per_second=tokens,
        mfu=flops * tokens / peak,
        peak_bytes=best.bytes.total,
        bytes=Bytes(**best.bytes.model_dump()),
    )


def runners_up(search: Search) -> tuple[RunnerUp, ...]:
    """The next best plans that were worked out, one for each mesh, ZeRO stage, micro-batch and schedule."""
    from autopar.solve.search import KEPT

    found: dict[tuple, Outcome] = {}
    for o in sorted(search.others, key=lambda o: o.seconds):
        c = o.candidate
        found.setdefault((tuple(c.mesh.degrees.values()), c.zero, c.microbatch, c.schedule, c.context), o)
    return tuple(
        RunnerUp(
            summary=summary(o),
            mesh=o.candidate.mesh,
            zero=o.candidate.zero,
            microbatch=o.candidate.microbatch,
            schedule=o.candidate.schedule,
            step_seconds=o.seconds,
            peak_bytes=o.bytes.total,
        )
        for o in list(found.values())[:KEPT]
    )


def summary(o: Outcome) -> str:
    """One line: ``tp 4 · pp 2 · dp 8 · zero 1 · micro-batch 2 · 1f1b · 4 of 32 blocks recomputed``."""
    c = o.candidate
    again = sum(m > 0 for p in o.parts for m in p.recompute)
    total = sum(len(p.recompute) for p in o.parts)
    name = c.schedule if c.virtual == 1 else f"{c.schedule} × {c.virtual}"
    dp = f"{c.mesh.dp_replicate} × {c.mesh.dp_shard}" if c.mesh.dp_replicate > 1 else c.mesh.dp
    shares = c.layout.shares if c.layout is not None else ()
    where = "".join(f"{' → ' if i else ' · '}{s.cluster.groups[0].name}" for i, s in enumerate(shares))
    cp = f" · cp {c.mesh.cp} ({c.context.replace('_', '-') or 'gathered keys'})" if c.mesh.cp > 1 else ""
    return (
        f"tp {c.mesh.tp} · pp {c.mesh.pp} · dp {dp}{cp} · zero {c.zero} · micro-batch {c.microbatch} · {name} · "
        f"{again} of {total} blocks recomputed{where}"
    )


def binding(best: Outcome, setting: Setting) -> tuple[str, ...]:
    """What keeps the plan from being faster."""
    found = []
    full, limit = best.peaks[best.fullest], best.limits[best.fullest]
    if full >= TIGHT * limit:
        found.append(f"memory: {full / GIB:.1f} of {limit / GIB:.1f} GiB on stage {best.fullest}")
    again = sum(m > 0 for p in best.parts for m in p.recompute)
    if again and setting.recompute is None:
        found.append(f"memory: {again} of {sum(len(p.recompute) for p in best.parts)} blocks are recomputed to fit")
    if best.bubble > 0.05 * best.seconds:
        found.append(
            f"pipeline: {best.bubble / best.seconds:.0%} of the step is waiting; more micro-batches would shorten it"
        )
    if best.exposed > 0.1 * best.seconds:
        found.append(f"links: {best.exposed / best.seconds:.0%} of the step is communication that shows")
    return tuple(found)
