"""What the fusing passes share: walking through what changes no value, and replacing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.ir.program import Program
from passes.attention.fused import Maker

aten = torch.ops.aten
CASTS = {aten.to.dtype, aten._to_copy.default}
COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}


def maker(graph: fx.Graph, node: fx.Node) -> Maker:
    """Makes nodes that belong to the module that ``node`` does. Insert before using it."""
    return Maker(graph, str(node.meta.get("path", "")))


def value(node: Any) -> torch.Tensor:
    return node.meta["val"]


def is_node(x: Any, *targets: Any) -> bool:
    """Whether x is a call of one of the targets."""
    return isinstance(x, fx.Node) and x.op == "call_function" and x.target in targets


def uncast(node: Any) -> Any:
    """What a value is a cast or a copy of."""
    while is_node(node, *CASTS, *COPIES):
        node = node.args[0]
    return node


def same_sizes(a: Any, b: Any) -> bool:
    return [str(s) for s in value(a).shape] == [str(s) for s in value(b).shape]


def number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def cast_to(make: Maker, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if value(node).dtype == dtype else make(aten.to.dtype, node, dtype)


def place(name: str, node: fx.Node) -> str:
    """Where a node is, for the history: graph and module."""
    return ".".join(filter(None, (name, str(node.meta.get("path", "")))))


def clean(program: Program) -> None:
    """Drop what nobody reads any more; the batch stays."""
    from autopar.ir.unread import sweep

    sweep(program)
