"""The attention core of a graph: from queries, keys and values to their mixture, in any spelling."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from autopar.ir.context import ContextAttention
from autopar.ir.ops import operands

aten = torch.ops.aten
FUSED = {"aten::scaled_dot_product_attention", "autopar::flash_attention", "autopar::flex_attention"}
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
STOPS = {
    "aten::linear", "aten::addmm", "aten::mm", "aten::embedding", "aten::topk", "aten::sort", "aten::gather", "aten::scatter",
    "aten::one_hot", "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution", "aten::layer_norm",
    "aten::rms_norm", "autopar::fp8_linear", "autopar::fp8_linear_delayed", "autopar::rms_norm", "autopar::layer_norm",
    "autopar::add_rms_norm", "autopar::add_layer_norm", "autopar::glu",
}  # fmt: skip
"""What scores and their softmax never go through between the two products: what a router's do, which is no attention."""
REACH = 12
"""How many nodes may lie between a product and the softmax (scale, soft-cap, mask, casts, dropout, views)."""


@dataclass(frozen=True)
class Core:
    """``nodes`` in graph order, from the first product to the last; ``inputs`` are read from outside, ``output`` is last."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    output: fx.Node


def cores(graph: fx.Graph) -> list[Core]:
    """Every attention core of a graph, in order: what selective recompute computes again (Korthikanti et al. 2022)."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        known = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in FUSED
        if known or isinstance(node.target, ContextAttention):
            found.append(core([node, *mixture(node)], graph))
        elif node.target in SOFTMAX:
            first, last = before(node), after(node)
            if first is not None and last is not None and over_data(first, node):
                found.append(core(between(first, last), graph))
    return found


def mixture(fused: fx.Node) -> list[fx.Node]:
    """What takes the mixture out of a fused call's results, where nothing else is taken."""
    users = list(fused.users)
    alone = len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0
    return users if alone else []


def passes(node: fx.Node) -> bool:
    """Whether scores may go through a node."""
    if node.op != "call_function":
        return False
    known = isinstance(node.target, torch._ops.OpOverload)
    return not known or node.target._schema.name not in STOPS | {s._schema.name for s in SOFTMAX}


def before(softmax: fx.Node) -> fx.Node | None:
    """The nearest product the softmax depends on."""
    frontier = [softmax]
    for _ in range(REACH):
        frontier = [n for f in frontier for n in f.all_input_nodes if passes(n)]
        product = next((n for n in frontier if n.target in PRODUCTS), None)
        if product is not None or not frontier:
            return product
    return None


def after(softmax: fx.Node) -> fx.Node | None:
    """The nearest product that reads the softmax."""
    frontier = [softmax]
    for _ in range(REACH):
        frontier = [n for f in frontier for n in f.users if passes(n)]
        product = next((n for n in frontier if n.target in PRODUCTS), None)
        if product is not None or not frontier:
            return product
    return None


def over_data(product: fx.Node, softmax: fx.Node) -> bool:
    """Whether the softmax is over things that the data bring: keys. Where that dim of the scores comes from parameters alone
    they choose among experts or memories, as a router does that is written ``x @ W``."""
    rank = product.meta["val"].dim()
    dim = int(softmax.args[1]) % softmax.meta["val"].dim()  # type: ignore[arg-type]
    same_rank = softmax.meta["val"].dim() == rank
    if product.target is aten.einsum.default:
        return any(of_data(n) for n in givers(product, dim if same_rank else None))
    left, right = operands(product)[-2:]
    return of_data(left if same_rank and dim == rank - 2 else right)


def givers(einsum: fx.Node, dim: int | None) -> list[fx.Node]:
    """The operands of an einsum that have the index of ``dim`` of its result; the second one where that cannot be told."""
    equation, given = einsum.args[:2]
    inputs, _, out = str(equation).replace(" ", "").partition("->")
    if dim is None or "." in inputs or len(out) <= dim:
        return list(given)[-1:]  # type: ignore[arg-type]
    return [n for n, letters in zip(given, inputs.split(","), strict=True) if out[dim] in letters]  # type: ignore[arg-type]


def of_data(node: fx.Node) -> bool:
    """Whether a value depends on activations or the batch, not on parameters, buffers and constants alone."""
    seen, stack = {node}, [node]
    while stack:
        here = stack.pop()
        if here.op == "call_module" or here.op == "placeholder" and here.meta["kind"] in ("input", "plain"):
            return True
        for source in here.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return False


def between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes on the ways from ``first`` to ``last``."""
    down, stack = {first}, [first]
    while stack:
        for user in stack.pop().users:
            if user not in down and user.op == "call_function":
                down.add(user)
                stack.append(user)
    up, stack = {last}, [last]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in down and source not in up:
                up.add(source)
                stack.append(source)
    return list(up & down)


def core(nodes: list[fx.Node], graph: fx.Graph) -> Core:
    inside = set(nodes)
    ordered = [n for n in graph.nodes if n in inside]
    inputs = dict.fromkeys(s for n in ordered for s in n.all_input_nodes if s not in inside)
    return Core(tuple(ordered), tuple(inputs), ordered[-1])
