"""A block whose plan keeps some tensors and makes others again: which operators form a part, and the part as a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from autopar.errors import PlanError
from autopar.ir.ops import operands
from autopar.lower.code import Names, Writer, indent, wish
from autopar.lower.localize import draws
from autopar.plan.plan import Selected
from autopar.sharding.placement import R

if TYPE_CHECKING:
    from autopar.lower.blockcode import BlockWriter


@dataclass(frozen=True)
class Part:
    """Operators that run again together. ``given``: values from outside; ``results``: values read outside."""

    nodes: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    random: bool


def schedule(graph: fx.Graph, again: set[str]) -> list[fx.Node | Part]:
    """The graph's operators in their order, neighbours of ``again`` gathered into parts.

    Nothing is moved: where several gradients add up, autograd adds them in the order of the operators that read a value,
    and another order would round otherwise.
    """
    chosen = replayed(graph, again)
    found: list[fx.Node | Part] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node not in chosen:
            found.append(node)
        elif found and isinstance(found[-1], list):
            found[-1].append(node)
        else:
            found.append([node])  # type: ignore[arg-type]
    return [gathered(item) if isinstance(item, list) else item for item in found]


def gathered(nodes: list[fx.Node]) -> Part:
    inside = set(nodes)
    given = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside)
    results = [n for n in nodes if any(u not in inside for u in n.users) and not splits(n)]
    return Part(tuple(nodes), tuple(given), tuple(results), any(map(random, nodes)))


def splits(node: fx.Node) -> bool:
    """Whether a node's value is several tensors, each read by a getitem."""
    return isinstance(node.meta.get("val"), (tuple, list)) and "getitem" not in str(node.target)


def random(node: fx.Node) -> bool:
    return bool(node.meta.get("split_rng")) or draws(node)


def replayed(graph: fx.Graph, again: set[str]) -> set[fx.Node]:
    """The nodes of ``again``, and views that lie between them or that only they read."""
    known = {n: label(n) for n in graph.nodes if n.op == "call_function"}
    missing = again - set(known.values())
    if missing:
        raise PlanError(f"the plan was made for another program: it recomputes {min(missing)}, which is not there")
    found = {n for n, name in known.items() if name in again}
    for node in graph.nodes:  # pieces of what runs again
        if node in known and free(node) and any(s in found for s in operands(node)[:1]):
            found.add(node)
    for node in reversed(graph.nodes):  # views that only they read
        piece = "getitem" in str(node.target)  # goes with what it is a piece of
        if node in known and free(node) and not piece and node.users and all(u in found for u in node.users):
            found.add(node)
    return found


def label(node: fx.Node) -> str:
    """The plan's name of a step: an operator's own, or for a collective the value and where it is brought, ``x>R``."""
    if "move" in node.meta:
        return f"{node.meta['old'].name}>{node.meta['places'][0]}"
    return node.meta["old"].name if "strategy" in node.meta or "getitem" in str(node.target) else ""


def free(node: fx.Node) -> bool:
    """Whether a node's result is its operand's memory: views, parts of a tuple, moves without communication."""
    if "getitem" in str(node.target):
        return True
    if "move" in node.meta:
        source, target = node.meta["move"].split(" → ")
        return source == target or source == str(R)
    schema = getattr(node.target, "_schema", None)
    return isinstance(node.target, torch._ops.OpOverload) and any(r.alias_info is not None for r in schema.returns)


class PartsWriter:
    """The method of a block under one selection, and the methods of its parts."""

    def __init__(self, owner: BlockWriter, mode: str, selected: Selected) -> None:
        self.owner, self.mode, self.selected = owner, mode, selected
        self.methods: list[str] = []

    def source(self) -> list[str]:
        """The lines of ``def {mode}`` and of the parts it runs."""
        names, given = self.owner.names()
        nodes = list(self.owner.local.graph.nodes)
        first = next(names.of[n] for n in nodes if n.op == "placeholder" and "." not in names.of[n])
        names.used.add("again")
        writer = Writer(names, f"{first}.device")
        segment: list[fx.Node] = []
        for item in schedule(self.owner.local.graph, set(self.selected.again)):
            if isinstance(item, fx.Node):
                segment.append(item)
                continue
            if segment:
                writer.write(segment)
            segment = []
            self.call(item, names, writer)
        if segment:
            writer.write(segment)
        results = nodes[-1].args[0]
        writer.result(results, single=len(results) == 1)
        self.owner.owner.bodies.append(writer.body)
        lines = ["with Again() as again:", *(f"    {line}" if line else "" for line in writer.body.lines)]
        if any("device=device" in line for line in lines):
            lines.insert(0, f"device = {first}.device")
        head = [f"    def {self.mode}(self, {', '.join(given)}):", f'        """{self.about()}"""']
        return ["", *head, indent(lines, 8), *self.methods]

    def about(self) -> str:
        count = len(self.selected.again)
        kinds = ", ".join(self.selected.groups)
        return f"The same, {count} operator{'s' * (count != 1)} of it again in the backward pass: {kinds}."

    def call(self, part: Part, names: Names, writer: Writer) -> None:
        """A part as a method, and the line that runs it."""
        own = Names()
        own.used.add("again")
        passed = [n for n in part.given if "." not in names.of.get(n, "") and "(" not in names.of.get(n, "")]
        for node in part.given:
            if node in passed:
                own.give(node, node.name)
            else:
                own.of[node] = names.of[node]
        device = f"{own.of[passed[0]]}.device"
        inner = Writer(own, device)
        body = inner.write(list(part.nodes))
        inner.result(part.results, single=False)
        if any("device=device" in line for line in body.lines):
            body.lines.insert(0, f"device = {device}")
        self.owner.owner.bodies.append(body)
        method = self.owner.method(self.title(part))
        given = ", ".join(writer.expression(n) for n in passed)
        results = [names.give(n, wish(n)) for n in part.results]
        random = ", random=True" if part.random else ""
        writer.body.lines.append(
            f"{', '.join(results)}{',' * (len(results) == 1)} = again.part(self.{method}, {given}{random})"
        )
        self.methods += ["", f"    def {method}(self, {', '.join(own.of[n] for n in passed)}):", indent(body.lines, 8)]

    def title(self, part: Part) -> str:
        """``{module}_again``, after the module that most of a part's operators belong to."""
        paths = [str(n.meta.get("path", "")).split(".")[-1] for n in part.nodes]
        named = [p for p in paths if p]
        return f"{max(named, key=named.count) if named else 'part'}_again"
