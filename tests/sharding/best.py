"""The cheapest choices for a graph under a toy cost, elements worked on and moved by a device: an integer program."""

from __future__ import annotations

import math
import operator
from typing import Any

from ortools.math_opt.python import mathopt
from torch import fx

from autopar.ir.ops import operands
from autopar.sharding.call import output_shapes, tensors
from autopar.sharding.placement import Placement
from autopar.sharding.redistribute import grad_placement, moves, volume
from autopar.sharding.rule import strategies
from autopar.sharding.strategy import Strategy

WORK, MOVE = 1.0, 3.0  # moving an element costs three times as much as working on it


def best(graph: fx.Graph, degree: int, patterns: Any) -> dict[fx.Node, Strategy]:
    model = mathopt.Model()
    options = {n: strategies(n, degree, patterns) for n in graph.nodes}
    pick = {n: [model.add_binary_variable() for _ in s] for n, s in options.items()}
    cost = []
    for node, variables in pick.items():
        model.add_linear_constraint(sum(variables) == 1)
        for s, x in zip(options[node], variables, strict=True):
            cost.append(WORK * _work(node) / (1 if s.replicated else degree) * x)
        for i, source in enumerate(operands(node)):
            cost += _edge(model, node, i, source, options, pick, degree)
    model.minimize(sum(cost))
    params = mathopt.SolveParameters(relative_gap_tolerance=1e-3)
    result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=params)
    values = result.variable_values()
    return {n: max(zip(options[n], xs, strict=True), key=lambda sx: values[sx[1]])[0] for n, xs in pick.items()}


def _work(node: fx.Node) -> float:
    sizes = [math.prod(s) for o in (node, *operands(node)) for s in _shapes(o)]
    if node.op == "call_function" and any(w in str(node.target) for w in ("linear", "mm", "attention", "einsum")):
        return 10.0 * sum(sizes)
    return float(sum(sizes)) if node.op != "output" else 0.0


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [] if node.op == "output" else output_shapes(node)


def _edge(model: Any, node: fx.Node, i: int, source: fx.Node, options: Any, pick: Any, degree: int) -> list[Any]:
    if node.op == "call_function" and node.target is operator.getitem:
        starts = _group(options[source], pick[source], lambda s: s.outputs[node.args[1]])
    else:
        starts = _group(options[source], pick[source], lambda s: s.outputs[0])
    ends = _group(options[node], pick[node], lambda s: (s.inputs[i], s.replicated))
    size = math.prod(output_shapes(source)[0])
    flows = tensors(source.meta["val"])[0].is_floating_point()
    flow = {(p, e): model.add_variable(lb=0, ub=1) for p in starts for e in ends}
    for p, xs in starts.items():
        model.add_linear_constraint(sum(flow[p, e] for e in ends) == sum(xs))
    for e, xs in ends.items():
        model.add_linear_constraint(sum(flow[p, e] for p in starts) == sum(xs))
    made = []
    for (p, (q, replicated)), x in flow.items():
        price = _price(p, q, grad_placement(q, replicated) if flows else None, size, degree)
        if price is None or (node.target is operator.getitem and p != q):
            x.upper_bound = 0
        elif price:
            made.append(price * x)
    return made


def _price(p: Placement, q: Placement, grad: Placement | None, size: int, degree: int) -> float | None:
    move = moves(p, q, grad)
    return None if move is None else MOVE * (volume(move.forward, size, degree) + volume(move.backward, size, degree))


def _group(options: list[Strategy], variables: list[Any], by: Any) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for s, x in zip(options, variables, strict=True):
        found.setdefault(by(s), []).append(x)
    return found


def summary(choices: dict[fx.Node, Strategy]) -> dict[str, str]:
    """Where each parameter lives: name → placement."""
    return {
        n.meta["name"]: str(s.outputs[0])
        for n, s in choices.items()
        if n.op == "placeholder" and n.meta["kind"] == "parameter"
    }
