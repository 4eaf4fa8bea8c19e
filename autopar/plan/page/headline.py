"""The top of the page: what is planned, on what, and what it comes to."""

from __future__ import annotations

from autopar.plan.page.html import Child, Markup, tag
from autopar.plan.plan import Plan, PlanDocument, counted
from autopar.plan.text import zero_of
from autopar.spec.quantity import show_bytes, show_seconds

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def headline(document: PlanDocument) -> Markup:
    """Title, the decision as chips, and the numbers that matter."""
    title = document.title or "Plan"
    return tag(
        "header",
        tag("p", "autopar · parallel training plan", cls="brand"),
        tag("h1", title, tag("span", f" on {document.cluster}", cls="on") if document.cluster else None),
        tag("p", _sentence(document), cls="lead"),
        tag("ul", [tag("li", chip) for chip in chips(document.plan)], cls="chips"),
        tag("div", [_tile(*tile) for tile in tiles(document)], cls="tiles"),
    )


def _sentence(document: PlanDocument) -> str:
    model, mesh = document.model, document.plan.mesh
    frozen = model.parameters != model.trainable_parameters
    trained = f", {short(model.trainable_parameters)} of them trained" if frozen else ""
    devices = f"{mesh.devices:,} device{'s' * (mesh.devices > 1)}"
    return f"{short(model.parameters)} parameters{trained} · {devices}"


def chips(plan: Plan) -> list[Child]:
    """Mesh, ZeRO, schedule and batch in a few words each."""
    mesh = [f"{axis} {degree}" for axis, degree in plan.mesh.degrees.items()]
    virtual = f" × {plan.virtual_stages} virtual stages" if plan.virtual_stages > 1 else ""
    again = counted(kind for s in plan.stages for kind in s.recompute)
    return [
        [tag("b", "mesh"), " · ".join(mesh)],
        [tag("b", "ZeRO"), zero_of(plan).removeprefix("ZeRO ")],
        [tag("b", "schedule"), plan.schedule + virtual],
        [tag("b", "batch"), f"{plan.microbatches} × {plan.microbatch} sequences a replica"],
        [tag("b", "recompute"), " and ".join(again) or "none"],
        *([[tag("b", "activations"), "split over the sequence"]] if plan.sequence_parallel else []),
    ]


def tiles(document: PlanDocument) -> list[tuple[str, str, str]]:
    """(what, its value, a remark)."""
    cost, search = document.cost, document.search
    limit = document.memory_limit
    room = f"{cost.peak_bytes / limit:.0%} of {show_bytes(limit)}" if limit else "on the fullest device"
    return [
        ("Step time", show_seconds(cost.step_seconds), f"at least {show_seconds(search.bound)} by proof"),
        ("Throughput", f"{cost.tokens_per_second:,.0f}", "tokens a second, all devices"),
        ("MFU", f"{cost.mfu:.1%}", f"{document.model.flops_per_token / 1e9:,.2f} GFLOPs a token"),
        ("Peak memory", show_bytes(cost.peak_bytes), room),
    ]


def _tile(what: str, value: str, remark: str) -> Markup:
    return tag(
        "div", tag("span", what, cls="what"), tag("strong", value), tag("span", remark, cls="remark"), cls="tile"
    )


def short(count: int) -> str:
    """``70.6 B`` for 70,553,706,496."""
    for factor, unit in UNITS:
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return str(count)
