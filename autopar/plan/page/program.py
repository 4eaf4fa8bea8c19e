"""The annotated program: every node with its placements, its moves and its seconds; a block once, with its count."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import groupby

from autopar.plan.edges import Edge
from autopar.plan.names import starred
from autopar.plan.page.html import Child, Markup, section, tag
from autopar.plan.page.source import Graph, Line, graphs
from autopar.plan.plan import PlanDocument
from autopar.spec.quantity import show_seconds

STORED = ("parameter", "buffer", "constant", "placeholder")
MANY = 8  # so many runs of alike calls are named, more are counted
FOLDED = 6  # so many parameters or calls in a row are folded into one line


@dataclass
class Shown:
    """A graph being written: its lines by name, the seconds of the longest, whether seconds are known, moves so far."""

    made: dict[str, Line]
    most: float
    priced: bool
    paid: dict[Hashable, str] = field(default_factory=dict)


def program(document: PlanDocument, text: str | None) -> Markup:
    found = graphs(document, text)
    if not found:
        return section("program", "Program", "The plan holds no node's placement: nothing is split.")
    priced = bool(document.nodes)
    note = (
        f"Every node once, for one micro-batch{'' if not priced else ', with its seconds forward and backward on one device'}. "
        "Badges are placements along tp: R whole on every device, S(d) split along dim d, P a partial sum."
    )
    tools = tag(
        "div",
        finder("program", "find a node, an operator, a placement"),
        tag("button", "fold all", type="button", data_fold="program"),
        cls="tools",
    )
    return section("program", "Program", note, tools, [_graph(graph, priced) for graph in found])


def finder(anchor: str, hint: str) -> Markup:
    """A field that hides what does not have its words, in the section ``anchor``."""
    return tag("input", type="search", placeholder=hint, data_filter=anchor, aria_label=hint)


def _graph(graph: Graph, priced: bool) -> Markup:
    times = f" × {graph.count}" if graph.name != "program" and graph.count else ""
    took = sum(line.seconds for line in graph.lines)
    about = f"{len(graph.lines)} nodes" + (
        f", {show_seconds(took)} of compute" + (" each" if times else "") if took else ""
    )
    shown = Shown(
        {line.name: line for line in graph.lines}, max((line.seconds for line in graph.lines), default=0.0), priced
    )
    rows: list[Child] = []
    for kind, run in groupby(graph.lines, key=_fold_key):
        lines = list(run)
        folded = kind and len(lines) >= FOLDED
        alike = _families(lines) if folded and kind == "stored" else {i: [line] for i, line in enumerate(lines)}
        body = [_line(group[0], shown, len(group)) for group in alike.values()]
        rows.append(_folded(kind, lines, body) if folded else body)
    if graph.returns:
        rows.append(tag("div", tag("code", graph.returns), cls="node returns"))
    head = tag("summary", tag("b", graph.name), tag("span", times, cls="times"), tag("span", about, cls="muted"))
    return tag("details", head, tag("div", rows, cls="nodes"), open=True, cls="graph", data_graph=graph.name)


def _fold_key(line: Line) -> str:
    if line.kind in STORED:
        return "stored"
    return "calls" if line.kind in ("call", "item") else ""


def _families(lines: list[Line]) -> dict[Hashable, list[Line]]:
    """Parameters whose names differ in a number alone, of one type and placement."""
    found: dict[Hashable, list[Line]] = {}
    for line in lines:
        found.setdefault((starred(line.code or line.name), line.type, line.choice), []).append(line)
    return found


def _folded(kind: str, lines: list[Line], body: list[Markup]) -> Markup:
    if kind == "calls":
        names = [line.code.split("(", 1)[0] for line in lines if line.kind == "call"]
        runs = [f"{len(list(run))} × {name}" for name, run in groupby(names)]
        text = f"calls of blocks: {', '.join(runs) if len(runs) <= MANY else len(names)}"
    else:
        kinds = [line.kind for line in lines]
        text = ", ".join(f"{kinds.count(k)} {k}{'s' * (kinds.count(k) > 1)}" for k in STORED if k in kinds)
    return tag("details", tag("summary", text), body, cls=f"run {kind}")


def _line(line: Line, graph: Shown, count: int = 1) -> Markup:
    name, code = line.name, _spared(line, graph.made)
    if count > 1:
        name, code = starred(name), starred(code)
    times = tag("span", f" × {count}", cls="times") if count > 1 else None
    left = tag("code", tag("span", f"%{name}", cls="name"), [" = ", _code(code)] if code else None, times)
    moved = [_move(edge, line, graph.paid) for edge in line.edges if edge.moves] if line.kind != "item" else None
    placed = line.choice
    badges = [badge(p) for p in placed.outputs] if placed else None
    special = tag("span", placed.special, cls="special") if placed and placed.special else None
    cells = [
        tag("div", left, moved, cls="what"),
        tag("div", line.type, cls="type"),
        tag("div", badges, special, cls="badges", title=strategy(line)),
    ]
    if graph.priced:
        cells.append(tag("div", _took(line, graph.most), cls="took"))
    return tag("div", cells, cls=f"node {line.kind}", data_node=line.name)


def _spared(line: Line, made: dict[str, Line]) -> str:
    """A node's right-hand side; a block's call without the parameters it is given."""
    if line.kind != "call":
        return line.code
    given = [r.node for r in line.reads]
    shown = [f"%{n}" for n in given if n not in made or made[n].kind != "parameter"]
    rest = len(given) - len(shown)
    return f"{line.code.split('(', 1)[0]}({', '.join(shown)}{f', … {rest} parameters' if rest else ''})"


def strategy(line: Line) -> str | None:
    """``R,S(0) -> S(2)``: the whole strategy of a node."""
    if line.choice is None:
        return None
    outputs = ", ".join(line.choice.outputs)
    return f"{', '.join(line.choice.inputs)} → {outputs}" if line.choice.inputs else outputs


def badge(placement: str) -> Markup:
    kind = placement[:1]
    return tag("span", placement, cls=f"badge {kind if kind in 'RSP' else 'other'}")


def _code(code: str) -> Child:
    """The operator stands out from its arguments."""
    cut = min((i for i in (code.find("("), code.find(" ")) if i >= 0), default=len(code))
    return [tag("span", code[:cut], cls="op"), tag("span", code[cut:], cls="args")]


def _move(edge: Edge, line: Line, paid: dict[Hashable, str]) -> Markup:
    """What an operand goes through before the node reads it; a move that several readers share is charged to the first."""
    first = paid.setdefault(edge.key, line.name)
    how = edge.how() if first == line.name else f"shared with %{first}"
    places = [badge(edge.made), " → ", badge(edge.wanted)] if edge.made != edge.wanted else badge(edge.made)
    return tag("div", f"↳ %{edge.read.node} ", places, tag("span", f" {how}", cls="muted"), cls="move")


def _took(line: Line, most: float) -> Child:
    if not line.facts or not line.seconds:
        return None
    width = f"width:{line.seconds / most * 100:.1f}%"
    parts = (line.facts.forward, line.facts.backward)
    times = " + ".join(show_seconds(s) for s in parts if s)
    return [tag("span", times), tag("i", style=width)]
