"""Two plans side by side: what was decided otherwise, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator

from autopar.plan.names import starred
from autopar.plan.plan import PlanDocument, counted
from autopar.spec.quantity import show_bytes, show_seconds

LISTED = 20  # placements that differ are listed, so many families at most


def difference(document: PlanDocument, other: PlanDocument) -> str:
    """Decisions that differ first, then seconds and bytes, then placements."""
    head = ("", "this plan", "the other", "difference")
    rows = [head, *_decisions(document, other), *_seconds(document, other), *_bytes(document, other)]
    first, mine, theirs = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [f"{name:<{first}}  {a:>{mine}}  {b:>{theirs}}  {word}".rstrip() for name, a, b, word in rows]
    return "\n".join([*lines, *_stages(document, other), *_placements(document, other)])


Row = tuple[str, str, str, str]


def _facts(document: PlanDocument) -> dict[str, object]:
    plan = document.plan
    kinds = [kind for stage in plan.stages for kind in stage.recompute]
    again = ", ".join(f"{count} {kind}" for kind, count in counted(kinds).items())
    return {
        "model": document.title or f"{document.model.parameters:,}",
        "cluster": document.cluster or "–",
        **plan.mesh.degrees,
        "zero": plan.zero,
        "sharded over": plan.mesh.sharing if plan.zero else 1,
        "microbatch": plan.microbatch,
        "microbatches": plan.microbatches,
        "schedule": plan.schedule,
        "virtual stages": plan.virtual_stages,
        "sequence parallel": "yes" if plan.sequence_parallel else "no",
        "recompute": again or "none",
        "attention over cp": plan.context.attention if plan.context else "–",
    }


def _decisions(document: PlanDocument, other: PlanDocument) -> Iterator[Row]:
    a, b = _facts(document), _facts(other)
    for name in a:
        yield name, str(a[name]), str(b[name]), "" if a[name] == b[name] else "differs"


def changes(document: PlanDocument, other: PlanDocument) -> list[str]:
    """What the other plan decides otherwise, each as ``tp 2 → 4``; placements and stages' cuts left out."""
    a, b = _facts(document), _facts(other)
    return [f"{name} {a[name]} → {b[name]}" for name in a if a[name] != b[name] and name not in ("model", "cluster")]


def _seconds(document: PlanDocument, other: PlanDocument) -> Iterator[Row]:
    for field in ("step", "compute", "exposed_communication", "bubble", "optimizer"):
        a, b = (getattr(d.cost, f"{field}_seconds") for d in (document, other))
        yield field.replace("_", " "), show_seconds(a), show_seconds(b), _change(a, b)
    a, b = document.cost.tokens_per_second, other.cost.tokens_per_second
    yield "tokens/s", f"{a:,.0f}", f"{b:,.0f}", _change(a, b)
    yield "MFU", f"{document.cost.mfu:.1%}", f"{other.cost.mfu:.1%}", ""


def _bytes(document: PlanDocument, other: PlanDocument) -> Iterator[Row]:
    yield "peak memory", *_pair(document.cost.peak_bytes, other.cost.peak_bytes)
    theirs = other.cost.bytes.model_dump()
    for kind, size in document.cost.bytes.model_dump().items():
        yield f"  {kind}", *_pair(size, theirs[kind])


def _pair(a: int, b: int) -> tuple[str, str, str]:
    return show_bytes(a), show_bytes(b), _change(a, b)


def _change(a: float, b: float) -> str:
    """The other against this one, in per cent of this one."""
    if a == b:
        return ""
    return f"{b / a - 1:+.1%}" if a else "only the other"


def _stages(document: PlanDocument, other: PlanDocument) -> list[str]:
    a, b = ([s.blocks for s in d.plan.stages] for d in (document, other))
    if a == b:
        return []

    def shown(spans: list[tuple[int, int]]) -> str:
        words = [f"{i}–{j}" for i, j in spans]
        return ", ".join(words if len(words) <= LISTED else [*words[:LISTED], "…"])

    return ["", "blocks of the stages", f"  this plan   {shown(a)}", f"  the other   {shown(b)}"]


def _placements(document: PlanDocument, other: PlanDocument) -> list[str]:
    a, b = document.plan.placements, other.plan.placements
    found: dict[tuple[str, str, str], list[str]] = {}
    for name in dict.fromkeys([*a, *b]):
        pair = (a.get(name, "absent"), b.get(name, "absent"))
        if pair[0] != pair[1]:
            found.setdefault((starred(name), *pair), []).append(name)
    if not found:
        return ["", f"all {len(a):,} parameters are placed alike"]
    count = sum(map(len, found.values()))
    rows = [
        f"  {name if len(names) > 1 else names[0]:<48} {p:<12} {q}{f'   × {len(names)}' if len(names) > 1 else ''}"
        for (name, p, q), names in list(found.items())[:LISTED]
    ]
    more = [f"  … and {len(found) - LISTED} more kinds"] if len(found) > LISTED else []
    return ["", f"{count:,} parameters are placed otherwise", *rows, *more]
