"""fused_norm: layer norms and RMS norms, written out or not, in one kernel each, with the sum before them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autopar import kernels  # noqa: F401 (registers the operators)
from autopar.ir.ops import Norm, argument, view
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from passes.fuse.parts import CASTS, aten, cast_to, clean, is_node, maker, number, same_sizes, uncast, value

ops = torch.ops.autopar


@dataclass(frozen=True)
class Found:
    """A norm over the last dim: ``last`` is its result; weight and bias may be None; ``centered``: a layer norm."""

    last: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    centered: bool


class FusedNorm(Pass):
    """``weight · x / √(mean(x²) + eps)``, written out or native, and layer norms become kernels of this project.

    They read and write each entry once, compute in float32 and round once. ``residual``: a sum that is normed right away is made
    by the same kernel.
    """

    name: ClassVar[str] = "fused_norm"
    numerics: ClassVar[Numerics] = Numerics.CLOSE
    residual: bool = True

    def rewrite(self, program: Program) -> None:
        for _, graph in program.graphs():
            for node in list(graph.nodes):
                found = native(node) or written(node)
                if found is not None:
                    fuse(graph, found, self.residual)
        clean(program)


def native(node: fx.Node) -> Found | None:
    """torch's own operator, over the last dim."""
    seen = view(node)
    if not isinstance(seen, Norm) or len(argument(node, 1)) != 1:
        return None
    eps = argument(node, 4 if seen.kind == "layer_norm" else 3)
    if eps is None:
        eps = torch.finfo(value(seen.x).dtype).eps
    return Found(node, seen.x, seen.weight, seen.bias, float(eps), seen.kind == "layer_norm")


def written(node: fx.Node) -> Found | None:
    """An RMS norm as people write it, from its reciprocal root on: the widest part of it that is there."""
    if not is_node(node, aten.rsqrt.default, aten.pow.Tensor_Scalar) or not (power := mean_square(node)):
        return None
    x, eps = power
    scaled = next((u for u in node.users if is_node(u, aten.mul.Tensor) and scales(u, x, node)), None)
    if scaled is None or not same_sizes(scaled, x):
        return None
    last, weight = weighted(scaled)
    return Found(last, x, weight, None, eps, False)


def scales(product: fx.Node, x: fx.Node, root: fx.Node) -> bool:
    """Whether a product is x times the reciprocal root; x may be widened for the square alone, as `mixed_precision` does."""
    others: list[Any] = [a for a in product.args if a is not root]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return False
    widened = (
        is_node(x, *CASTS) and others[0] is x.args[0] and value(others[0]).dtype.itemsize <= value(x).dtype.itemsize
    )
    return others[0] is x or widened


def mean_square(root: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, eps) of 1 / √(mean(x²) + eps) over the last dim."""
    if root.target is aten.pow.Tensor_Scalar and root.args[1] != -0.5:
        return None
    added: Any = root.args[0]
    if not is_node(added, aten.add.Tensor, aten.add.Scalar) or not number(added.args[1]) or added.kwargs:
        return None
    mean: Any = added.args[0]
    if not is_node(mean, aten.mean.dim) or mean.kwargs or len(mean.args) < 3 or mean.args[2] is not True:
        return None
    square: Any = mean.args[0]
    if list(mean.args[1]) not in ([-1], [value(square).dim() - 1]):
        return None
    if is_node(square, aten.pow.Tensor_Scalar) and square.args[1] == 2 or is_node(square, aten.square.default):
        return square.args[0], float(added.args[1])
    if is_node(square, aten.mul.Tensor) and square.args[0] is square.args[1]:
        return square.args[0], float(added.args[1])
    return None


def weighted(scaled: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The result and the weight of a norm, through a cast between them; without one, the unit row and None."""
    node = scaled
    if len(node.users) == 1 and is_node(next(iter(node.users)), *CASTS):
        node = next(iter(node.users))
    if len(node.users) != 1 or not is_node(reader := next(iter(node.users)), aten.mul.Tensor):
        return scaled, None
    other: Any = reader.args[1] if reader.args[0] is node else reader.args[0]
    width = str(value(scaled).shape[-1])
    if isinstance(other, fx.Node) and [str(s) for s in value(other).shape] == [width] and same_sizes(reader, scaled):
        return reader, other
    return scaled, None


def fuse(graph: fx.Graph, found: Found, residual: bool) -> None:
    """Put the kernel where the norm's result was, or, with the sum before it, where that sum was."""
    wanted = value(found.last).dtype
    source = uncast(found.x)
    x = source if value(source).dtype == wanted and same_sizes(source, found.x) else found.x
    weight, bias = found.weight, found.bias
    added = residual and is_sum(x) and all(w is None or precedes(graph, w, x) for w in (weight, bias))
    with graph.inserting_after(x) if added else graph.inserting_before(found.last):
        if not added:
            make = maker(graph, found.last)
            parts = (weight, bias) if found.centered else (weight,)
            made = make(ops.layer_norm.default if found.centered else ops.rms_norm.default, x, *parts, found.eps)
            found.last.replace_all_uses_with(cast_to(make, made, wanted))
            return
    after = x.next
    with graph.inserting_before(after):
        make = maker(graph, found.last)
        parts = (weight, bias) if found.centered else (weight,)
        target = ops.add_layer_norm.default if found.centered else ops.add_rms_norm.default
        both = make(target, *x.args, *parts, found.eps)
        normed, total = make(operator.getitem, both, 0), make(operator.getitem, both, 1)
        last = cast_to(make, normed, wanted)
    x.replace_all_uses_with(total)
    found.last.replace_all_uses_with(last)


def is_sum(x: fx.Node) -> bool:
    """Whether x adds two tensors of its own shape and dtype."""
    plain = is_node(x, aten.add.Tensor) and not x.kwargs and all(isinstance(a, fx.Node) for a in x.args)
    return plain and all(same_sizes(a, x) and value(a).dtype == value(x).dtype for a in x.args)


def precedes(graph: fx.Graph, first: fx.Node, second: fx.Node) -> bool:
    if first.op == "placeholder":
        return True
    order = {n: i for i, n in enumerate(graph.nodes)}
    return order[first] < order[second]
