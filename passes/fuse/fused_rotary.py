"""fused_rotary: rotary positions, in any spelling, in one kernel."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.node import map_aggregate

from autopar import kernels  # noqa: F401 (registers the operator)
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from autopar.ir.specialize import evaluate, meaning
from passes.attention.fused import Maker
from passes.fuse.parts import aten, clean, is_node, maker, value

MOVES = {
    aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.chunk.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unbind.int, aten.cat.default, aten.stack.default, aten.neg.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.reshape.default, aten.view.default, aten._unsafe_view.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int, aten.contiguous.default, aten.clone.default,
    aten.roll.default, aten.flip.default, operator.getitem,
}  # fmt: skip
"""Operators that put entries elsewhere, or turn their sign."""
SIZES = {"batch": 2, "sequence": 3}


class FusedRotary(Pass):
    """``x · cos + swapped(x) · sin`` becomes one kernel; so does a head of which only the first part turns.

    What swaps the entries is not matched but tried: whatever slices, stacks and negates its way from x to (−x₂, x₁), in halves
    or interleaved, is found.
    """

    name: ClassVar[str] = "fused_rotary"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, program: Program) -> None:
        sizes = {s: SIZES[meaning(program, s)] for s in program.sizes}
        for _, graph in program.graphs():
            for node in list(graph.nodes):
                found = rotation(node, sizes)
                if found is not None:
                    fuse(graph, node, *found)
        clean(program)


def rotation(node: fx.Node, sizes: dict[str, int]) -> tuple[fx.Node, fx.Node, fx.Node, bool] | None:
    """(x, cos, sin, interleaved) of a sum that turns the entries of x."""
    sign = 1 if is_node(node, aten.add.Tensor) else -1 if is_node(node, aten.sub.Tensor) else None
    products: Any = node.args
    if sign is None or node.kwargs or not all(is_node(a, aten.mul.Tensor) for a in products):
        return None
    for first, second in [products] if sign < 0 else [products, products[::-1]]:
        for x, cos in (first.args, first.args[::-1]):
            for swapped, sin in (second.args, second.args[::-1]):
                if not all(isinstance(n, fx.Node) for n in (x, cos, swapped, sin)) or not fits(node, x, cos, sin):
                    continue
                style = swap(x, swapped, sign, sizes)
                if style is not None:
                    return x, cos, sin, style
    return None


def fits(node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node) -> bool:
    """Whether the kernel takes these: four dims, an even width, tables of one shape that broadcast and carry no gradient."""
    v, c, s = value(x), value(cos), value(sin)
    if v.dim() != 4 or v.dtype != value(node).dtype or cos.meta["requires_grad"] or sin.meta["requires_grad"]:
        return False
    if [str(n) for n in c.shape] != [str(n) for n in s.shape] or not 1 <= c.dim() <= 4:
        return False
    wide = [1] * (4 - c.dim()) + list(c.shape)
    same = [str(a) in ("1", str(b)) for a, b in zip(wide[:3], v.shape[:3], strict=True)]
    return all(same) and str(wide[3]) == str(v.shape[3]) and isinstance(v.shape[3], int) and v.shape[3] % 2 == 0


def swap(x: fx.Node, swapped: fx.Node, sign: int, sizes: dict[str, int]) -> bool | None:
    """How ``swapped`` puts the entries of x: interleaved (True), in halves (False), or not as a rotation does (None)."""
    order = way(x, swapped)
    if order is None or swapped is x:
        return None
    shape = [evaluate(s, sizes) for s in value(x).shape]
    entries = torch.arange(1, shape[-1] + 1, dtype=torch.float64).expand(shape)
    env: dict[fx.Node, Any] = {x: entries}
    for node in order:
        args, kwargs = map_aggregate(
            (node.args, node.kwargs), lambda a: env[a] if isinstance(a, fx.Node) else evaluate(a, sizes)
        )
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    made = env[swapped] * sign
    first, second = entries.chunk(2, -1)
    if list(made.shape) != shape:
        return None
    if torch.equal(made, torch.cat((-second, first), -1)):
        return False
    pairs = torch.stack((-entries[..., 1::2], entries[..., 0::2]), -1).flatten(-2)
    return True if torch.equal(made, pairs) else None


def way(x: fx.Node, target: fx.Node, limit: int = 24) -> list[fx.Node] | None:
    """The nodes from x to target, in order, if nothing but moves of x's entries lies between."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = {x}

    def visit(node: fx.Node) -> bool:
        if node in seen:
            return True
        if not is_node(node, *MOVES) or len(order) > limit or not all(visit(n) for n in node.all_input_nodes):
            return False
        seen.add(node)
        order.append(node)
        return bool(node.all_input_nodes)

    return order if visit(target) else None


def fuse(graph: fx.Graph, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool) -> None:
    """Put the kernel in the sum's place, or in that of the whole head that a part of which turns."""
    last, source = whole(node, x)
    with graph.inserting_before(last):
        make = maker(graph, node)
        tables = [four(make, t) for t in (cos, sin)]
        made = make(torch.ops.autopar.rotary.default, source, *tables, interleaved)
    last.replace_all_uses_with(made)


def four(make: Maker, table: fx.Node) -> fx.Node:
    for _ in range(4 - value(table).dim()):
        table = make(aten.unsqueeze.default, table, 0)
    return table


def whole(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The node that puts turned entries and the rest together again, and what they were cut from; else the node and x."""
    reader: Any = next(iter(node.users), None)
    if len(node.users) != 1 or not is_node(reader, aten.cat.default) or not is_node(x, aten.slice.Tensor):
        return node, x
    parts: Any = reader.args[0]
    source: Any = x.args[0]
    size, dim = value(x).shape[-1], value(source).dim() - 1
    joined = len(parts) == 2 and parts[0] is node and reader.args[1:] in ((-1,), (dim,))
    rest: Any = parts[1] if joined else None
    if not is_node(rest, aten.slice.Tensor) or rest.args[0] is not source:
        return node, x
    first, second = bounds(x), bounds(rest)
    if first == (dim, 0, size, 1) and second == (dim, size, value(source).shape[-1], 1):
        return reader, source
    return node, x


def bounds(cut: fx.Node) -> tuple[int, int, int, int]:
    """(dim, start, end, step) of a slice, all counted from the front."""
    shape, given = value(cut.args[0]).shape, tuple(cut.args[1:])
    dim, start, end, step = (*given, *(0, None, None, 1)[len(given) :])  # type: ignore[misc]
    assert isinstance(dim, int), cut
    dim = dim % len(shape)
    length = shape[dim]
    if not isinstance(length, int):
        return dim, -1, -1, -1  # a slice of the batch or the sequence
    return dim, *slice(start, end, step).indices(length)
