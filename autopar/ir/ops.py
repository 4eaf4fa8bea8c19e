"""Typed views of operators: passes and rules see Linear(node, x, weight, bias), never node.args[1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


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


def view(node: fx.Node) -> Linear | Embedding | None:
    """What a call is, if it is something passes know."""
    if node.op != "call_function":
        return None
    args: Any = node.args
    if node.target is aten.linear.default:
        return Linear(node, args[0], args[1], args[2] if len(args) > 2 else node.kwargs.get("bias"))
    if node.target is aten.embedding.default:
        return Embedding(node, args[0], args[1])
    return None
