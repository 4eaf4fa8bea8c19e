"""The output layer and its loss in one: `linear_cross_entropy`, which never holds the logits, and what it is made of.

Logits are made tile by tile, forward, and again backward; kept are the log-sum-exp of each row and the operands. (The
idea: Wijmans et al. 2024, "Cut your losses in large-vocabulary language models".)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.errors import KernelError
from autopar.kernels.backend import on_triton, wide

TILE = 1 << 22
"""Logits that the reference holds at once: 16 MB in float32."""


@torch.library.custom_op("autopar::linear_logsumexp", mutates_args=())
def linear_logsumexp(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of every row of the logits, and the label's logit (0 where the label is no class of these).

    x (rows, width), weight (classes, width), labels (rows), bias (classes); logits are ``x @ weight.T + bias``, with a
    ``softcap`` c: c · tanh(logit / c). Both results (rows) in float32 at least; both have gradients. With the classes split,
    the results over parts make those over all: log-sum-exps add up in the exponent, labels' logits by themselves.
    """
    check(x, weight, labels, bias)
    if on_triton(x, True) and x.numel():
        from autopar.kernels.device.loss import forward

        return forward(x, weight, labels, bias, softcap)
    dtype = wide(x.dtype)
    top = x.new_full((x.shape[0],), -torch.inf, dtype=dtype)
    total, picked = torch.zeros_like(top), torch.zeros_like(top)
    for begin, end in tiles(x, weight):
        logits, _ = made(x, weight, bias, softcap, begin, end)
        larger = torch.maximum(top, logits.amax(1))
        at = labels - begin
        here = (at >= 0) & (at < end - begin)
        picked += logits.gather(1, at.masked_fill(~here, 0).unsqueeze(1)).squeeze(1).masked_fill(~here, 0.0)
        total = total * (top - larger).exp_() + logits.sub_(larger.unsqueeze(1)).exp_().sum(1)
        top = larger
    return top + total.log(), picked


@torch.library.custom_op("autopar::linear_logsumexp_backward", mutates_args=())
def linear_logsumexp_backward(
    grad_lse: Tensor | None,
    grad_picked: Tensor | None,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    lse: Tensor,
    weighted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty ones where there is no bias, or where not ``weighted``: a frozen weight)."""
    if on_triton(x, True) and x.numel():
        from autopar.kernels.device.loss import backward

        return backward(grad_lse, grad_picked, x, weight, labels, bias, softcap, lse, weighted)
    dx = torch.zeros(x.shape, dtype=lse.dtype, device=x.device)
    dw = torch.empty_like(weight) if weighted else weight.new_empty(0)
    db = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    for begin, end in tiles(x, weight):
        logits, slope = made(x, weight, bias, softcap, begin, end)
        grad = logits.sub_(lse.unsqueeze(1)).exp_()
        grad *= 0.0 if grad_lse is None else grad_lse.unsqueeze(1)
        if grad_picked is not None:
            at = labels - begin
            here = (at >= 0) & (at < end - begin)
            added = grad_picked.masked_fill(~here, 0.0).to(grad.dtype)
            grad.scatter_add_(1, at.masked_fill(~here, 0).unsqueeze(1), added.unsqueeze(1))
        if slope is not None:
            grad *= slope
        if bias is not None:
            db[begin:end] = grad.sum(0)
        grad = grad.to(x.dtype)
        dx += grad @ weight[begin:end]
        if weighted:
            torch.mm(grad.T, x, out=dw[begin:end])
    return dx.to(x.dtype), dw, db


def tiles(x: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    """Ranges of classes."""
    classes = weight.shape[0]
    step = max(TILE // max(x.shape[0], 1), 64)
    return [(i, min(i + step, classes)) for i in range(0, classes, step)]


def made(
    x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, begin: int, end: int
) -> tuple[Tensor, Tensor | None]:
    """Logits of some classes, and the slope of the soft cap."""
    logits = (x @ weight[begin:end].T).to(wide(x.dtype))
    if bias is not None:
        logits += bias[begin:end]
    if not softcap:
        return logits, None
    t = logits.div_(softcap).tanh_()
    return t * softcap, 1 - t * t


def check(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1] and labels.shape == x.shape[:1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise KernelError(
            "linear_cross_entropy: x is (rows, width), weight (classes, width), labels (rows), bias (classes); got x "
            f"{tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
            + ("" if bias is None else f", bias {tuple(bias.shape)}")
        )


@linear_logsumexp.register_fake
def _(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    rows = x.new_empty(x.shape[:1], dtype=wide(x.dtype))
    return rows, torch.empty_like(rows)


@linear_logsumexp_backward.register_fake
def _(
    grad_lse: Tensor | None,
    grad_picked: Tensor | None,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    lse: Tensor,
    weighted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape if weighted else 0),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, labels, bias, ctx.softcap = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, labels, bias, output[0])


def backward(ctx: Any, grad_lse: Tensor | None, grad_picked: Tensor | None) -> tuple[Any, ...]:
    x, weight, labels, bias, lse = ctx.saved_tensors
    weighted = ctx.needs_input_grad[1]
    dx, dw, db = linear_logsumexp_backward(grad_lse, grad_picked, x, weight, labels, bias, ctx.softcap, lse, weighted)
    return dx, dw if weighted else None, None, None if bias is None else db, None


linear_logsumexp.register_autograd(backward, setup_context=setup_context)


# ------------------------------------------------------------------ the loss


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
) -> Tensor:
    """The sum over rows of the cross-entropy of ``x @ weight.T + bias`` against ``labels``, without holding these logits.

    Operands as for `linear_logsumexp`; rows whose label is ``ignore_index`` count nothing. A number, float32 at least.
    """
    lse, picked = torch.ops.autopar.linear_logsumexp(x, weight, labels, bias, softcap)
    return (lse - picked).masked_fill(labels == ignore_index, 0.0).sum()


_library = torch.library.Library("autopar", "FRAGMENT")
_library.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, Tensor? bias=None, int ignore_index=-100, "
    "float softcap=0.0) -> Tensor"
)
_library.impl("linear_cross_entropy", linear_cross_entropy, "CompositeImplicitAutograd")
