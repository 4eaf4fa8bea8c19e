"""Typed views of operators: passes and rules see Linear(node, x, weight, bias), never node.args[1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

ROUNDED = ("autopar::fp8_linear", "autopar::fp8_linear_delayed")
"""Linear layers of our own: x, weight and bias are their first operands."""


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node in the order they are written, lists flattened, duplicates kept."""
    found: list[fx.Node] = []

    def walk(value: Any) -> None:
        if isinstance(value, fx.Node):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)

    walk(node.args)
    walk(node.kwargs)
    return found


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias``. x (…, in), weight (out, in), bias (out) or None."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


@dataclass(frozen=True)
class Embedding:
    """Rows of ``weight`` (rows, width) at ``ids``."""

    node: fx.Node
    weight: fx.Node
    ids: fx.Node


@dataclass(frozen=True)
class Norm:
    """A native norm over the last dims of ``x``; ``kind`` is layer_norm or rms_norm."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    kind: str


@dataclass(frozen=True)
class Attention:
    """``softmax(scale · query @ key.T + mask) @ value``, fused.

    query (…, heads, length, width), key and value (…, kv_heads, keys, width); mask broadcasts to (…, heads, length, keys):
    boolean (True: seen) or added. ``scale`` None is 1/√width. ``grouped``: each key head serves heads / kv_heads queries.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool


def view(node: fx.Node) -> Linear | Embedding | Norm | Attention | None:
    """What a call is, if it is something passes know."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        return Linear(node, argument(node, 0), argument(node, 1), argument(node, 2))
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in ROUNDED:
        return Linear(node, argument(node, 0), argument(node, 1), argument(node, 2))
    if node.target is aten.embedding.default:
        return Embedding(node, argument(node, 0), argument(node, 1))
    if node.target is aten.layer_norm.default:
        return Norm(node, argument(node, 0), argument(node, 2), argument(node, 3), "layer_norm")
    if node.target is aten.rms_norm.default:
        return Norm(node, argument(node, 0), argument(node, 2), None, "rms_norm")
    if node.target is aten.scaled_dot_product_attention.default:
        return Attention(node, *(argument(node, i) for i in range(8)))
    return None


def argument(node: fx.Node, index: int) -> Any:
    """Argument ``index`` of an operator's schema: as given by position or name, else its default."""
    known = node.target._schema.arguments[index]  # type: ignore[union-attr]
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(known.name, known.default_value)
