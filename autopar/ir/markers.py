"""Operators that exist only while tracing: they mark where a repeated block begins and ends, or stand for all of it.

`enter` and `leave` are identities around an instance that is traced inline; `block` stands for a later instance of
the same signature; `function` stands for a custom `torch.autograd.Function`, whose backward export would lose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Outputs:
    """What an opaque call returns: fake tensors of the right metadata."""

    tensors: tuple[torch.Tensor, ...]
    requires_grad: tuple[bool, ...]


RECORDED: dict[str, Outputs] = {}
"""Outputs by key, filled while a trace runs and emptied after it."""


def _defined() -> None:
    library = torch.library.custom_op

    @library("autopar::enter", mutates_args=())
    def enter(xs: list[torch.Tensor], key: str) -> list[torch.Tensor]:
        return [x.clone() for x in xs]

    @library("autopar::leave", mutates_args=())
    def leave(xs: list[torch.Tensor], key: str) -> list[torch.Tensor]:
        return [x.clone() for x in xs]

    @library("autopar::block", mutates_args=())
    def block(xs: list[torch.Tensor], key: str) -> list[torch.Tensor]:
        raise RuntimeError("autopar::block stands for a block while tracing; it cannot be run")

    @library("autopar::function", mutates_args=())
    def function(xs: list[torch.Tensor], key: str) -> list[torch.Tensor]:
        raise RuntimeError("autopar::function stands for an autograd.Function while tracing; it cannot be run")

    def same(xs: list[torch.Tensor], key: str) -> list[torch.Tensor]:
        return [torch.empty_like(x) for x in xs]

    def recorded(xs: list[torch.Tensor], key: str) -> list[torch.Tensor]:
        return [torch.empty_like(t) for t in RECORDED[key].tensors]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
        flags = [x.requires_grad for x in inputs[0]]
        ctx.mark_non_differentiable(*[o for o, f in zip(output, flags, strict=True) if not f])

    def keep_recorded(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
        flags = RECORDED[inputs[1]].requires_grad
        ctx.mark_non_differentiable(*[o for o, f in zip(output, flags, strict=True) if not f])

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("a trace is never differentiated")

    pairs: list[tuple[Any, Callable[..., Any], Callable[..., Any]]] = [
        (enter, same, keep),
        (leave, same, keep),
        (block, recorded, keep_recorded),
        (function, recorded, keep_recorded),
    ]
    for op, fake, context in pairs:
        op.register_fake(fake)
        op.register_autograd(backward, setup_context=context)


_defined()
ENTER = torch.ops.autopar.enter.default
LEAVE = torch.ops.autopar.leave.default
BLOCK = torch.ops.autopar.block.default
FUNCTION = torch.ops.autopar.function.default
