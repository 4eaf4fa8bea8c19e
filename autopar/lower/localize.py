"""One graph on the devices of the tp axis: local sizes, and the collective of every edge made explicit."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from autopar.ir.context import ContextAttention
from autopar.ir.ops import operands
from autopar.lower import collectives
from autopar.plan.plan import Choice
from autopar.sharding.call import arguments
from autopar.sharding.part import substitute
from autopar.sharding.placement import P, Placement, R, parse
from autopar.sharding.redistribute import grad_placement, wanted
from autopar.sharding.rule import addends, local_args
from autopar.sharding.strategy import Strategy

aten = torch.ops.aten
GROUP = "tp"
"""Stands for the process group among an emitted call's arguments."""


@dataclass
class Localized:
    """A graph of local calls. ``places`` maps every new node to where its value lives along tp."""

    graph: fx.Graph
    places: dict[fx.Node, Placement]
    partial: set[str] = field(default_factory=set)  # placeholders whose gradients are summed once per step
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)  # old node → new node


def strategy_of(node: fx.Node, choices: Mapping[str, Choice]) -> Strategy:
    """The plan's strategy of a node; replicated where the plan says nothing."""
    choice = choices.get(node.name)
    if choice is not None:
        return Strategy(tuple(map(parse, choice.inputs)), tuple(map(parse, choice.outputs)), choice.special)
    value = node.meta.get("val")
    count = len([v for v in value if isinstance(v, torch.Tensor)]) if isinstance(value, (tuple, list)) else 1
    return Strategy((R,) * len(operands(node)), (R,) * count)


class Localizer:
    """Rewrites one graph; ``deferrable``: placeholders whose gradients may be summed after the step's last backward."""

    def __init__(
        self,
        choices: Mapping[str, Choice],
        degree: int,
        deferrable: set[fx.Node],
        owned: Mapping[str, set[int]] | None = None,
        returns_loss: bool = False,
    ) -> None:
        self.returns_loss = returns_loss  # the outer graph: loss and count must be whole on every rank
        self.choices = choices
        self.owned = owned or {}  # arguments of block calls that live inside the block: they never move
        self.degree = degree
        self.deferrable = deferrable
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.place: dict[fx.Node, tuple[Placement, ...]] = {}  # old node → placements of its outputs
        self.moved: dict[tuple[fx.Node, Placement, Placement | None], fx.Node] = {}
        self.places: dict[fx.Node, Placement] = {}
        self.partial: set[str] = set()

    def run(
        self, nodes: list[fx.Node], received: Mapping[fx.Node, Placement], called: Mapping[str, Strategy]
    ) -> Localized:
        """``received``: values that come from another stage, and where they live. ``called``: how blocks take and return."""
        self.called = called
        self.deferred = self.find_deferred(nodes)
        for node, place in received.items():
            self.add_placeholder(node, place)
            self.env[node].meta["received"] = True
        for node in nodes:
            if node.op == "placeholder":
                self.add_placeholder(node, self.strategy(node).outputs[0])
            elif node.op == "output":
                self.add_output(node)
            elif node.op == "call_function" and node.target is operator.getitem:
                self.add_getitem(node)
            else:
                self.add_call(node)
        reuse_memory(self.graph)
        return Localized(self.graph, self.places, self.partial, self.env)

    # -------------------------------------------------------------- strategies

    def strategy(self, node: fx.Node) -> Strategy:
        return self.called[node.name] if node.op == "call_module" else strategy_of(node, self.choices)

    def wants(self, reader: fx.Node) -> list[tuple[fx.Node, Placement, Placement | None]]:
        """(operand, wanted placement, placement of the operand's gradient) for each operand of a reader."""
        sources = operands(reader)
        if reader.op == "output":
            choice = self.choices.get("output")
            inputs = [parse(c) for c in choice.inputs] if choice else [None] * len(sources)
            whole = self.returns_loss and "sends" not in reader.meta
            found = []
            for source, q in zip(sources, inputs, strict=True):
                place = q or (R if whole else self.placement(source))
                found.append((source, place, wanted(place) if source.meta.get("requires_grad") else None))
            return found
        strategy = self.strategy(reader)
        found = []
        for i, (source, q) in enumerate(zip(sources, strategy.inputs, strict=True)):
            if i in self.owned.get(str(reader.target), ()):
                found.append((source, self.placement(source), None))
                continue
            # a block hands back what its placeholder's value wants
            grad = wanted(q) if reader.op == "call_module" else grad_placement(q, strategy.replicated)
            found.append((source, q, grad if gradient_flows(source) else None))
        return found

    def placement(self, node: fx.Node) -> Placement:
        return self.place[node][0]

    def find_deferred(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """Parameters all of whose readers take them whole and give gradients in parts."""
        readers: dict[fx.Node, list[tuple[Placement, Placement | None]]] = {}
        for node in nodes:
            if node.op in ("placeholder", "output", "call_module") or node.target is operator.getitem:
                continue
            for source, q, grad in self.wants(node):
                if source in self.deferrable and self.strategy(source).outputs[0] == R:
                    readers.setdefault(source, []).append((q, grad))
        called = {a for n in nodes if n.op == "call_module" for a in n.args}
        return {
            n
            for n, wants in readers.items()
            if n.meta["requires_grad"] and n not in called and all(w == (R, P) for w in wants)
        }

    # -------------------------------------------------------------- nodes

    def add_placeholder(self, node: fx.Node, place: Placement) -> None:
        new = self.graph.placeholder(node.name)
        new.name = node.name
        self.register(node, new, (place,))
        if node in self.deferred:
            self.partial.add(node.name)

    def add_getitem(self, node: fx.Node) -> None:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        new = self.graph.create_node(
            "call_function", operator.getitem, (self.env[source], node.args[1]), name=node.name
        )
        self.register(node, new, (self.place[source][node.args[1]],))  # type: ignore[index]

    def add_output(self, node: fx.Node) -> None:
        values = [self.move(source, q, grad) for source, q, grad in self.wants(node)]
        self.graph.output(tuple(values))

    def add_call(self, node: fx.Node) -> None:
        strategy = self.strategy(node)
        given = [self.move(source, q, grad) for source, q, grad in self.wants(node)]
        split = () if node.op == "call_module" or self.degree == 1 else addends(node, strategy)
        for i in split:
            given[i] = self.derived(aten.div.Tensor, (given[i], self.degree), given[i], node)
        args, kwargs = (node.args, node.kwargs)
        if node.op != "call_module":
            args, kwargs = local_args(node, strategy, self.degree)
        queue = iter(given)
        args, kwargs = substitute((tuple(args), dict(kwargs)), queue)
        target: Any = node.target
        if strategy.special:
            target, args, kwargs = special_call(node, strategy, args, kwargs)
        new = self.graph.create_node(node.op, target, args, kwargs, name=node.name)
        self.register(node, new, strategy.outputs)
        new.meta["strategy"] = strategy
        if draws(node) and not strategy.replicated and self.degree > 1:
            new.meta["split_rng"] = True

    def register(self, node: fx.Node, new: fx.Node, places: tuple[Placement, ...]) -> None:
        self.env[node], self.place[node] = new, places
        new.meta = {**node.meta, "places": places, "old": node}
        self.places[new] = places[0] if places else R

    def derived(self, target: Any, args: tuple[Any, ...], source: fx.Node, reader: fx.Node) -> fx.Node:
        new = self.graph.create_node("call_function", target, args, {})
        new.meta = {**source.meta, "path": reader.meta.get("path", "")}
        return new

    # -------------------------------------------------------------- edges

    def move(self, source: fx.Node, q: Placement, grad: Placement | None) -> fx.Node:
        """The operand as the reader wants it; readers that want the same share one move."""
        p = self.placement(source)
        if source in self.deferred or self.degree == 1:
            grad = None if p == q else grad
        if p == q and (grad is None or grad == wanted(p)):
            return self.env[source]
        key = (source, q, grad)
        if key not in self.moved:
            target, args, kwargs = move_call(p, q, grad)
            new = self.graph.create_node("call_function", target, (self.env[source], *args, GROUP), kwargs)
            new.meta = {**self.env[source].meta, "places": (q,), "move": f"{p} → {q}"}
            self.places[new] = q
            self.moved[key] = new
        return self.moved[key]


PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default}
"""Operators that write their result, and the gradients of their first two operands, into memory of their own, and do
not save the result. (The gradient of a third, a bias, may be the very tensor that others get, too.)"""


def reuse_memory(graph: fx.Graph) -> None:
    """Let sums over the ranks take place where they read, if nobody else reads it: no copy before the all-reduce."""
    for node in graph.nodes:
        if node.target in (collectives.all_reduce, collectives.all_reduce_both):
            source = node.args[0]
            alone = source.target in PRODUCTS and len(source.users) == 1
        else:
            alone = node.target is collectives.copy_in and all(is_factor(node, u) for u in node.users)
        if alone:
            node.kwargs = {**node.kwargs, "in_place": True}


def is_factor(node: fx.Node, reader: fx.Node) -> bool:
    return reader.target in PRODUCTS and node in reader.args[:2] and node not in reader.args[2:]


def gradient_flows(node: fx.Node) -> bool:
    flag = node.meta.get("requires_grad")
    return any(flag) if isinstance(flag, tuple) else bool(flag)


def draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers as it is called here."""
    if node.target is aten.dropout.default:
        return node.args[1] != 0 and bool(node.args[2])
    if isinstance(node.target, ContextAttention):
        return bool(node.kwargs.get("dropout"))
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(node.kwargs.get("dropout_p") or (len(node.args) > 4 and node.args[4]))
    return any("nondeterministic_seeded" in str(t) for t in getattr(node.target, "tags", ()))


def move_call(p: Placement, q: Placement, grad: Placement | None) -> tuple[Any, tuple[int, ...], dict[str, Any]]:
    """The emitted function that moves p → q forward and grad → wanted(p) backward; its dims, and pieces by keyword."""
    parts = grad == P
    if p == q == R and parts:
        return collectives.copy_in, (), {}
    if p == P and q == R:
        return (collectives.all_reduce_both if parts else collectives.all_reduce), (), {}
    if p.sharded and q == R:
        return (collectives.all_gather_sum if parts else collectives.all_gather), (p.dim,), pieces(p)
    if p == P and q.sharded:
        return collectives.reduce_scatter, (q.dim,), pieces(q)
    if p == R and q.sharded:
        return collectives.scatter, (q.dim,), pieces(q)
    if p.sharded and q.sharded:
        before = {"pieces_before": p.pieces} if p.pieces else {}
        return collectives.all_to_all, (p.dim, q.dim), {**pieces(q), **before}
    raise AssertionError(f"no move {p} → {q} with gradient {grad}")


def pieces(place: Placement) -> dict[str, Any]:
    return {"pieces": place.pieces} if place.pieces else {}


def special_call(
    node: fx.Node, strategy: Strategy, args: Any, kwargs: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The emitted function of a strategy with collectives of its own."""
    if strategy.special == "vocab_embedding":
        padding = args[2] if len(args) > 2 else -1
        return collectives.vocabulary_embedding, (args[0], args[1], padding, GROUP), {}
    if strategy.special == "split_lookup":
        source, index = (n for n in tree_leaves((args, kwargs)) if isinstance(n, fx.Node))
        found = collectives.split_gather if node.target is aten.gather.default else collectives.split_index
        return found, (source, strategy.inputs[0].dim, index, GROUP), {}
    if strategy.special == "vocab_cross_entropy":
        bound = arguments(node)
        reduction = ("none", "mean", "sum")[bound["reduction"]]
        dim = strategy.inputs[0].dim
        return (
            collectives.vocabulary_cross_entropy,
            (args[0], args[1], reduction, bound["ignore_index"], dim, GROUP),
            {},
        )
    if strategy.special == "vocab_linear_cross_entropy":
        bound = arguments(node)
        given = iter(n for n in (*args, *kwargs.values()) if isinstance(n, fx.Node))
        tensors = [None if bound[n] is None else next(given) for n in ("x", "weight", "labels", "bias")]
        options = (bound["ignore_index"], bound["softcap"], GROUP)
        return collectives.vocabulary_linear_cross_entropy, (*tensors, *options), {}
    raise AssertionError(f"{node.name}: no emitted function for {strategy.special}")
