"""The program of one device along cp: local lengths, and a `context` operator wherever devices exchange something."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.errors import PlanError
from autopar.ir import context as ops
from autopar.ir.ops import operands
from autopar.ir.program import OUTER, Program
from autopar.ir.specialize import propagate
from autopar.sharding import context
from autopar.sharding.placement import P, Placement, R, local_shape
from autopar.sharding.redistribute import grad_placement, wanted
from autopar.sharding.rule import addends, local_args
from autopar.sharding.strategy import Strategy

Key = tuple[str, str]  # graph, node
aten = torch.ops.aten
SUFFIX = {"own_part": "part", "scatter_parts": "part", "reduce_scatter_parts": "part", "exchange_parts": "part"}
SUFFIX |= {
    "gather_parts": "whole",
    "gather_parts_sum": "whole",
    "all_reduce": "sum",
    "all_reduce_both": "sum",
    "copy_in": "copy",
}
"""What a value is called after a move."""


def part_of(program: Program, chosen: Mapping[Key, Strategy], degree: int, zigzag: bool) -> Program:
    """The static ``program`` as each of ``degree`` devices along cp runs it.

    ``chosen``: the strategy of every operator and placeholder of every graph (what is not there is whole). Batch inputs,
    parameters and buffers stay whole; loss and count come out whole on every device.
    """
    batch = batch_of(program)
    blocks: dict[str, fx.Graph] = {}
    taken: dict[str, tuple[Strategy, list[bool]]] = {}
    for name, graph in program.blocks.items():
        parts = Parts(name, graph, chosen, degree, zigzag, batch, {})
        blocks[name] = parts.run()
        taken[name] = parts.called()
    outer = Parts(OUTER, program.graph, chosen, degree, zigzag, batch, taken).run()
    made = replace(program, graph=outer, blocks=blocks, sizes={}, respecialize=None, memo={})
    propagate(made)
    return made


def batch_of(program: Program) -> int:
    from autopar.ir.inputs import sizes_of

    return sizes_of(program.inputs)["batch"]


class Parts:
    """Rewrites one graph. ``taken``: of each block, how it takes and returns values, and which places are parameters."""

    def __init__(
        self,
        name: str,
        graph: fx.Graph,
        chosen: Mapping[Key, Strategy],
        degree: int,
        zigzag: bool,
        batch: int,
        taken: Mapping[str, tuple[Strategy, list[bool]]],
    ) -> None:
        self.name, self.old, self.chosen, self.taken = name, graph, chosen, taken
        self.degree, self.zigzag, self.batch = degree, zigzag, batch
        self.nature = context.nature(name, graph)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.place: dict[fx.Node, tuple[Placement, ...]] = {}
        self.moved: dict[tuple[fx.Node, Placement, Placement | None], fx.Node] = {}
        self.shared: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            if node.op == "placeholder":
                self.placeholder(node)
            elif node.op == "output":
                self.output(node)
            elif node.target is operator.getitem:
                self.getitem(node)
            else:
                self.call(node)
        return self.graph

    def called(self) -> tuple[Strategy, list[bool]]:
        """How callers see a block: where its placeholders and results live; which placeholders are parameters."""
        places = [n for n in self.old.nodes if n.op == "placeholder"]
        results = self.old.output_node().args[0]
        outputs = tuple(self.place[n][0] for n in results)  # type: ignore[union-attr]
        kinds = [n.meta["kind"] == "parameter" for n in places]
        return Strategy(tuple(self.place[n][0] for n in places), outputs), kinds

    # -------------------------------------------------------------- strategies

    def strategy(self, node: fx.Node) -> Strategy:
        if node.op == "call_module":
            return self.taken[str(node.target)][0]
        found = self.chosen.get((self.name, node.name))
        value = node.meta["val"]
        count = len(value) if isinstance(value, (tuple, list)) else 1
        if found is None:
            return Strategy((R,) * len(operands(node)), (R,) * count)
        inputs = (context.fitted(p, n, self.batch) for n, p in zip(operands(node), found.inputs, strict=True))
        outputs = (context.fitted(p, node, self.batch, i) for i, p in enumerate(found.outputs))
        return Strategy(tuple(inputs), tuple(outputs), found.special)

    # -------------------------------------------------------------- nodes

    def placeholder(self, node: fx.Node) -> None:
        new = self.graph.placeholder(node.name)
        new.name = node.name
        place = self.strategy(node).outputs[0] if node not in self.nature.whole else R
        self.register(node, new, (place,))
        value = node.meta["val"]
        new.meta["val"] = torch.empty(
            local_shape(place, tuple(value.shape), self.degree), dtype=value.dtype, device="meta"
        )

    def getitem(self, node: fx.Node) -> None:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        if isinstance(self.env[source].target, ops.ContextAttention):  # which returns the mixture alone
            self.env[node], self.place[node] = self.env[source], self.place[source]
            return
        new = self.create(operator.getitem, (self.env[source], node.args[1]), {}, node.name, node)
        self.register(node, new, (self.place[source][node.args[1]],))  # type: ignore[index]

    def output(self, node: fx.Node) -> None:
        values = []
        for source in operands(node):
            place = R if self.name == OUTER else self.place[source][0]
            flows = source.meta.get("requires_grad") and self.name == OUTER
            values.append(self.given(source, place, wanted(place) if flows else None, whole=True))
        self.graph.output(tuple(values))

    def call(self, node: fx.Node) -> None:
        strategy = self.strategy(node)
        block = node.op == "call_module"
        held = self.taken[str(node.target)][1] if block else []
        given = []
        for i, (source, q) in enumerate(zip(operands(node), strategy.inputs, strict=True)):
            if block and held[i]:
                given.append(self.env[source])
                continue
            grad = (wanted(q) if block else grad_placement(q, strategy.replicated)) if gradient(source, node) else None
            given.append(
                self.given(source, q, grad, whole=(block or strategy.replicated) and node not in self.nature.whole)
            )
        if strategy.special:
            self.attention(node, strategy, given)
            return
        for i in () if block else addends(node, strategy):
            given[i] = self.create(
                aten.div.Tensor, (given[i], self.degree), {}, f"{given[i].name}_share", operands(node)[i]
            )
        args, kwargs = (node.args, node.kwargs) if block else local_args(node, strategy, self.degree)
        queue = iter(given)
        args, kwargs = substitute((tuple(args), dict(kwargs)), queue)
        new = self.create(node.target, args, kwargs, node.name, node, node.op)
        self.register(node, new, strategy.outputs)

    def attention(self, node: fx.Node, strategy: Strategy, given: list[fx.Node]) -> None:
        bound = context.call(node)
        assert bound is not None
        named = dict(zip(context.order(bound), given, strict=True))
        args = tuple(named.pop(n) for n in ("query", "key", "value"))
        options = {n: bound[n] for n in context.OPTIONS if n in bound}
        target = context.target(strategy, self.degree, self.zigzag)
        new = self.create(target, args, {**named, **options}, node.name, node)
        self.register(node, new, strategy.outputs[:1])
        if isinstance(node.meta["val"], (tuple, list)):
            new.meta |= {k: node.meta[k][0] for k in ("dims", "requires_grad")}

    def create(
        self, target: Any, args: Any, kwargs: Any, name: str, like: fx.Node, op: str = "call_function"
    ) -> fx.Node:
        new = self.graph.create_node(op, target, args, kwargs, name=name)
        new.meta = {k: v for k, v in like.meta.items() if k not in ("val", "kind", "name", "constant")}
        new.meta["val"] = None
        return new

    def register(self, node: fx.Node, new: fx.Node, places: tuple[Placement, ...]) -> None:
        self.env[node], self.place[node] = new, places
        new.meta = {**node.meta, "val": None} if new.op == "placeholder" else new.meta

    # -------------------------------------------------------------- edges

    def given(self, source: fx.Node, q: Placement, grad: Placement | None, *, whole: bool) -> fx.Node:
        """The operand as a reader wants it. ``whole``: a gradient of it comes out whole on every device."""
        p = self.place[source][0]
        if source in self.nature.whole:
            if q.sharded:
                return self.move(source, "own_part", q, None)
            return (
                self.share(source) if whole and grad is not None and source in self.nature.weights else self.env[source]
            )
        if p == q and (grad is None or grad == wanted(p)):
            return self.env[source]
        return self.move(source, self.kind(p, q, grad), q, grad)

    def share(self, source: fx.Node) -> fx.Node:
        """Of a parameter's gradient that every device makes whole, each gives its share."""
        if source not in self.shared:
            self.shared[source] = self.create(
                ops.operator("share_gradient"), (self.env[source], self.degree), {}, f"{source.name}_share", source
            )
        return self.shared[source]

    @staticmethod
    def kind(p: Placement, q: Placement, grad: Placement | None) -> str:
        """The `context` operator that moves p → q forward and grad → wanted(p) backward."""
        parts = grad == P
        if p == q == R and parts:
            return "copy_in"
        if p == P and q == R:
            return "all_reduce_both" if parts else "all_reduce"
        if p.sharded and q == R:
            return "gather_parts_sum" if parts else "gather_parts"
        if p == P and q.sharded:
            return "reduce_scatter_parts"
        if p == R and q.sharded:
            return "scatter_parts" if grad is not None else "own_part"
        if p.sharded and q.sharded:
            return "exchange_parts"
        raise AssertionError(f"no move {p} → {q} with gradient {grad} along cp")

    def move(self, source: fx.Node, kind: str, q: Placement, grad: Placement | None) -> fx.Node:
        key = (source, q, grad)
        if key not in self.moved:
            p, held = self.place[source][0], self.env[source]
            if kind in ("all_reduce", "all_reduce_both", "copy_in"):
                args: tuple[Any, ...] = (held, self.degree)
            elif kind == "exchange_parts":
                args = (held, p.dim, q.dim, self.degree, list(q.pieces), list(p.pieces), self.zigzag)
            else:
                at = p if p.sharded else q
                args = (held, at.dim, self.degree, list(at.pieces), self.zigzag)
            self.moved[key] = self.create(ops.operator(kind), args, {}, f"{source.name}_{SUFFIX[kind]}", source)
        return self.moved[key]


def gradient(source: fx.Node, reader: fx.Node) -> bool:
    """Whether a gradient flows back to an operand through a reader."""

    def any_of(flag: Any) -> bool:
        return any(flag) if isinstance(flag, tuple) else bool(flag)

    return any_of(source.meta.get("requires_grad")) and any_of(reader.meta.get("requires_grad"))


def substitute(value: Any, queue: Any) -> Any:
    """``value`` with its nodes, in the order of `operands`, replaced by the next ones of ``queue``."""
    if isinstance(value, fx.Node):
        return next(queue)
    if isinstance(value, (list, tuple)):
        return type(value)(substitute(v, queue) for v in value)
    if isinstance(value, dict):
        return {k: substitute(v, queue) for k, v in value.items()}
    return value


def check(program: Program, chosen: Mapping[Key, Strategy], degree: int) -> None:
    """Raise `PlanError` where what flows from block to block is not split: then cp would only repeat the work."""
    for name, graph in program.blocks.items():
        for node in graph.nodes:
            if node.op != "placeholder" or node.meta["kind"] != "input" or not node.meta["requires_grad"]:
                continue
            found = chosen.get((name, node.name))
            if context.grows(node) and (found is None or not found.outputs[0].sharded):
                raise PlanError(
                    f"cp={degree}: the model mixes positions in a way that sequences cannot be split through "
                    f"({name}.{node.name} of shape {list(node.meta['val'].shape)} would be whole on every device); "
                    "cp=1 would be right"
                )
