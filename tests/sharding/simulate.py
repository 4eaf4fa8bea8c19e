"""Run a whole graph on several devices in one process: any choice of strategies, edges by the law, autograd."""

from __future__ import annotations

import operator
import random
from typing import Any

import torch
from torch import fx

from autopar.ir.ops import operands
from autopar.sharding.oracle import run
from autopar.sharding.placement import Placement, R, local
from autopar.sharding.redistribute import grad_placement, legal, redistribute, wanted
from autopar.sharding.rule import strategies
from autopar.sharding.strategy import Strategy

Choices = dict[fx.Node, Strategy]


class Edge(torch.autograd.Function):
    """Forward p → q, backward from how the reader's gradient comes out to how the producer wants it."""

    @staticmethod
    def forward(ctx: Any, p: Placement, q: Placement, grad: Placement, *shards: torch.Tensor) -> Any:
        ctx.back = grad, wanted(p)
        return tuple(s.clone().contiguous() for s in redistribute(p, q, list(shards)))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # type: ignore[override]
        return (None, None, None, *redistribute(*ctx.back, list(grads)))


def placed(choices: Choices, node: fx.Node) -> Placement:
    return choices[node].outputs[0]


def draw(graph: fx.Graph, degree: int, patterns: Any, seed: int) -> Choices:
    """A random choice for every node whose edges are all possible; whole copies only where nothing else is drawn."""
    rng, choices = random.Random(seed), {}
    for node in graph.nodes:
        options = [s for s in strategies(node, degree, patterns) if _reachable(s, node, choices)]
        choices[node] = rng.choice(options[1:] or options) if rng.random() < 0.8 else options[0]
    return choices


def _reachable(strategy: Strategy, node: fx.Node, choices: Choices) -> bool:
    if node.op == "call_function" and node.target is operator.getitem:
        return strategy.inputs[0] == choices[node.args[0]].outputs[node.args[1]]
    return all(legal(placed(choices, o), q) for o, q in zip(operands(node), strategy.inputs, strict=True))


def simulate(graph: fx.Graph, choices: Choices, degree: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every parameter's gradient (whole), computed on ``degree`` devices."""
    env: dict[fx.Node, Any] = {}
    leaves: dict[str, tuple[Placement, list[torch.Tensor]]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            trained, p = node.meta["kind"] == "parameter", placed(choices, node)
            env[node] = [
                [local(p, node.meta["tensor"], r, degree).clone().requires_grad_(trained)] for r in range(degree)
            ]
            if trained:
                leaves[node.meta["name"]] = p, [e[0] for e in env[node]]
        elif node.op == "output":
            strategy = choices[node]
            loss = _operand(node, strategy, 0, operands(node)[0], choices, env)
        elif node.target is operator.getitem:
            env[node] = [[each[node.args[1]]] for each in env[node.args[0]]]
        else:
            shards = [_operand(node, choices[node], i, o, choices, env) for i, o in enumerate(operands(node))]
            env[node] = run(node, choices[node], shards, degree)
    flat = [x for _, xs in leaves.values() for x in xs]
    grads = iter(torch.autograd.grad(loss, flat, [torch.ones_like(x) for x in loss], allow_unused=True))
    found = {}
    for name, (p, xs) in leaves.items():
        mine = [next(grads) for _ in xs]
        parts = [torch.zeros_like(x) if g is None else g for x, g in zip(xs, mine, strict=True)]
        found[name] = redistribute(wanted(p), R, parts)[0]
    return loss[0], found


def _operand(node: fx.Node, strategy: Strategy, i: int, source: fx.Node, choices: Choices, env: Any) -> Any:
    p, q = placed(choices, source), strategy.inputs[i]
    shards = [each[0] for each in env[source]]
    if not shards[0].requires_grad:
        return [s.clone().contiguous() for s in redistribute(p, q, shards)]
    return list(Edge.apply(p, q, grad_placement(q, strategy.replicated), *shards))
