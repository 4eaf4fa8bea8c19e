"""One call of an operator, as rules read it: arguments by name, shapes, and helpers that write the notation."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import fx

from autopar.ir.ops import operands

Shape = tuple[int, ...]


@cache
def parameters(target: torch._ops.OpOverload) -> tuple[tuple[str, bool, bool, Any], ...]:
    """(name, keyword only, has default, default) of every argument of an operator."""
    return tuple((a.name, a.kwarg_only, a.has_default_value(), a.default_value) for a in target._schema.arguments)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of the operator's schema, defaults filled in."""
    found, positional = {}, list(node.args)
    for i, (name, keyword, has_default, default) in enumerate(parameters(node.target)):  # type: ignore[arg-type]
        if not keyword and i < len(positional):
            found[name] = positional[i]
        elif name in node.kwargs:
            found[name] = node.kwargs[name]
        elif has_default:
            found[name] = default
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a node's value, in order; a value without tensors (a number) has none."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return []


def shape(node: Any) -> Shape:
    """The shape of a node that holds one tensor."""
    return tuple(node.meta["val"].shape)


def input_shapes(node: fx.Node) -> list[Shape]:
    return [shape(n) for n in operands(node)]


def output_shapes(node: fx.Node) -> list[Shape]:
    return [tuple(t.shape) for t in tensors(node.meta["val"])]


def letters(count: int, prefix: str = "a") -> list[str]:
    """``a0 a1 …``: names for the dims of a tensor."""
    return [f"{prefix}{i}" for i in range(count)]


def wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def frozen(names: list[str], dims: Iterable[int], mark: str = "!") -> list[str]:
    """The letters with a mark on some of them."""
    chosen = {wrap(d, len(names)) for d in dims}
    return [f"{x}{mark}" if i in chosen else x for i, x in enumerate(names)]


def term(names: Iterable[str], mark: str = "") -> str:
    """One operand or output: ``a0 a1 ~``; a tensor without dims is ``.``."""
    return f"{' '.join(names) or '.'} {mark}".rstrip()


def broadcast(shape_: Shape, names: list[str]) -> list[str]:
    """The letters of an operand that broadcasts against ``names``, aligned at the end; ``1`` for a dim of length 1."""
    tail = names[len(names) - len(shape_) :]
    return ["1" if n == 1 else x for n, x in zip(shape_, tail, strict=True)]


def sentence(node: fx.Node, out: str, **inputs: str) -> str:
    """The notation of a call from its operands by argument name, in the order in which the call writes them.

    Operands that the call leaves out are left out.
    """
    positional = [p[0] for p in parameters(node.target)][: len(node.args)]  # type: ignore[arg-type]
    order = [*zip(positional, node.args, strict=True), *node.kwargs.items()]
    return f"{', '.join(inputs[name] for name, value in order if isinstance(value, fx.Node))} -> {out}"
