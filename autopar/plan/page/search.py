"""How the plan was found: objective, bound, gap, and the plans it was chosen over."""

from __future__ import annotations

from autopar.plan.page.html import Child, Markup, number, section, table, tag
from autopar.plan.plan import PlanDocument, RunnerUp
from autopar.spec.quantity import show_bytes, show_seconds


def search(document: PlanDocument) -> Markup:
    found = document.search
    note = (
        f"{found.status}: no plan in the search space is faster than {show_seconds(found.bound)}, "
        f"so this one is within {found.gap:.2%} of the best."
    )
    facts = [
        ("objective", show_seconds(found.objective)),
        ("bound", show_seconds(found.bound)),
        ("gap", f"{found.gap:.2%}"),
        ("candidates", f"{found.candidates:,}"),
        ("searched for", show_seconds(found.seconds)),
        ("traced in", show_seconds(found.trace_seconds)),
    ]
    line = tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts], cls="facts")
    return section("search", "Search", note, line, runners_up(document))


def runners_up(document: PlanDocument) -> Markup:
    if not document.runners_up:
        return tag("p", "No other plan was worked out to the end.", cls="muted")
    plan, cost = document.plan, document.cost
    most = max([cost.step_seconds, *(o.step_seconds for o in document.runners_up)]) or 1.0
    chosen = RunnerUp(
        summary="this plan", mesh=plan.mesh, zero=plan.zero, microbatch=plan.microbatch, schedule=plan.schedule,
        step_seconds=cost.step_seconds, peak_bytes=cost.peak_bytes,
    )  # fmt: skip
    rows = [_row(i, o, cost.step_seconds, most) for i, o in enumerate((chosen, *document.runners_up))]
    head: list[Child] = [tag("th", h) for h in ("", "pp", "dp", "cp", "tp", "ZeRO", "micro-batch", "schedule")]
    return table([*head, "step", "slower by", "peak memory"], rows, cls="runners")


def _row(place: int, other: RunnerUp, best: float, most: float) -> Markup:
    slower = other.step_seconds / best - 1 if best else 0.0
    bar = tag("i", cls="slow", style=f"width:{other.step_seconds / most * 100:.1f}%")
    degrees = [number(n) for n in other.mesh.degrees.values()]
    cells: list[Child] = [
        tag("td", tag("b", "this plan") if place == 0 else f"runner-up {place}"),
        *degrees,
        number(_zero(other)),
        number(other.microbatch),
        tag("td", other.schedule),
        tag("td", show_seconds(other.step_seconds), bar, cls="num step"),
        number(f"{slower:+.1%}" if place else "–"),
        number(show_bytes(other.peak_bytes)),
    ]
    return tag("tr", cells, cls="chosen" if place == 0 else None, title=other.summary)


def _zero(other: RunnerUp) -> str:
    """The ZeRO stage, and among how many of dp where that is not all of them."""
    return str(other.zero) + (f" over {other.mesh.sharing}" if other.mesh.dp_replicate > 1 else "")


def unsplit(document: PlanDocument) -> Markup:
    """Operators that no rule covers; nothing is silent."""
    names = document.plan.unsplit
    if not names:
        note = "Every operator of the program has a rule; none is replicated for want of one."
        return section("unsplit", "Not split", note)
    note = f"{len(names)} operators have no sharding rule and run whole on every device of tp:"
    return section("unsplit", "Not split", note, tag("ul", [tag("li", tag("code", n)) for n in names], cls="names"))
