"""The mesh drawn with its axes: a cell is a device, a row a pipeline rank, a panel a data-parallel replica."""

from __future__ import annotations

from autopar.plan.page.html import Child, Markup, section, tag
from autopar.plan.page.memory import blocks_of
from autopar.plan.plan import MeshShape, Plan, PlanDocument
from autopar.plan.text import groups_of

CELLS = 512  # so many devices are drawn at most, in whole replicas; of a larger replica the edges
ROWS, COLUMNS = 24, 32  # of a replica, before its middle is left out


def mesh(document: PlanDocument) -> Markup:
    plan = document.plan
    shape = plan.mesh
    shown = replicas_shown(shape)
    panels = [_replica(plan, d) for d in range(shown)]
    more = None
    if shown < shape.dp:
        more = tag("div", tag("b", f"× {shape.dp:,}"), tag("span", f"replicas; {shown} drawn"), cls="more")
    axes = tag("dl", [[tag("dt", tag("b", a), f" {n}"), tag("dd", what)] for a, n, what in axes_of(plan)], cls="axes")
    count = f"{shape.devices:,} device{'s' * (shape.devices > 1)}"
    note = f"{count}: the number in a cell is the device's rank, its colour the pipeline rank."
    told = [*groups_of(plan), *(f"not used: {text}" for text in document.unused)]
    where = tag("ul", [tag("li", text) for text in told]) if told else None
    return section("mesh", "Mesh", note, axes, where, tag("div", panels, more, cls="replicas"))


def replicas_shown(shape: MeshShape) -> int:
    """As many replicas as are readable: all of a small mesh, one of a large one."""
    each = shape.pp * shape.cp * shape.tp
    return shape.dp if shape.devices <= CELLS and shape.dp <= 16 else max(1, min(4, shape.dp, CELLS // 4 // each))


def axes_of(plan: Plan) -> list[tuple[str, int, str]]:
    shape, zero = plan.mesh, plan.zero
    shards = {
        0: "each holds everything",
        1: "optimizer state is split over them",
        2: "optimizer state and gradients are split over them",
        3: "parameters, gradients and optimizer state are split over them",
    }
    stages = (
        f"{len(plan.stages)} stages, {plan.virtual_stages} on each rank"
        if plan.virtual_stages > 1
        else "one stage each"
    )
    sequence = "; between them activations are split over the sequence" if plan.sequence_parallel else ""
    hybrid = f"; divided among {shape.sharing} each, {shape.dp_replicate} times" if shape.dp_replicate > 1 else ""
    found = [
        ("pp", shape.pp, f"pipeline ranks, {stages}"),
        ("dp", shape.dp, f"replicas of the model; {shards[zero]} (ZeRO {zero}){hybrid}"),
        ("cp", shape.cp, "devices share one sequence"),
        ("tp", shape.tp, f"devices split every operator{sequence}"),
    ]
    return [(axis, n, what if n > 1 else "not used") for axis, n, what in found]


def rank_of(shape: MeshShape, p: int, d: int, c: int, t: int) -> int:
    """The device's number: pp is the outermost axis, tp the innermost."""
    return ((p * shape.dp + d) * shape.cp + c) * shape.tp + t


def _replica(plan: Plan, d: int) -> Markup:
    shape = plan.mesh
    width = shape.cp * shape.tp
    columns = _ends(width, COLUMNS)
    rows: list[Child] = []
    for p in _ends(shape.pp, ROWS):
        if p is None:
            rows.append(tag("div", f"⋮ {shape.pp - ROWS} more pipeline ranks", cls="gap"))
            continue
        cells = [_cell(shape, p, d, column) for column in columns]
        place = f" on {plan.stages[p].group} ({plan.stages[p].device})" if plan.hosts else ""
        name = tag("span", f"pp {p}", cls="pp", title=blocks_of(plan, p) + place)
        rows.append(tag("div", name, cells, cls="devices"))
    head = tag(
        "div", f"replica {d}" if shape.dp > 1 else "all devices", tag("span", _across(shape), cls="arrow"), cls="head"
    )
    return tag("div", head, rows, cls="replica", style=f"--digits:{len(str(shape.devices - 1))}")


def _across(shape: MeshShape) -> str:
    names = [f"{axis} {n}" for axis, n in (("cp", shape.cp), ("tp", shape.tp)) if n > 1]
    return f"{' × '.join(names)} →" if names else ""


def _cell(shape: MeshShape, p: int, d: int, column: int | None) -> Markup:
    if column is None:
        return tag("span", "…", cls="dots")
    c, t = divmod(column, shape.tp)
    rank = rank_of(shape, p, d, c, t)
    first = " group" if t == 0 and c > 0 else ""
    title = f"device {rank}: pp {p}, dp {d}, cp {c}, tp {t}"
    return tag("span", rank, cls=f"device{first}", style=f"--hue:{hue(p, shape.pp)}", title=title)


def hue(rank: int, ranks: int) -> int:
    """A colour of the wheel for a pipeline rank, from blue to magenta, apart even for many."""
    return 205 if ranks == 1 else 170 + round(170 * rank / (ranks - 1))


def _ends(count: int, most: int) -> list[int | None]:
    """0 … count-1, with None in place of the middle where there are more than ``most``."""
    if count <= most:
        return list(range(count))
    return [*range(most // 2), None, *range(count - most // 2, count)]
