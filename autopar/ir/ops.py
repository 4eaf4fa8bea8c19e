"""Typed views of operators: passes and rules see Linear(node, x, weight, bias), never node.args[1]."""

from __future__ import annotations

from typing import Any

from torch import fx


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
