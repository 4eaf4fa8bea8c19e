"""torch's joint graph of a model's forward and backward: what its partitioner keeps under a memory budget, as our problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config as config
from torch import fx, nn
from torch._functorch import partitioners
from torch._functorch.aot_autograd import aot_function
from torch.func import functional_call

from autopar.cost.saving import Saving, Step, Tensor

Cost = Callable[[fx.Node], float]


@dataclass(frozen=True)
class Choice:
    """What torch keeps and runs again. ``bytes`` of distinct storages, parameters and inputs left out."""

    again: frozenset[str]
    bytes: float


def cost_of(node: fx.Node) -> float:
    """FLOPs of a product; a thousandth of its elements for anything else, so that ties are not free."""
    value = node.meta.get("val")
    shapes = [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    packet = getattr(node.target, "overloadpacket", None)
    made = (
        value
        if isinstance(value, torch.Tensor)
        else next((v for v in value or () if isinstance(v, torch.Tensor)), None)
    )
    size = float(made.numel()) if made is not None else 0.0
    if packet in (torch.ops.aten.mm, torch.ops.aten.bmm):
        a, b = shapes[:2]
        return 2.0 * size * a.shape[-1]
    if packet is torch.ops.aten.addmm:
        return 2.0 * size * shapes[1].shape[-1]
    if "attention" in str(node.target):
        q, k, v = shapes[:3]
        return 2.0 * q.numel() / q.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    return 1e-3 * size


def exact(memory: list[float], runtimes: list[float], limit: float) -> tuple[float, list[int], list[int]]:
    """torch's ``ilp`` knapsack, which needs scipy, by OR-tools: the most seconds not run again within ``limit``."""
    from ortools.math_opt.python import mathopt

    model = mathopt.Model()
    keep = [model.add_binary_variable() for _ in memory]
    model.add_linear_constraint(sum(m * x for m, x in zip(memory, keep, strict=True)) <= limit)
    model.maximize(sum(r * x for r, x in zip(runtimes, keep, strict=True)))
    values = mathopt.solve(model, mathopt.SolverType.HIGHS).variable_values()
    kept = [i for i, x in enumerate(keep) if values[x] > 0.5]
    again = [i for i in range(len(keep)) if i not in set(kept)]
    return sum(runtimes[i] for i in kept), kept, again


def joint(module: nn.Module, example: torch.Tensor, budget: float, solver: str) -> tuple[fx.GraphModule, Choice]:
    """The joint graph, and what torch's knapsack ``solver`` (dp, ilp or greedy) chooses at ``budget`` (0 to 1)."""
    found: list[Any] = []

    def partition(graph: fx.GraphModule, inputs: Any, **more: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        copy = fx.GraphModule(graph, graph.graph)
        forward, backward = partitioners.min_cut_rematerialization_partition(graph, inputs, **more)
        found.append((copy, forward, backward))
        return forward, backward

    parameters = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    names = list(parameters)

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    options = config.patch(activation_memory_budget=budget, activation_memory_budget_solver=solver)
    with options, patch.object(partitioners, "ilp_knapsack", exact):
        made = aot_function(function, lambda g, _: g, lambda g, _: g, partition_fn=partition)
        made(example.requires_grad_(), *parameters.values())
    graph, forward, backward = found[0]
    return graph, chosen(graph, backward)


def chosen(graph: fx.GraphModule, backward: fx.GraphModule) -> Choice:
    ahead = {n.name for n in before(graph.graph) if step(n)}
    nodes = {n.name: n for n in graph.graph.nodes}
    again = frozenset(n.name for n in backward.graph.nodes if n.op == "call_function" and n.name in ahead)
    kept = {root(nodes[n.name]) for n in backward.graph.nodes if n.op == "placeholder" and n.name in nodes}
    held = {k for k in kept if k[0].op != "placeholder"}
    return Choice(again, sum(bytes_of(k) for k in held))


def before(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that do not depend on the gradient that comes in."""
    late: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and "tangents" in node.name or any(n in late for n in node.all_input_nodes):
            late.add(node)
    return [n for n in graph.nodes if n not in late and n.op in ("placeholder", "call_function")]


def step(node: fx.Node) -> bool:
    """Whether a node computes: no view, no piece of a tuple."""
    return node.op == "call_function" and "getitem" not in str(node.target) and not view(node)


def view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def root(node: fx.Node) -> tuple[fx.Node, int]:
    """Who made a value's memory, and which of its results."""
    while node.op == "call_function" and view(node):
        node = node.all_input_nodes[0]
    if node.op == "call_function" and "getitem" in str(node.target):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return (source, int(node.args[1])) if step(source) else root(source)  # type: ignore[call-overload]
    return node, 0


def bytes_of(key: tuple[fx.Node, int]) -> float:
    value = key[0].meta["val"]
    made = value if isinstance(value, torch.Tensor) else value[key[1]]
    return float(made.numel() * made.dtype.itemsize) if isinstance(made, torch.Tensor) else 0.0


def problem(graph: fx.GraphModule, cost: Cost = cost_of) -> Saving:
    """The joint graph as a problem of what to keep: everything the backward part reads of the forward part is wanted."""
    found, ahead = Saving(), before(graph.graph)
    inside, index, steps = set(ahead), {}, {}
    late = [n for n in graph.graph.nodes if n.op == "call_function" and n not in inside]
    wanted = {root(s) for n in late for s in n.all_input_nodes if s in inside}

    def tensor(key: tuple[fx.Node, int]) -> int:
        if key not in index:
            index[key] = len(found.tensors)
            name = f"{key[0].name}.{key[1]}"
            found.tensors.append(Tensor(name, bytes_of(key), steps[key[0]], key in wanted))
        return index[key]

    for node in filter(step, ahead):
        reads = dict.fromkeys(root(s) for s in node.all_input_nodes if root(s)[0].op != "placeholder")
        found.steps.append(Step(node.name, cost(node), tuple(tensor(k) for k in reads)))
        steps[node] = len(found.steps) - 1
    for key in wanted:
        if key[0].op != "placeholder":
            tensor(key)
    return found
