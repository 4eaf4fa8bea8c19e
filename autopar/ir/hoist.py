"""What all instances of a block would compute alike, computed once before them."""

from __future__ import annotations

import torch
from torch import fx

from autopar.ir.causal import ancestors
from autopar.ir.program import Program


def hoist(program: Program, name: str, node: fx.Node, called: str) -> fx.Node:
    """``node`` of a block as a new argument of it, called ``called``, computed before the instances.

    It must depend on no parameter, no gradient and no other block; where it does, ``node`` itself is returned.
    Instances given the same arguments share one.
    """
    graph = program.blocks[name]
    order = ancestors(node)
    calls = [c for c in program.calls() if c.target == name]
    places = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    given = [n for n in order if n.op == "placeholder"]
    if node.op == "placeholder" or any(n.op not in ("placeholder", "call_function") for n in order):
        return node
    if any(n.meta["kind"] == "parameter" for n in given) or not all(
        free(c.args[places[n]]) for c in calls for n in given
    ):
        return node
    made: dict[tuple[fx.Node, ...], fx.Node] = {}
    for call in calls:
        arguments = tuple(call.args[places[n]] for n in given)
        if arguments not in made:  # type: ignore[comparison-overlap]
            with program.graph.inserting_before(call):
                made[arguments] = copied(program.graph, order, dict(zip(given, arguments, strict=True)))  # type: ignore
        call.args = (*call.args, made[arguments])  # type: ignore[index]
    return placeholder(graph, node, called)


def free(node: object) -> bool:
    """Whether an outer value carries no gradient and waits for no block."""
    assert isinstance(node, fx.Node)
    return not node.meta["requires_grad"] and all(n.op != "call_module" for n in ancestors(node))


def copied(graph: fx.Graph, order: list[fx.Node], env: dict[fx.Node, fx.Node]) -> fx.Node:
    for node in order:
        if node not in env:
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
    return env[order[-1]]


def placeholder(graph: fx.Graph, node: fx.Node, called: str) -> fx.Node:
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        new = graph.placeholder(called)
    new.target = new.name  # what generated code calls the argument; fx makes only the name unique
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), value
    new.meta = {"kind": "input", "name": new.name, "path": "", "val": value, "requires_grad": False}
    return new
