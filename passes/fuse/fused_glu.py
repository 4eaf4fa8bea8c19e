"""fused_glu: an activation times another projection (SwiGLU, GeGLU) in one kernel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from autopar import kernels  # noqa: F401 (registers the operator)
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from passes.fuse.parts import aten, clean, is_node, maker, same_sizes, value


class FusedGlu(Pass):
    """``silu(gate) · up``, also with gelu, its tanh form or relu, becomes one kernel that keeps neither the activation nor the
    product for the backward."""

    name: ClassVar[str] = "fused_glu"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, program: Program) -> None:
        for _, graph in program.graphs():
            for node in list(graph.nodes):
                found = gated(node)
                if found is not None:
                    gate, up, activation = found
                    with graph.inserting_before(node):
                        made = maker(graph, node)(torch.ops.autopar.glu.default, gate, up, activation)
                    node.replace_all_uses_with(made)
        clean(program)


def gated(node: fx.Node) -> tuple[fx.Node, fx.Node, str] | None:
    """(gate, up, activation) of a product that is a gated unit."""
    if not is_node(node, aten.mul.Tensor) or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    for active, up in (node.args, node.args[::-1]):
        found = activated(active)
        if found is None or up is active or len(active.users) != 1:  # type: ignore[union-attr]
            continue
        gate, activation = found
        if up is not gate and all(same_sizes(x, node) and value(x).dtype == value(node).dtype for x in (gate, up)):
            return gate, up, activation  # type: ignore[return-value]
    return None


def activated(node: Any) -> tuple[fx.Node, str] | None:
    """What an activation is of, and its name."""
    if is_node(node, aten.silu.default):
        return node.args[0], "silu"
    if is_node(node, aten.relu.default):
        return node.args[0], "relu"
    if is_node(node, aten.gelu.default):
        return node.args[0], "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if is_node(node, aten.mul.Tensor):
        for x, factor in (node.args, node.args[::-1]):
            if is_node(factor, aten.sigmoid.default) and factor.args[0] is x and len(factor.users) == 1:
                return x, "silu"
    return None
