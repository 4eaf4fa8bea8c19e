"""Why a plan is as it is, as text: the ledger of seconds and bytes, what binds, the runners-up, one node, a difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from autopar.plan.diff import difference
from autopar.plan.plan import Cost, PlanDocument, Stage
from autopar.plan.text import summary
from autopar.plan.why import why as of_node
from autopar.spec.quantity import show_bytes, show_seconds

BAR = 32  # characters of a whole bar
ALIKE = 0.005  # a runner-up within this share of the plan's step is as good as it, for the model of costs


def explain(document: PlanDocument, why: str | None = None, other: PlanDocument | None = None) -> str:
    """The explanation of a plan. ``why``: a node (``linear_2``, ``block_0.linear_2``) or a parameter (also a glob) to explain
    instead; ``other``: a plan to set beside it. Raises `PlanError` where no node and no parameter has the name."""
    parts = []
    if why is not None:
        parts.append(of_node(document, why))
    if other is not None:
        parts.append(difference(document, other))
    return "\n\n".join(parts or _whole(document)) + "\n"


def _whole(document: PlanDocument) -> list[str]:
    return [
        summary(document.model_copy(update={"runners_up": (), "binding": ()}), document.title),
        "\n".join(seconds(document.cost)),
        "\n".join(bytes_(document)),
        "\n".join(bound(document)),
        *(["\n".join(groups(document))] if document.plan.hosts else []),
        "\n".join(runners_up(document)),
    ]


def bar(share: float) -> str:
    """A bar of `BAR` characters for a share of one, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")).ljust(BAR)


def _rows(entries: Iterable[tuple[str, float, str]], total: float) -> Iterator[str]:
    for name, value, shown in entries:
        share = value / total if total else 0.0
        yield f"  {name:<24} {bar(share)} {shown:>10} {share:>7.1%}"


def seconds(cost: Cost) -> list[str]:
    """Where every second of a step goes, on the slowest device."""
    entries = {
        "compute": cost.compute_seconds,
        "exposed communication": cost.exposed_communication_seconds,
        "bubble": cost.bubble_seconds,
        "optimizer": cost.optimizer_seconds,
    }
    rows = _rows(((name, value, show_seconds(value)) for name, value in entries.items()), cost.step_seconds)
    return [f"seconds of a step: {show_seconds(cost.step_seconds)}", *rows]


def bytes_(document: PlanDocument) -> list[str]:
    """Where every byte of the fullest device goes at its peak, and how full every pipeline rank is."""
    cost, limit = document.cost, document.memory_limit
    total = limit or cost.peak_bytes
    entries = [*cost.bytes.model_dump().items(), *([("free", max(0, limit - cost.peak_bytes))] if limit else [])]
    against = f" of {show_bytes(limit)} that a plan may use" if limit else ""
    rows = _rows(((name, value, show_bytes(value)) for name, value in entries), total)
    return [f"bytes of the fullest device: {show_bytes(cost.peak_bytes)}{against}", *rows, *_ranks(document, total)]


def _ranks(document: PlanDocument, total: int) -> list[str]:
    plan = document.plan
    pp = plan.mesh.pp
    if pp == 1:
        return []
    peaks = [max(plan.stages[s].peak_bytes for s in plan.stages_on(rank)) for rank in range(pp)]
    names = [f"pp {rank} {plan.stages[rank].group if plan.hosts else ''}".strip() for rank in range(pp)]
    entries = ((name, peak, show_bytes(peak)) for name, peak in zip(names, peaks, strict=True))
    return ["bytes of every pipeline rank", *_rows(entries, max(total, *peaks))]


def bound(document: PlanDocument) -> list[str]:
    """What keeps the plan from being faster."""
    found = list(document.binding) or ["nothing that the plan names: no limit is reached"]
    search = document.search
    proof = (
        f"  search: {search.status}; none of {search.candidates:,} candidates can take less than {show_seconds(search.bound)} "
        f"(gap {search.gap:.2%})"
    )
    slow = _slowest(document.plan.stages)
    return ["what binds", *(f"  {text}" for text in found), *slow, proof]


def groups(document: PlanDocument) -> list[str]:
    """What every pipeline rank stands on, and why stages are as they are where hosts are unlike."""
    plan, pp = document.plan, document.plan.mesh.pp
    rows = []
    for rank in range(pp):
        mine = plan.stages[rank::pp]
        blocks = sum(s.blocks[1] - s.blocks[0] + 1 for s in mine)
        took = sum(s.seconds.forward + s.seconds.backward for s in mine)
        rows.append(f"  pp {rank:<3} {mine[0].group} ({mine[0].device}): {blocks} blocks, {show_seconds(took)} a micro-batch, "
                    f"{show_bytes(max(s.peak_bytes for s in mine))} of {show_bytes(mine[0].memory_limit)}")  # fmt: skip
    wide = plan.mesh.devices // pp
    why = (
        f"  every stage has {wide} devices (dp {plan.mesh.dp} × tp {plan.mesh.tp}): the emitted program is one mesh, so unlike "
        "devices get unlike numbers of blocks, not unlike degrees"
    )
    unused = [f"  not used: {text}" for text in document.unused]
    return ["unlike hosts", *rows, *([why] if pp > 1 else []), *unused]


def _slowest(stages: tuple[Stage, ...]) -> list[str]:
    """The stage that paces the pipeline, where stages are unequal."""
    took = [s.seconds.forward + s.seconds.backward for s in stages]
    mean = sum(took) / len(took)
    most = max(took)
    if len(took) == 1 or most <= mean * 1.01:
        return []
    return [
        f"  pace: stage {took.index(most)} takes {show_seconds(most)} a micro-batch, {most / mean - 1:.1%} above the mean"
    ]


def runners_up(document: PlanDocument) -> list[str]:
    """The other plans, and what they would cost."""
    if not document.runners_up:
        return ["runners-up", "  no other plan was worked out to the end"]
    step, peak = document.cost.step_seconds, document.cost.peak_bytes
    rows = []
    for place, other in enumerate(document.runners_up, 1):
        slower = other.step_seconds / step - 1 if step else 0.0
        reason = f"{slower:+.1%} slower" if slower > ALIKE else "as fast within the accuracy of the costs"
        saved = peak - other.peak_bytes
        memory = f"{show_bytes(abs(saved))} {'less' if saved > 0 else 'more'} memory" if saved else "the same memory"
        rows += [f"  {place}. {other.summary}", f"     {show_seconds(other.step_seconds)}, {reason}; {memory}"]
    return ["runners-up", *rows]
