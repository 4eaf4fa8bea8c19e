"""Norms over the last dim, alone or of a sum: `rms_norm`, `layer_norm`, `add_rms_norm`, `add_layer_norm`, with gradients.

All compute in float32 (float64 for float64) and round once, at the end. Statistics are computed again in the backward: nothing is
kept but the operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.errors import KernelError
from autopar.kernels.backend import on_triton, wide

WIDEST = 65_536
"""Entries of a row that one program of the Triton kernels holds; wider rows take the reference."""


@torch.library.custom_op("autopar::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / √(mean(x²) + eps) · weight`` over the last dim. x (…, n); weight (n) or None."""
    return normed(x, None, weight, None, eps, False)[0]


@torch.library.custom_op("autopar::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x − mean) / √(variance + eps) · weight + bias`` over the last dim. x (…, n); weight and bias (n) or None."""
    return normed(x, None, weight, bias, eps, True)[0]


@torch.library.custom_op("autopar::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of ``x + residual``, and that sum, of one shape and dtype."""
    return normed(x, residual, weight, None, eps, False)


@torch.library.custom_op("autopar::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of ``x + residual``, and that sum, of one shape and dtype."""
    return normed(x, residual, weight, bias, eps, True)


@torch.library.custom_op("autopar::norm_backward", mutates_args=())
def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, centered: bool, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of a norm; ``centered`` is a layer norm. Empty ones for those that are not there."""
    if on_triton(x) and x.shape[-1] <= WIDEST and x.numel():
        from autopar.kernels.device.norm import backward

        return backward(grad, x, weight, eps, centered, biased)
    return reference_backward(grad, x, weight, eps, centered, biased)


def normed(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """The norm of x (+ residual), and what was normed."""
    check(x, residual, weight, bias)
    if on_triton(x) and x.shape[-1] <= WIDEST and x.numel():
        from autopar.kernels.device.norm import forward

        return forward(x, residual, weight, bias, eps, centered)
    total = x if residual is None else x + residual
    dtype, size = wide(x.dtype), x.shape[-1:]
    w, b = (None if p is None else p.to(dtype) for p in (weight, bias))
    if centered:
        made = torch.nn.functional.layer_norm(total.to(dtype), size, w, b, eps)
    else:
        made = torch.nn.functional.rms_norm(total.to(dtype), size, w, eps)
    return made.to(x.dtype), total


def check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise KernelError(f"norm: {name} has one number for each of {x.shape[-1]} entries; got {tuple(p.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise KernelError(
            f"norm: x and residual have one shape and dtype; got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(residual.shape)} {residual.dtype}"
        )


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, centered: bool, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(x.dtype)
    g, v = grad.to(dtype), x.to(dtype)
    if centered:
        v = v - v.mean(-1, keepdim=True)
    scale = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    unit = v * scale
    rows = tuple(range(x.dim() - 1))
    h = g if weight is None else g * weight.to(dtype)
    dx = h - unit * (h * unit).mean(-1, keepdim=True)
    if centered:
        dx = dx - h.mean(-1, keepdim=True)
    dw = x.new_empty(0) if weight is None else (g * unit).sum(rows).to(weight.dtype)
    return (dx * scale).to(x.dtype), dw, g.sum(rows).to(x.dtype) if biased else x.new_empty(0)


# ------------------------------------------------------------------ shapes and gradients


@rms_norm.register_fake
@layer_norm.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@add_rms_norm.register_fake
@add_layer_norm.register_fake
def _(x: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, centered: bool, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        x.new_empty(x.shape[-1] if biased else 0),
    )


def _connect(operator: Any, centered: bool, added: bool) -> None:
    """Give an operator its gradient. Its operands: x, residual where ``added``, weight, bias where ``centered``, eps."""
    first = 2 if added else 1

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, bias = inputs[first], inputs[first + 1] if centered else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1] if added else inputs[0], weight)
        ctx.eps, ctx.bias = inputs[-1], None if bias is None else bias.dtype

    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None = None) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        dx, dw, db = grad_sum, None, None
        if grad is not None:
            dx, dw, db = norm_backward(grad, x, weight, ctx.eps, centered, ctx.bias is not None)
            dx = dx if grad_sum is None else dx + grad_sum
        dw = None if weight is None else dw
        db = None if ctx.bias is None or db is None else db.to(ctx.bias)
        return (dx, *((dx,) if added else ()), dw, *((db,) if centered else ()), None)

    operator.register_autograd(backward, setup_context=setup_context)


_connect(rms_norm, False, False)
_connect(layer_norm, True, False)
_connect(add_rms_norm, False, True)
_connect(add_layer_norm, True, True)
