"""A user's `torch.autograd.Function`: split like a pointwise operator where forward and backward are pointwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.ir.capture import CustomFunction, Slot
from autopar.ir.functions import FunctionCall
from autopar.ir.ops import operands
from autopar.sharding.call import broadcast, letters, shape, term
from autopar.sharding.example import example, tensor
from autopar.sharding.rule import rule


class ScaledCube(torch.autograd.Function):
    """An example: 2 x³ with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return scale * x**3

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * ctx.scale * x**2 * grad, None


CUBE = FunctionCall(CustomFunction(ScaledCube, (Slot(0), 2.0), single=True, pointwise=True))


@rule(FunctionCall, examples=[example(CUBE, tensor(4, 6))])
def function(node: fx.Node) -> str | None:
    target: Any = node.target
    if not target.pointwise:
        return None
    names = letters(len(shape(node)))
    return f"{', '.join(term(broadcast(shape(o), names)) for o in operands(node))} -> {term(names)}"
