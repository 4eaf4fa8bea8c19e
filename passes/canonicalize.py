"""canonicalize: remove what export leaves behind, and bring spellings of one operation together."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import fx

from autopar.ir.causal import causal_masks
from autopar.ir.importer import is_impure
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from autopar.ir.shapes import infer, same_shape
from autopar.ir.unread import sweep

aten = torch.ops.aten

ALWAYS = {aten.alias.default, aten.lift_fresh_copy.default, aten.lift.default}
UNLESS_CHANGED = {  # no-ops where shape and dtype stay what they were
    aten.slice.Tensor,
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.flatten.using_ints,
    aten.type_as.default,
    aten.to.other,
}
CASTS = {  # a device is the run's affair; what is left is a cast
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.to.prim_Device,
    aten._to_copy.default,
    aten.type_as.default,
}
SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
TRANSPOSES = {aten.t.default, aten.numpy_T.default}


class Canonicalize(Pass):
    """Runs before every other pass. Its result computes the same bits."""

    name: ClassVar[str] = "canonicalize"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, program: Program) -> None:
        for _, graph in program.graphs():
            for node in list(graph.nodes):
                if node.op == "call_function":
                    simplify(graph, node)
            for node in list(graph.nodes):
                if node.op == "call_function":
                    functionalize(graph, node)
            graph.eliminate_dead_code(is_impure)
        causal_masks(program)
        sweep(program)


def simplify(graph: fx.Graph, node: fx.Node) -> None:
    if does_nothing(node):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    elif node.target in CASTS:
        node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.meta["val"].dtype), {}
    elif node.target in (aten.view.default, aten._unsafe_view.default):
        node.target = (
            aten.reshape.default
        )  # a view only where the traced strides allowed it; reshape is one where it can
    elif node.target is aten.matmul.default:
        linear_from_matmul(graph, node)
    elif node.target is aten.addmm.default and not node.kwargs:
        linear_from_addmm(graph, node)


def does_nothing(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(node.meta["val"], torch.Tensor):
        return False
    if node.target in ALWAYS:
        return True
    if node.target in (aten.detach.default, aten.detach_.default):
        return not source.meta["requires_grad"]
    if node.target is aten.dropout.default:
        return node.args[1] == 0 or node.args[2] is False
    if node.target is aten.slice.Tensor and len(node.args) > 4 and node.args[4] != 1:
        return False
    if node.target is aten.contiguous.default:
        return False
    before, after = source.meta["val"], node.meta["val"]
    return node.target in UNLESS_CHANGED and same_shape(before, after) and before.dtype == after.dtype


def functionalize(graph: fx.Graph, node: fx.Node) -> None:
    """``x /= y`` is ``x = x / y``, ``x[..., :8] = y`` a slice_scatter: what a plan splits or moves must not change in place.

    A value that others may alias is left as it is; the sharding rules keep all of it whole on every device.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return
    name = target._schema.name.split("::")[-1]
    plain = getattr(getattr(aten, name.removesuffix("_"), None), target._overloadname, None)
    changed = node.args[0]
    if not name.endswith("_") or plain is None or not isinstance(changed, fx.Node):
        return
    if not aliased(changed, node):
        redirect(graph, changed, node, node)
        node.target = plain
    elif (
        changed.target in SCATTERS
        and isinstance(base := changed.args[0], fx.Node)
        and alone(graph, base, changed, node)
    ):
        if node.target is aten.copy_.default:
            node.target, node.args = aten.expand.default, (written(graph, node), list(changed.meta["val"].shape))
        else:
            node.target = plain
        with graph.inserting_after(node):
            whole = graph.call_function(SCATTERS[changed.target], (base, node, *changed.args[1:]), dict(changed.kwargs))
        whole.meta = {"path": node.meta["path"], "requires_grad": node.meta["requires_grad"]}
        infer(whole)
        redirect(graph, changed, node, whole)
        redirect(graph, base, whole, whole)


def written(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What ``copy_`` writes, in the dtype of what it writes to."""
    source: fx.Node = node.args[1]  # type: ignore[assignment]
    if source.meta["val"].dtype == node.meta["val"].dtype:
        return source
    with graph.inserting_before(node):
        cast = graph.call_function(aten.to.dtype, (source, node.meta["val"].dtype))
    cast.meta = {"path": node.meta["path"], "requires_grad": node.meta["requires_grad"]}
    return infer(cast)


def redirect(graph: fx.Graph, old: fx.Node, new: fx.Node, after: fx.Node) -> None:
    """Readers of ``old`` that come after ``after`` read ``new``."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for user in [u for u in old.users if order[u] > order[after]]:
        user.replace_input_with(old, new)


def alone(graph: fx.Graph, base: fx.Node, view: fx.Node, change: fx.Node) -> bool:
    """Whether ``view`` is the one view of a value of its own memory that is still read after ``change``."""
    if base.op != "call_function" or makes_view(base):
        return False
    order = {n: i for i, n in enumerate(graph.nodes)}
    others = [
        u for u in base.users if u is not view and u.op != "output" and makes_view(u) and order[u] < order[change]
    ]
    return all(order[reader] < order[change] for u in others for reader in u.users)


def aliased(node: fx.Node, by: fx.Node) -> bool:
    """Whether a value that ``by`` changes may share memory with another: an input, a view, or what has views."""
    if node.op != "call_function":
        return True
    source = node.args[0] if node.target is operator.getitem else node
    return makes_view(source) or any(makes_view(u) for u in node.users if u is not by and u.op != "output")


def makes_view(node: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


def transposed(node: Any) -> fx.Node | None:
    """W where the node is the transpose of a matrix W."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.meta["val"].dim() != 2:
        return None
    swaps = node.target in (aten.transpose.int,) and {a % 2 for a in node.args[1:]} == {0, 1}  # type: ignore[operator]
    permutes = node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    return node.args[0] if node.target in TRANSPOSES or swaps or permutes else None  # type: ignore[return-value]


def linear_from_matmul(graph: fx.Graph, node: fx.Node) -> None:
    """``matmul(x, W.T)`` is ``linear(x, W)``."""
    weight = transposed(node.args[1])
    if weight is not None and node.args[0].meta["val"].dim() >= 2:  # type: ignore[union-attr]
        node.target, node.args = aten.linear.default, (node.args[0], weight)


def linear_from_addmm(graph: fx.Graph, node: fx.Node) -> None:
    """``addmm(bias, x, W)`` is ``linear(x, W.T, bias)``; flattening x around it is undone."""
    bias, x, weight = node.args
    if not all(isinstance(a, fx.Node) for a in node.args) or bias.meta["val"].dim() != 1:  # type: ignore[union-attr]
        return
    with graph.inserting_before(node):
        inner = transposed(weight)
        if inner is None:
            inner = graph.call_function(aten.t.default, (weight,))
            inner.meta = {"path": node.meta["path"], "requires_grad": weight.meta["requires_grad"]}  # type: ignore[union-attr]
            infer(inner)
        source, after = unflattened(x, node)  # type: ignore[arg-type]
        new = graph.call_function(aten.linear.default, (source, inner, bias))
        new.meta = {"path": node.meta["path"], "requires_grad": node.meta["requires_grad"]}
        infer(new)
    after.replace_all_uses_with(new)
    if after is not node:
        graph.erase_node(after)
    graph.erase_node(node)


def unflattened(x: fx.Node, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The many-dimensional source of x and the reshape after ``node``, where a linear on it says the same."""
    reshapes = (aten.view.default, aten.reshape.default)
    users = list(node.users)
    if x.target in reshapes and len(users) == 1 and users[0].target in reshapes:
        source: fx.Node = x.args[0]  # type: ignore[assignment]
        lead, final = list(source.meta["val"].shape[:-1]), list(users[0].meta["val"].shape[:-1])
        kept = str(source.meta["val"].shape[-1]) == str(x.meta["val"].shape[-1])
        wide = str(users[0].meta["val"].shape[-1]) == str(node.meta["val"].shape[-1])
        if kept and wide and [str(s) for s in lead] == [str(s) for s in final]:
            return source, users[0]
    return x, node
