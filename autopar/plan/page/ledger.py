"""Where every second of a step goes: one bar."""

from __future__ import annotations

from autopar.plan.page.html import Markup, joined, section, tag
from autopar.plan.plan import Cost, PlanDocument
from autopar.spec.quantity import show_seconds

CHARACTER = 0.008  # of a bar's width: what a character of its label takes
PARTS = (
    ("compute", "compute", "operators, recompute included"),
    ("exposed_communication", "exposed communication", "collectives that nothing hides"),
    ("bubble", "bubble", "waiting for other stages"),
    ("optimizer", "optimizer", "updating the parameters"),
)
"""(field of the cost without ``_seconds``, name, what it is)."""


def entries(cost: Cost) -> list[tuple[str, str, str, float]]:
    """(class, name, what it is, seconds) of the ledger; they add up to the step."""
    return [(key, name, what, getattr(cost, f"{key}_seconds")) for key, name, what in PARTS]


def ledger(document: PlanDocument) -> Markup:
    cost = document.cost
    total = cost.step_seconds or 1.0
    parts = [e for e in entries(cost) if e[3] > 0]
    bar = tag("div", [_part(key, name, s / total, s) for key, name, _, s in parts], cls="bar tall")
    rows = [
        tag("div", tag("i", cls=f"key {key}"), tag("b", name), tag("span", show_seconds(s), cls="num"),
            tag("span", f"{s / total:.1%}", cls="num"), tag("span", what, cls="muted"), cls="entry")
        for key, name, what, s in entries(cost)
    ]  # fmt: skip
    note = f"One optimizer step takes {show_seconds(cost.step_seconds)} on the slowest device."
    return section("ledger", "Where the time goes", note, bar, tag("div", rows, cls="entries"))


def _part(key: str, name: str, share: float, seconds: float) -> Markup:
    text = f"{name} {share:.0%}"
    label = text if share > CHARACTER * (len(text) + 3) else ""
    return tag(
        "span", label, cls=f"part {key}", style=f"width:{share * 100:.3f}%", title=f"{name}: {show_seconds(seconds)}"
    )


def binding(document: PlanDocument) -> Markup:
    """What keeps the plan from being faster, if anything is known to."""
    if not document.binding:
        return joined(None)
    return tag(
        "aside", tag("b", "What holds it back"), tag("ul", [tag("li", t) for t in document.binding]), cls="binding"
    )
