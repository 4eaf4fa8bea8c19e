"""Memory of every pipeline rank against the device's limit: stacked bars."""

from __future__ import annotations

from autopar.plan.page.html import Markup, legend, section, tag
from autopar.plan.plan import Bytes, Plan, PlanDocument, Stage, counted
from autopar.spec.quantity import show_bytes

PARTS = tuple(Bytes.model_fields)  # parameters, gradients, optimizer, activations, transient


def memory(document: PlanDocument) -> Markup:
    plan, limit = document.plan, document.memory_limit
    held = rank_bytes(document)
    peaks = [max((s.peak_bytes for s in stages_of(plan, r)), default=0) for r in range(plan.mesh.pp)]
    tops = [h.total if h else p for h, p in zip(held, peaks, strict=True)]
    scale = max([limit, *tops, 1]) * 1.02
    limits = [plan.stages[rank].memory_limit or limit for rank in range(plan.mesh.pp)]
    scale = max([scale, *(n * 1.02 for n in limits)])
    rows = [_row(plan, rank, held[rank], tops[rank], limits[rank], scale) for rank in range(plan.mesh.pp)]
    partly = any(h is None for h in held)
    keys = [(part, part) for part in PARTS] + ([("peak", "all kinds together")] if partly else [])
    keys += [("limit-key", "limit")] if limit else []
    against = _against(limit) if len(set(limits)) == 1 else ", against what a plan may use of each"
    note = f"Peak bytes of the devices of every pipeline rank{against}."
    return section("memory", "Memory", note, legend(keys), tag("div", rows, cls="ranks"))


def _against(limit: int) -> str:
    return f", against the {show_bytes(limit)} that a plan may use of a device" if limit else ""


def rank_bytes(document: PlanDocument) -> list[Bytes | None]:
    """Bytes by kind of every pp rank; None where the plan holds only the sum."""
    plan, cost = document.plan, document.cost
    if len(document.rank_bytes) == plan.mesh.pp:
        return list(document.rank_bytes)
    peaks = [max((s.peak_bytes for s in stages_of(plan, r)), default=0) for r in range(plan.mesh.pp)]
    fullest = peaks.index(max(peaks)) if peaks else 0
    return [cost.bytes if rank == fullest else None for rank in range(plan.mesh.pp)]


def stages_of(plan: Plan, rank: int) -> list[Stage]:
    """The virtual stages that run on a pp rank."""
    return [plan.stages[s] for s in plan.stages_on(rank)]


def label_of(plan: Plan, rank: int) -> str:
    """``stage 3``, or ``rank 3 · stages 3, 11, 19`` where a rank has several."""
    stages = plan.stages_on(rank)
    if len(stages) == 1:
        return f"stage {rank}"
    return f"rank {rank} · stages {', '.join(map(str, stages))}"


def blocks_of(plan: Plan, rank: int) -> str:
    spans = [s.blocks for s in stages_of(plan, rank) if s.blocks[1] >= s.blocks[0]]
    return f"blocks {', '.join(f'{a}–{b}' if a != b else str(a) for a, b in spans)}" if spans else "no block"


def _row(plan: Plan, rank: int, held: Bytes | None, top: int, limit: int, scale: float) -> Markup:
    kinds = held.model_dump() if held else {"peak": top}
    parts = [
        tag("span", cls=f"part {kind}", style=f"width:{size / scale * 100:.3f}%", title=f"{kind}: {show_bytes(size)}")
        for kind, size in kinds.items()
        if size
    ]
    left = f"left:{limit / scale * 100:.3f}%"
    mark = tag("span", cls="limit", style=left, title=f"limit: {show_bytes(limit)}") if limit else None
    share = tag("small", f" {top / limit:.0%}") if limit else None
    value = tag("span", show_bytes(top), share, cls="num over" if 0 < limit < top else "num")
    place = f" · {plan.stages[rank].group}" if plan.hosts else ""
    about = tag("small", f"{blocks_of(plan, rank)} · {recompute_of(plan, rank)}{place}")
    name = tag("div", tag("b", label_of(plan, rank)), about, cls="name")
    return tag("div", name, tag("div", parts, mark, cls="bar"), value, cls="rank", data_rank=rank, data_bytes=top)


def recompute_of(plan: Plan, rank: int) -> str:
    kinds = counted(kind for s in stages_of(plan, rank) for kind in s.recompute)
    counts = [f"{kind} in {count}" for kind, count in kinds.items()]
    return f"recompute {', '.join(counts)}" if counts else "no recompute"
