"""Which values are split over cp: the ILP of `formulation` on options that split sequences alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from autopar.cost.regions import Prices
from autopar.cost.values import dims, is_view, reads, tensor, tensors, value
from autopar.errors import PlanError
from autopar.ir.program import OUTER, Program
from autopar.sharding import context
from autopar.sharding.part import batch_of, check
from autopar.sharding.patterns import collect_patterns
from autopar.sharding.placement import Placement, R
from autopar.sharding.strategy import Strategy
from autopar.solve.assignment import Assignment, Key
from autopar.solve.formulation import Formulation
from autopar.solve.options import Choices, Item, Reader, add_edges, owned, wants

WHOLE = 1e-9
"""Seconds charged for a byte of what grows with the sequence and is whole on every device: more than any move of it takes."""


def assign_context(program: Program, degree: int, kind: str, prices: Prices, seconds: float) -> Assignment:
    """Where every value of a static program lives along cp. ``prices``: of which the link is cp's.

    Raises `PlanError` where sequences cannot be split through the model.
    """
    found, natures = context_choices(program, degree, kind)
    made = ContextFormulation(program, found, degree, prices, natures).solve(seconds)
    check(program, made.strategies, degree)
    drawn(program, made)
    return made


def context_choices(program: Program, degree: int, kind: str) -> tuple[Choices, dict[str, context.Nature]]:
    """Items and edges along cp; gradients of parameters move nowhere."""
    found, counts, batch = Choices(), {}, batch_of(program)
    for call in program.calls():
        counts[str(call.target)] = counts.get(str(call.target), 0) + 1
    natures = {name: context.nature(name, graph) for name, graph in program.graphs()}
    for name, graph in program.graphs():
        patterns, weight = collect_patterns(graph), 1 if name == OUTER else counts.get(name, 0)
        for node in graph.nodes:
            key = (name, node.name)
            if node.op == "call_function" and value(node)[0] is node and tensors(node):
                made = context.options(node, degree, kind, natures[name], batch, patterns)
                found.items[key] = Item(key, node, made, weight)
            elif node.op == "placeholder" and not (name == OUTER and owned(node)):
                found.items[key] = Item(key, node, [], weight)
        if name == OUTER:
            out = graph.output_node()
            found.items[name, out.name] = Item((name, out.name), out, [Strategy((R,) * 2, ())], 1)
    add_edges(program, found, counts)
    readers: dict[Key, list[Reader]] = {}
    for edge in found.edges:
        readers.setdefault(edge.producer, []).extend(edge.readers)
        if found.items[edge.producer].node in natures[edge.producer[0]].weights:
            edge.gradient = False
    pending = [i for i in found.items.values() if i.node.op == "placeholder"]
    for item in sorted(pending, key=lambda i: i.key[0] == OUTER):
        item.options = [Strategy((), (p,)) for p in homes(item, found, readers.get(item.key, []), natures, batch)]
    return found, natures


def homes(
    item: Item, found: Choices, readers: list[Reader], natures: Mapping[str, context.Nature], batch: int
) -> list[Placement]:
    """Where a placeholder may live: whole; what blocks are handed in, also as one of its readers wants it."""
    options = {R: None}
    if item.node not in natures[item.key[0]].whole:
        options |= {p: None for r in readers for p in wants(found, r) if p.sharded}
    return [p for p in options if context.splittable(item.node, p, batch)]


class ContextFormulation(Formulation):
    """The ILP's equations, with a price on whatever grows with the sequence and is not split."""

    def __init__(
        self,
        program: Program,
        found: Choices,
        degree: int,
        prices: Prices,
        natures: Mapping[str, context.Nature],
    ) -> None:
        self.natures = natures
        super().__init__(program, found, degree, prices)

    def node_cost(self, item: Item, s: Strategy) -> float:
        node, (name, _) = item.node, item.key
        if node in self.natures[name].whole or node.op == "output":
            return 0.0
        made = [] if is_view(node) else [((node, i), p) for i, p in enumerate(s.outputs)]
        given = [(v, p) for v, p in zip(reads(node), s.inputs, strict=False) if v[0] not in self.natures[name].whole]
        whole = sum(
            tensor(v).numel() * tensor(v).element_size()
            for v, p in (*made, *given)
            if not p.sharded and any("sequence" in d for d in dims(v))
        )
        computing = super().node_cost(item, s) if node.op == "call_function" and not s.special else 0.0
        return computing + WHOLE * whole


def drawn(program: Program, made: Assignment) -> None:
    """Raise `PlanError` where random numbers are drawn for a value that is whole along cp: devices draw their own."""
    for name, graph in program.graphs():
        for node in graph.nodes:
            if draws(node) and made.of(name, node).replicated:
                raise PlanError(
                    f"cp={made.degree}: {name}.{node.name} draws random numbers for values that cannot be split over the "
                    "sequence; without dropout there, or with cp=1, it would be right"
                )


def draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers as it is called here."""
    if node.op != "call_function":
        return False
    if "dropout" in str(node.target):
        return bool(node.args[1] if len(node.args) > 1 else 0.5) and node.args[2:3] != (False,)
    if node.target is context.SDPA:
        return bool(node.kwargs.get("dropout_p") or (len(node.args) > 4 and node.args[4]))
    return any("nondeterministic_seeded" in str(t) for t in getattr(node.target, "tags", ()))
