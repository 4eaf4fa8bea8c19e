"""Values of a graph: who made a tensor, what it shares its storage with, how large it is on one device."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from autopar.ir.ops import operands
from autopar.sharding.placement import Placement, local_shape

Value = tuple[fx.Node, int]
"""Output number i of a node."""

VIEWS = frozenset(
    [
        "view",
        "expand",
        "transpose",
        "permute",
        "t",
        "numpy_T",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "narrow",
        "unbind",
        "detach",
        "alias",
        "unflatten",
        "movedim",
        "swapaxes",
        "expand_as",
        "view_as",
        "getitem",
        "diagonal",
        "unfold",
        "swapdims",
        "lift_fresh",
        "mT",
        "copy_in",
        "share_gradient",
    ]
)
"""Operators that never copy; others (reshape, contiguous, to) are asked whether their result shares its storage."""


def op_name(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``; the name of any other target."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].strip("_")
    return str(target) if isinstance(target, str) else str(getattr(target, "__name__", type(target).__name__))


def value(node: fx.Node) -> Value:
    """The value a node stands for: a getitem is its source's output."""
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0], int(node.args[1])  # type: ignore[arg-type]
    return node, 0


@dataclass(frozen=True)
class _Facts:
    """What is asked of a node again and again; valid while its arguments are the same objects."""

    args: Any
    kwargs: Any
    reads: list[Value]
    view: bool


_FACTS: WeakKeyDictionary[fx.Node, _Facts] = WeakKeyDictionary()


def _facts(node: fx.Node) -> _Facts:
    known = _FACTS.get(node)
    if known is None or known.args is not node.args or known.kwargs is not node.kwargs:
        given = [value(n) for n in operands(node)]
        known = _Facts(node.args, node.kwargs, given, _is_view(node, given))
        _FACTS[node] = known
    return known


def reads(node: fx.Node) -> list[Value]:
    """The values of a node's tensor operands, in the order of `operands`."""
    return _facts(node).reads


def is_view(node: fx.Node) -> bool:
    """Whether a node's result is (a part of) its first operand's memory, at no cost."""
    return _facts(node).view


def tensors(node: fx.Node) -> tuple[torch.Tensor, ...]:
    """The tensors a node makes."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return (val,)
    return tuple(v for v in val if isinstance(v, torch.Tensor)) if isinstance(val, (tuple, list)) else ()


def tensor(v: Value) -> torch.Tensor:
    node, i = v
    return tensors(node)[i]


def flows(v: Value) -> bool:
    """Whether a gradient flows through a value."""
    node, i = v
    flag = node.meta.get("requires_grad", False)
    return bool(flag[i]) if isinstance(flag, (tuple, list)) else bool(flag)


def dims(v: Value) -> tuple[frozenset[str], ...]:
    """For each dim, which of batch and sequence its size depends on."""
    node, i = v
    found = node.meta.get("dims", ())
    nested = isinstance(node.meta.get("val"), (tuple, list))
    return tuple(found[i]) if nested and found else tuple(found)


def _is_view(node: fx.Node, given: list[Value]) -> bool:
    if node.op != "call_function":
        return False
    if op_name(node) in VIEWS:
        return True
    if not given or len(tensors(node)) != 1 or not tensors(given[0][0]):
        return False
    if op_name(node) in ("reshape", "contiguous", "flatten") and heads_back(given[0][0]):
        return True
    return shares(tensors(node)[0], tensor(given[0]))


def heads_back(node: fx.Node) -> bool:
    """Whether a value is a fused attention's output with heads and sequence swapped back. Kernels lay their output out like
    the queries, so that this is contiguous where those were swapped, too; traced on the meta device it does not look so."""
    while node.op == "call_function" and op_name(node) in ("reshape", "contiguous", "view", "transpose", "permute"):
        node = reads(node)[0][0]
    if node.op != "call_function" or "attention" not in op_name(node):
        return False
    query = tensor(reads(node)[0])
    return query.dim() != 4 or query.shape[1] == 1 or query.stride(1) < query.stride(2)


def shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two traced tensors have one storage."""
    try:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return False


def origin(v: Value) -> fx.Node:
    """The node a value is a view or a cast of. The half-precision copy of a parameter counts as the parameter: what
    copies take is priced with the parameters, not with the activations."""
    node = v[0]
    while (is_view(node) or op_name(node) == "to") and reads(node):
        node = reads(node)[0][0]
    return node


def parameter(v: Value) -> fx.Node | None:
    """The parameter placeholder a value is a view or a cast of, or None."""
    node = origin(v)
    return node if node.op == "placeholder" and node.meta.get("kind") == "parameter" else None


def stored(v: Value) -> bool:
    """Whether a value is a view or a cast of a parameter, a buffer or a constant: no activation."""
    node = origin(v)
    return node.op == "placeholder" and node.meta.get("kind") in ("parameter", "buffer", "constant")


def numel(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= int(n)
    return total


def local_numel(v: Value, placement: Placement, degree: int) -> int:
    """Elements of a value one device holds."""
    return numel(local_shape(placement, tuple(tensor(v).shape), degree))
