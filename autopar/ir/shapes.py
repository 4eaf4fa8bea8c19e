"""Shapes of nodes that passes make, symbolic ones included."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

if TYPE_CHECKING:
    from autopar.ir.program import Program


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two shapes are equal as expressions; nothing is guarded."""
    return [str(s) for s in a.shape] == [str(s) for s in b.shape]


def infer(node: fx.Node) -> fx.Node:
    """Fill ``meta["val"]`` of a call by running it on its operands' fake or meta tensors; returns the node."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
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


# ------------------------------------------------------------------ other dtypes, same shapes


def retype(program: Program, node: fx.Node) -> fx.Node:
    """Make a call's ``meta["val"]`` anew after the dtype of an operand changed; its shapes stay.

    A symbolic program's call runs at the example's sizes and only the dtypes are taken, so that no symbol is guarded.
    """
    from autopar.ir.specialize import meta_of, substituted

    if node.target is operator.getitem:
        node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr,index]
        return node
    sizes = program.sizes

    def given(n: fx.Node) -> Any:
        return meta_of(n.meta["val"], sizes) if sizes else n.meta["val"]

    args, kwargs = map_arg(substituted((node.args, node.kwargs), sizes), given)
    kwargs = {k: torch.device("meta") if k == "device" else v for k, v in kwargs.items()}
    with torch.no_grad():
        made = node.target(*args, **kwargs)  # type: ignore[operator]
    node.meta["val"] = cast_like(node.meta["val"], made) if sizes else made
    return node


def cast_like(value: Any, model: Any) -> Any:
    """``value`` with the dtypes of ``model``."""
    if isinstance(value, (list, tuple)):
        return tuple(cast_like(v, m) for v, m in zip(value, model, strict=True))
    if not isinstance(value, torch.Tensor) or value.dtype == model.dtype:
        return value
    return value.to(model.dtype)


def retype_call(program: Program, call: fx.Node) -> fx.Node:
    """A block call's value from what its block returns: shapes stay, dtypes follow."""
    made = tuple(n.meta["val"] for n in program.blocks[str(call.target)].output_node().args[0])  # type: ignore[union-attr]
    call.meta["val"] = cast_like(call.meta["val"], made)
    return call
