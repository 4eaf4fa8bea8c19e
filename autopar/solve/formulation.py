"""The ILP over node strategies and edge redistributions, for one degree of one axis and one micro-batch.

    x[n, s]      node n takes strategy s                                                    Σ_s x[n, s] = 1             (1)
    t[e, r, p, w] reader r of edge e gets the value, made as p, in the way w it wants it    Σ_w t = Σ_{s makes p} x     (2)
                                                                                            Σ_p t = Σ_{s wants w} x     (3)
    y[e, p, w]   the move p → w of edge e is made, once for all readers of the edge         y ≥ t[e, r, p, w]           (4)

    minimize  Σ_n weight · seconds(n, s) · x[n, s]  +  Σ_e weight · seconds(p → w, forward and backward) · y[e, p, w]   (5)

A block's nodes stand once, weighted by its instances; what an instance hands to the next ties the block's outputs to its own
placeholders, so the chain agrees by itself. An edge with one reader needs no y: (5) then charges t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import fx

from autopar.cost import collective, compute, context
from autopar.cost.operators import kept_by
from autopar.cost.regions import Prices
from autopar.cost.values import Value, local_numel, reads, tensor, tensors
from autopar.errors import PlanError
from autopar.ir.program import Program
from autopar.sharding.placement import Placement
from autopar.sharding.redistribute import moves
from autopar.sharding.strategy import Strategy
from autopar.solve.assignment import Assignment, Key
from autopar.solve.linear import Linear, minimize, run
from autopar.solve.options import Choices, Edge, Item, Want, choices, wanted

HELD = 2e-14
"""Seconds charged for one byte that is held (saved activations, parameter state): 0.02 ms a GB. It only decides between
strategies that take equally long; nothing of it is in a plan's cost."""
STEP_SHARE = 1 / 16
"""What happens once a step (gradients of whole parameters, the optimizer's traffic) counts as one of so many micro-batches
in the ILP, which does not know their number; the plan's cost counts it exactly."""
SPARE = 1e-10
"""Seconds charged for a byte of parameters where they are to be split wherever they can be: more than any split costs."""
STATE_PASSES = 7  # AdamW reads the parameter, gradient and two moments, and writes all but the gradient


class Formulation:
    """Variables and rows of the ILP; the numbers in comments are those of the module's equations."""

    def __init__(self, program: Program, found: Choices, degree: int, prices: Prices, spare: bool = False) -> None:
        self.program, self.found, self.degree, self.prices, self.spare = program, found, degree, prices, spare
        self.linear = Linear()
        self.x: dict[Key, list[int]] = {}
        self.costs: dict[tuple, float | None] = {}
        for item in found.items.values():
            self.node(item)
        for edge in found.edges:
            self.edge(edge)

    def node(self, item: Item) -> None:
        """(1), and the node's part of (5)."""
        seconds = [self.node_cost(item, s) for s in item.options]
        columns = [self.linear.variable(item.weight * c, integer=True) for c in seconds]
        self.x[item.key] = columns
        self.linear.constraint([(c, 1.0) for c in columns], 1.0, 1.0)

    def node_cost(self, item: Item, s: Strategy) -> float:
        node, p = item.node, self.prices
        if node.op == "placeholder":
            return self.held_cost(node, s.outputs[0])
        if node.op != "call_function":
            return 0.0
        took = compute.node_seconds(node, s.inputs, s.outputs, self.degree, p.precision, p.device).total
        return took + self.exchanged(node, s) + HELD * self.saved(node, s)

    def exchanged(self, node: fx.Node, s: Strategy) -> float:
        """Seconds that a node's exchanges over cp show."""
        p = self.prices
        if not context.over_cp(node):
            return 0.0
        size = p.precision.itemsize
        sizes = [
            local_numel(v, q, self.degree) * size(tensor(v).dtype) for v, q in zip(reads(node), s.inputs, strict=True)
        ]
        result = local_numel((node, 0), s.outputs[0], self.degree) * size(tensors(node)[0].dtype)
        took = compute.node_seconds(node, s.inputs, s.outputs, self.degree, p.precision, p.device)
        return sum(context.talk(node, sizes, result, p.context, (took.forward, took.backward), p.device))

    def saved(self, node: fx.Node, s: Strategy) -> float:
        kept, size = kept_by(node), self.prices.precision.itemsize
        given = reads(node)
        total = sum(
            local_numel(given[i], s.inputs[i], self.degree) * size(tensor(given[i]).dtype) for i in kept.operands
        )
        return total + sum(
            local_numel((node, i), s.outputs[i], self.degree) * size(tensors(node)[i].dtype) for i in kept.outputs
        )

    def held_cost(self, node: fx.Node, placed: Placement) -> float:
        """A parameter's share of what happens once a step, and the bytes it holds."""
        if node.meta["kind"] != "parameter":
            return 0.0
        count = local_numel((node, 0), placed, self.degree)
        held = count * self.prices.precision.master.itemsize
        if self.spare:
            return SPARE * held
        if not node.meta.get("requires_grad"):
            return HELD * held
        return 4 * HELD * held + STEP_SHARE * STATE_PASSES * held / self.prices.device.bandwidth

    def edge(self, edge: Edge) -> None:
        """(2), (3) and (4), and the edge's part of (5)."""
        makes = self.grouped(edge.producer, lambda s: s.outputs[edge.output])
        shared = len(edge.readers) > 1
        paid: dict[tuple[Placement, Want], int] = {}
        for reader in edge.readers:
            item = self.found.items[reader.item]
            wants = self.grouped(reader.item, lambda s: wanted(item, s, reader.position, edge.gradient))  # noqa: B023
            flow = {}
            for p in makes:
                for w in wants:
                    cost = self.move_cost(edge, p, w)
                    if cost is not None:
                        flow[p, w] = self.linear.variable(0.0 if shared else edge.weight * cost)
                        if shared and cost > 0:
                            self.pay(edge, paid, p, w, cost, flow[p, w])
            for p, columns in makes.items():
                self.tie([c for (a, _), c in flow.items() if a == p], columns)
            for w, columns in wants.items():
                self.tie([c for (_, b), c in flow.items() if b == w], columns)

    def pay(self, edge: Edge, paid: dict, p: Placement, w: Want, cost: float, flow: int) -> None:
        """(4): one payment for all readers that want the same."""
        if (p, w) not in paid:
            paid[p, w] = self.linear.variable(edge.weight * cost)
        self.linear.constraint([(paid[p, w], 1.0), (flow, -1.0)], 0.0, float("inf"))

    def tie(self, flows: list[int], columns: list[int]) -> None:
        self.linear.constraint([(c, 1.0) for c in flows] + [(c, -1.0) for c in columns], 0.0, 0.0)

    def grouped(self, key: Key, by: Callable) -> dict:
        """The columns of a node's options by what they make or want."""
        found: dict = {}
        for s, column in zip(self.found.items[key].options, self.x[key], strict=True):
            found.setdefault(by(s), []).append(column)
        return found

    def move_cost(self, edge: Edge, p: Placement, w: Want) -> float | None:
        at = (edge.value, p, w, edge.once)
        if at not in self.costs:
            self.costs[at] = move_seconds(edge.value, p, w, self.prices, edge.once)
        return self.costs[at]

    def solve(self, seconds: float) -> Assignment:
        """The best assignment. Raises `PlanError` if none was found in time."""
        done = minimize(self.linear, seconds)
        chosen = {}
        for key, columns in self.x.items():
            item = self.found.items[key]
            best = max(range(len(columns)), key=lambda i: done.values[columns[i]])  # noqa: B023
            if item.node.op != "output":
                chosen[key] = item.options[best]
        return Assignment(self.degree, chosen, done.objective, done.bound, done.relaxed, tuple(self.found.unsplit))

    def held(self, key: Key, option: Strategy, seconds: float) -> float | None:
        """The objective of the relaxation with one node's strategy held fast; None where nothing goes with it."""
        columns = self.x[key]
        chosen = columns[self.found.items[key].options.index(option)]
        problem = replace(self.linear, **{k: list(v) for k, v in vars(self.linear).items()})
        problem.constraint([(chosen, 1.0)], 1.0, 1.0)
        try:
            return run(problem, seconds, relax=True).objective
        except PlanError:
            return None


def move_seconds(v: Value, p: Placement, w: Want, prices: Prices, once: bool = False) -> float | None:
    """Seconds of an edge's two moves in one micro-batch; None if it is not possible."""
    found = moves(p, w[0], w[1])
    if found is None:
        return None
    size = tensor(v).numel() * prices.precision.itemsize(tensor(v).dtype)
    forward = collective.seconds(found.forward, size, prices.link)
    backward = collective.seconds(found.backward, size, prices.link)
    return forward + backward * (STEP_SHARE if once and found.forward == "none" else 1.0)


def assign(
    program: Program, degree: int, prices: Prices, sequence: bool | None = None, seconds: float = 30, spare: bool = False,
    pinned: Mapping[str, str] | None = None,
) -> Assignment:  # fmt: skip
    """The fastest assignment of a static program along an axis of ``degree`` devices.

    ``spare``: parameters are split wherever they can be, whatever else would be faster. ``sequence``, ``pinned``:
    see `choices`.
    """
    return Formulation(program, choices(program, degree, sequence, pinned), degree, prices, spare).solve(seconds)
