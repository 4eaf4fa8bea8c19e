"""A linear layer in 8-bit floating point: `fp8_linear`, scaled by row as it runs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 16  # elements: what the hardware's 8-bit products need of the inner and the outer width


@torch.library.custom_op("autopar::fp8_linear", mutates_args=())
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias`` with both factors rounded to ``dtype``, float8_e4m3fn; x (…, in), weight (out, in), bias
    (out) or None; the result has x's dtype.

    Every row of x and of weight has a scale of its own, its largest magnitude over the dtype's; sums are float32 (rowwise
    scaling, as `torch._scaled_mm` does in one kernel where the device has it). The gradient of x is such a product too,
    with gradient and weight scaled along the outer width; the gradient of weight is in x's dtype. Any other ``dtype``
    rounds nothing.
    """
    y = product(x.reshape(-1, x.shape[-1]), weight, dtype).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


@fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b.T`` of (m, k) and (n, k) in a's dtype."""
    if dtype != torch.float8_e4m3fn:
        return a @ b.t()
    (a8, a_scale), (b8, b_scale) = quantize(a, dtype), quantize(b, dtype)
    if fits(a, b):
        return torch._scaled_mm(a8, b8.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=a.dtype)
    return ((a8.float() * a_scale) @ (b8.float() * b_scale).t()).to(a.dtype)


def fits(a: Tensor, b: Tensor) -> bool:
    """Whether one kernel does it: widths in steps of 16, an output dtype it has, and a device with 8-bit products."""
    if a.shape[1] % STEP or b.shape[0] % STEP or a.dtype not in (torch.bfloat16, torch.float32) or not a.numel():
        return False
    if a.is_cuda:
        return a.dtype == torch.bfloat16 and torch.cuda.get_device_capability(a.device) >= (9, 0)
    return False  # CPUs emulate it: the widened product is the faster one there


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` (m, k) by rows: numbers in ``dtype`` and float32 scales (m, 1) whose product is x, rounded. A row of zeros has
    the scale 1."""
    largest = x.abs().amax(-1, keepdim=True).float() if x.shape[-1] else x.new_zeros(x.shape[0], 1).float()
    scale = torch.where(largest > 0, largest / torch.finfo(dtype).max, 1.0)
    return (x.float() / scale).to(dtype), scale


@torch.library.custom_op("autopar::fp8_linear_backward", mutates_args=())
def fp8_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those that are not ``wanted`` are empty."""
    flat, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    of_x = product(flat, weight.t(), dtype).view(x.shape) if wanted[0] else x.new_empty(0)
    of_weight = flat.t() @ rows if wanted[1] else x.new_empty(0)
    return of_x, of_weight, flat.sum(0) if wanted[2] else x.new_empty(0)


@fp8_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (tuple(x.shape), tuple(weight.shape), (weight.shape[0],))
    made = [x.new_empty(s if w else (0,)) for s, w in zip(sizes, wanted, strict=True)]
    return made[0], made[1], made[2]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.dtype = inputs
    ctx.save_for_backward(x, weight)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = fp8_linear_backward(grad, x, weight, ctx.dtype, wanted)
    return (*(g if w else None for g, w in zip(found, wanted, strict=True)), None)


fp8_linear.register_autograd(backward, setup_context=setup_context)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The widened product of the rounded factors, for tests: what any device's kernel must come to."""

    def rounded(t: Tensor) -> Tensor:
        numbers, scale = quantize(t.reshape(-1, t.shape[-1]), torch.float8_e4m3fn)
        return (numbers.double() * scale.double()).view(t.shape)

    assert math.prod(weight.shape) > 0, weight.shape
    return F.linear(rounded(x), rounded(weight), None if bias is None else bias.double())
