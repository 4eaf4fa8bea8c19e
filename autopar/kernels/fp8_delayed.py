"""A linear layer in 8-bit floating point whose scales come from earlier steps: `fp8_linear_delayed`, and how they move on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.kernels.backend import wide
from autopar.kernels.fp8 import fits

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
"""Activations and weights, and gradients: Transformer Engine's ``Format.HYBRID`` (Micikevicius et al. 2022, section 5)."""
ROWS = (FORWARD, FORWARD, BACKWARD)
X, WEIGHT, GRADIENT = range(3)
OBSERVED, SCALE, HISTORY = 0, 1, 2
"""Rows and columns of a layer's state (3, 2 + length of the history): the largest magnitude of this step so far, what
tensors are multiplied by before they are rounded (0 before the first step: 1), and the largest magnitudes of earlier
steps, newest first."""

_library = torch.library.Library("autopar", "FRAGMENT")
SIGNATURE = "Tensor x, Tensor weight, Tensor? bias, Tensor state, ScalarType dtype, ScalarType grad_dtype"
_library.define(f"fp8_linear_delayed({SIGNATURE}) -> Tensor")


def state_shape(history: int) -> tuple[int, int]:
    """The shape of a layer's state; it begins as zeros."""
    return len(ROWS), HISTORY + history


def scales_of(state: Tensor) -> Tensor:
    scales = state[:, SCALE]
    return torch.where(scales > 0, scales, 1.0)


def fp8_linear_delayed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    dtype: torch.dtype = FORWARD,
    grad_dtype: torch.dtype = BACKWARD,
) -> Tensor:
    """``x @ weight.T + bias`` with both factors rounded to ``dtype`` (float8_e4m3fn) by the scales in ``state``; x (…, in),
    weight (out, in), bias (out) or None; the result has x's dtype. The gradient of the result is rounded to ``grad_dtype``
    (float8_e5m2), and both products of the backward pass take rounded factors.

    What is beyond the dtype's range after scaling becomes its largest number. While gradients are enabled the largest
    magnitudes of x, weight and gradient are noted in ``state`` *in place* (as `aten.batch_norm` does with its running
    statistics; autograd takes no operator that says so in its schema). Noting is a maximum, so that it does not matter how
    often a micro-batch runs or in which order: recomputed activations are noted twice to no effect. The scales do not
    change before `fp8_advance_`. Any other dtypes round nothing.
    """
    return torch.ops.autopar.fp8_linear_delayed.default(x, weight, bias, state, dtype, grad_dtype)


def compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, dtype: torch.dtype, grad_dtype: torch.dtype
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    scales = scales_of(state)
    y = product(flat, weight, scales[X], scales[WEIGHT], dtype, dtype).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype
) -> Tensor:
    """``a @ b.T`` of (m, k) and (n, k), both rounded, in a's dtype; sums in float32."""
    if a_dtype not in ROWS:
        return a @ b.t()
    a8, b8 = rounded(a, a_scale, a_dtype), rounded(b, b_scale, b_dtype)
    inverse = (1.0 / a_scale, 1.0 / b_scale)
    if fits(a, b):
        return torch._scaled_mm(a8, b8.t(), scale_a=inverse[0], scale_b=inverse[1], out_dtype=a.dtype)
    exact = wide(a.dtype)
    return ((a8.to(exact) @ b8.to(exact).t()) * (inverse[0] * inverse[1])).to(a.dtype)


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` times ``scale`` in ``dtype``; contiguous, as the hardware's products want it."""
    largest = torch.finfo(dtype).max
    return (x.to(wide(x.dtype)) * scale).clamp(-largest, largest).to(dtype).contiguous()


@torch.no_grad()
def observe(state: Tensor, row: int, x: Tensor) -> None:
    """Note the largest magnitude of ``x``; a NaN counts as infinite."""
    if not x.numel():
        return
    seen = torch.nan_to_num(x.abs().amax().to(state.dtype), nan=float("inf"), posinf=float("inf"))
    state[row, OBSERVED].copy_(torch.maximum(state[row, OBSERVED], seen))


class Rounding(torch.autograd.Function):
    """The gradients: of x from rounded gradient and weight, of the weight from rounded gradient and x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *dtypes: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.state, ctx.dtypes = state, dtypes  # not saved: what is noted in it meanwhile is not a change of its scales
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.autopar.fp8_linear_delayed.default(x, weight, bias, state, *dtypes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dtype, grad_dtype = ctx.dtypes
        observe(ctx.state, GRADIENT, grad)
        flat, rows, scales = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), scales_of(ctx.state)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = product(flat, weight.t(), scales[GRADIENT], scales[WEIGHT], grad_dtype, dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = product(flat.t(), rows.t(), scales[GRADIENT], scales[X], grad_dtype, dtype)
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return of_x, of_weight, of_bias, None, None, None


def differentiable(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, dtype: torch.dtype, grad_dtype: torch.dtype
) -> Tensor:
    if torch.is_grad_enabled():
        observe(state, X, x)
        observe(state, WEIGHT, weight)
    return Rounding.apply(x, weight, bias, state, dtype, grad_dtype)


_library.impl("fp8_linear_delayed", compute, "CompositeExplicitAutograd")
_library.impl("fp8_linear_delayed", differentiable, "Autograd")


@torch.library.register_fake("autopar::fp8_linear_delayed", lib=_library)
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, dtype: torch.dtype, grad_dtype: torch.dtype
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# ------------------------------------------------------------------ between steps


@torch.library.custom_op("autopar::fp8_advance_", mutates_args=("state",))
def fp8_advance_(state: Tensor, margin: float, latest: bool) -> None:
    """After a step: what was observed goes into the history, and the scale becomes ``max(dtype) / amax / 2**margin``, amax
    the largest of the history (``latest``: what was just observed).

    Where that is zero, or nothing finite was observed, the scale stays as it is. As Transformer Engine's
    ``DelayedScaling`` does it (`transformer_engine.common.recipe.DelayedScaling`, ``amax_compute_algo`` max or
    most_recent; common/recipe/delayed_scaling.cu), but that an infinite observation (an overflow) does not enter the history.
    """
    seen, past = state[:, OBSERVED].clone(), state[:, HISTORY:]
    finite = torch.isfinite(seen) & (seen > 0)
    moved = torch.cat([torch.where(finite, seen, 0.0)[:, None], past[:, :-1]], 1)
    past.copy_(torch.where(finite[:, None], moved, past))
    amax = past[:, 0] if latest else past.amax(1)
    largest = torch.tensor([torch.finfo(d).max for d in ROWS], dtype=state.dtype, device=state.device)
    scale = (largest / amax / 2.0**margin).clamp(max=torch.finfo(torch.float32).max)
    state[:, SCALE].copy_(torch.where(amax > 0, scale, state[:, SCALE]))
    state[:, OBSERVED].zero_()


@fp8_advance_.register_fake
def _(state: Tensor, margin: float, latest: bool) -> None:
    return None
