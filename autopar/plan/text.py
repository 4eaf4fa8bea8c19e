"""A plan as a few lines of text for people."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from autopar.plan.plan import Cost, Plan, PlanDocument, RunnerUp, Stage, counted
from autopar.spec.quantity import show_bytes, show_seconds


def summary(document: PlanDocument, title: str = "") -> str:
    """What was decided, what it costs, and how sure the search is."""
    parts = [_model(document, title), _decision(document.plan), _cost(document.cost), _search(document)]
    lines = [line for part in parts for line in part]
    lines += [f"binding        {text}" for text in document.binding]
    lines += list(_stages(document.plan))
    lines += list(_selections(document.plan))
    lines += list(groups_of(document.plan))
    lines += [f"not used       {text}" for text in document.unused]
    if document.plan.unsplit:
        lines.append(f"not split      {', '.join(document.plan.unsplit)}")
    lines += [_runner_up(i, other, document.cost) for i, other in enumerate(document.runners_up[:5], 1)]
    return "\n".join(lines)


def _model(document: PlanDocument, title: str) -> list[str]:
    model = document.model
    frozen = model.parameters - model.trainable_parameters
    share = f", {model.trainable_parameters:,} of them trainable" if frozen else ""
    flops = f"{model.flops_per_token / 1e9:,.2f} GFLOPs a token"
    return [f"model          {title + ': ' if title else ''}{model.parameters:,} parameters{share}, {flops}"]


def _decision(plan: Plan) -> list[str]:
    mesh = plan.mesh
    degrees = " · ".join(f"{axis} {degree}" for axis, degree in mesh.degrees.items())
    sequence = ", sequence parallel" if plan.sequence_parallel else ""
    virtual = f", {plan.virtual_stages} virtual stages a rank" if plan.virtual_stages > 1 else ""
    return [
        f"mesh           {degrees} = {mesh.devices} devices; {zero_of(plan)}{sequence}",
        *_context(plan),
        f"schedule       {plan.schedule}{virtual}; {plan.microbatches} × {plan.microbatch} sequences a replica",
    ]


CONTEXT = {
    "ring": "keys and values go round a ring",
    "all_to_all": "an all-to-all splits heads while attention runs",
    "": "keys and values are gathered",
}


def _context(plan: Plan) -> list[str]:
    """How sequences are split over cp, where they are."""
    if plan.context is None:
        return []
    order = ", each device an early and a late chunk (zigzag)" if plan.context.zigzag else ""
    rest = f"; whole on every device: {', '.join(plan.context.whole)}" if plan.context.whole else ""
    return [f"context        sequences split over cp {plan.mesh.cp}; {CONTEXT[plan.context.attention]}{order}{rest}"]


def zero_of(plan: Plan) -> str:
    """``ZeRO 3``, or with replicas beside it ``ZeRO 3 over 8 of 64 (8 replicas)``; devices along cp count, too."""
    mesh = plan.mesh
    hybrid = f" over {mesh.sharing} of {mesh.copies} ({mesh.dp_replicate} replicas)" if mesh.dp_replicate > 1 else ""
    return f"ZeRO {plan.zero}{hybrid}"


def _cost(cost: Cost) -> list[str]:
    ledger = {
        "compute": cost.compute_seconds,
        "exposed communication": cost.exposed_communication_seconds,
        "bubble": cost.bubble_seconds,
        "optimizer": cost.optimizer_seconds,
    }
    times = " + ".join(f"{name} {show_seconds(value)}" for name, value in ledger.items() if value)
    held = {name: value for name, value in cost.bytes.model_dump().items() if value}
    memory = " + ".join(f"{name} {show_bytes(value)}" for name, value in held.items())
    return [
        f"step           {show_seconds(cost.step_seconds)} = {times}",
        f"throughput     {cost.tokens_per_second:,.0f} tokens/s, MFU {cost.mfu:.1%}",
        f"memory         {show_bytes(cost.peak_bytes)} on the fullest device = {memory}",
    ]


def _search(document: PlanDocument) -> list[str]:
    search = document.search
    proof = f"{search.status}, gap {search.gap:.2%} (bound {show_seconds(search.bound)})"
    time = f"{show_seconds(search.seconds)}; traced in {show_seconds(search.trace_seconds)}"
    return [f"search         {proof}, {search.candidates:,} candidates in {time}"]


def _stages(plan: Plan) -> Iterator[str]:
    """Stages that are alike share a line."""
    numbered = list(enumerate(plan.stages))
    for _, run in groupby(numbered, key=lambda item: _alike(item[1])):
        group = list(run)
        (first, a), (last, b) = group[0], group[-1]
        name = f"stage {first}" if first == last else f"stages {first}–{last}"
        blocks = f"blocks {a.blocks[0]}–{b.blocks[1]}" if b.blocks[1] >= a.blocks[0] else "no block"
        each = "" if first == last else " each"
        times = f"forward {show_seconds(a.seconds.forward)}, backward {show_seconds(a.seconds.backward)}"
        place = f" on {a.group} ({a.device})" if plan.hosts else ""
        yield f"{name:<14} {blocks}{place}, {_recompute(a)}{each}; {times}, {show_bytes(a.peak_bytes)}"


def groups_of(plan: Plan) -> Iterator[str]:
    """Which group of unlike hosts has which ranks, and how many hosts and devices of it."""
    first = 0
    for name, run in groupby(plan.hosts, key=lambda host: host.group):
        group = list(run)
        count = sum(len(host.devices) for host in group)
        blocks = sum(s.blocks[1] - s.blocks[0] + 1 for s in plan.stages if name == s.group)
        share = f", {blocks} of {sum(len(s.recompute) for s in plan.stages)} blocks" if blocks else ""
        hosts = f"{len(group)} host{'s' * (len(group) > 1)}"
        ranks = f"ranks {first}–{first + count - 1}"
        yield f"group          {name}: {hosts}, {count} × {group[0].device}, {ranks}{share}"
        first += count


def _alike(stage: Stage) -> tuple[object, ...]:
    size = stage.blocks[1] - stage.blocks[0]
    return (size, _recompute(stage), show_bytes(stage.peak_bytes), stage.seconds, stage.group)


def _recompute(stage: Stage) -> str:
    return "recompute " + (
        ", ".join(f"{kind} in {count}" for kind, count in counted(stage.recompute).items()) or "none"
    )


def _selections(plan: Plan) -> Iterator[str]:
    """What the blocks that are recomputed in part keep and make again."""
    for block, selections in plan.recompute_groups.items():
        for name, made in selections.items():
            blocks = sum(stage.recompute.count(name) for stage in plan.stages)
            again = f"{len(made.again)} operators again ({', '.join(made.groups)})"
            kept = f"keeps {show_bytes(made.saved_bytes)} a micro-batch, {show_seconds(made.seconds)} for it"
            yield f"{name:<14} {block}, {blocks} blocks: {again}; {kept}"


def _runner_up(place: int, other: RunnerUp, best: Cost) -> str:
    slower = other.step_seconds / best.step_seconds - 1 if best.step_seconds else 0.0
    return f"runner-up {place:<4} {other.summary}: {show_seconds(other.step_seconds)} ({slower:+.1%})"
