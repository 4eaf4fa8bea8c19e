"""Shapes of nodes that passes make, symbolic ones included."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two shapes are equal as expressions; nothing is guarded."""
    return [str(s) for s in a.shape] == [str(s) for s in b.shape]


def infer(node: fx.Node) -> fx.Node:
    """Fill ``meta["val"]`` of a call by running it on its operands' fake or meta tensors; returns the node."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    kwargs = {k: torch.device("meta") if k == "device" else v for k, v in kwargs.items()}
    modes = {mode for v in flat(args) if (mode := getattr(v, "fake_mode", None)) is not None}
    with torch.no_grad():
        if modes:
            with next(iter(modes)):
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    return node


def flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [x for v in value for x in flat(v)]
    return [value]
