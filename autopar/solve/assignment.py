"""Which strategy every node of a folded program has along one axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from autopar.cost.values import Value, reads, tensors, value
from autopar.ir.program import Program
from autopar.plan.plan import Choice
from autopar.sharding.placement import Placement, R, parse
from autopar.sharding.strategy import Strategy

Key = tuple[str, str]
"""(graph name, node name)."""


@dataclass(frozen=True)
class Assignment:
    """A strategy for every operator and placeholder of every graph, along an axis of ``degree`` devices.

    ``objective`` and ``bound``: seconds of communication and compute of one micro-batch as the ILP counts them.
    """

    degree: int
    strategies: Mapping[Key, Strategy] = field(hash=False)
    objective: float = 0.0
    bound: float = 0.0
    integral: bool = True
    unsplit: tuple[str, ...] = ()

    def of(self, graph: str, node: fx.Node) -> Strategy:
        """The strategy of a node; everything replicated where nothing was assigned."""
        found = self.strategies.get((graph, node.name))
        if found is not None:
            return found
        return Strategy((R,) * len(reads(node)), (R,) * max(1, len(tensors(node))))

    def placement(self, program: Program, graph: str, v: Value) -> Placement:
        """Where a value lives: a block call's outputs live where the block's own graph leaves them."""
        node, i = v
        if node.op == "call_module":
            body = str(node.target)
            return self.placement(program, body, results(program.blocks[body])[i])
        if graph == "program" and node.op == "placeholder":
            return self.parameter(program, node)
        outputs = self.of(graph, node).outputs
        return outputs[i] if i < len(outputs) else R

    def parameter(self, program: Program, node: fx.Node) -> Placement:
        """Where an outer placeholder lives: one that only blocks read lives as they want it."""
        found = self.strategies.get(("program", node.name))
        if found is not None:
            return found.outputs[0]
        for user in node.users:
            if user.op == "call_module":
                place = placeholders(program.blocks[str(user.target)])[user.args.index(node)]
                return self.of(str(user.target), place).outputs[0]
        return R

    def choices(self, program: Program) -> dict[str, dict[str, Choice]]:
        """The plan's form: one `Choice` for every node of every graph."""
        return {name: {n.name: self.choice(program, name, n) for n in g.nodes if n.op != "output"}
                for name, g in program.graphs()}  # fmt: skip

    def choice(self, program: Program, graph: str, node: fx.Node) -> Choice:
        if node.op == "call_module":
            body = program.blocks[str(node.target)]
            given = [self.of(str(node.target), p).outputs[0] for p in placeholders(body)]
            made = [self.placement(program, graph, (node, i)) for i in range(len(tensors(node)))]
            return Choice(inputs=tuple(map(str, given)), outputs=tuple(map(str, made)))
        if value(node)[0] is not node:
            placed = str(self.placement(program, graph, value(node)))
            return Choice(inputs=(placed,), outputs=(placed,))
        if graph == "program" and node.op == "placeholder":
            return Choice(inputs=(), outputs=(str(self.parameter(program, node)),))
        s = self.of(graph, node)
        return Choice(inputs=tuple(map(str, s.inputs)), outputs=tuple(map(str, s.outputs)), special=s.special)

    def placements(self, program: Program) -> dict[str, str]:
        """Parameter name → ``S(0)@tp`` or ``R``."""
        found = {}
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.meta["kind"] == "parameter":
                placed = self.parameter(program, node)
                found[str(node.meta["name"])] = f"{placed}@tp" if placed.sharded else str(placed)
        return found


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def results(graph: fx.Graph) -> list[Value]:
    """The values a graph returns."""
    return reads(graph.output_node())


def replicated() -> Assignment:
    """Everything whole: the only assignment on an axis of one device."""
    return Assignment(1, {})


def from_choices(degree: int, choices: Mapping[str, Mapping[str, Choice]]) -> Assignment:
    """The inverse of `Assignment.choices`."""
    found = {
        (graph, node): Strategy(tuple(map(parse, c.inputs)), tuple(map(parse, c.outputs)), c.special)
        for graph, nodes in choices.items()
        for node, c in nodes.items()
    }
    return Assignment(degree, found)
