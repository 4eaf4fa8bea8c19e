"""Rotary positions (Su et al. 2021): `rotary`, an operator with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.errors import KernelError
from autopar.kernels.backend import on_triton, wide


@torch.library.custom_op("autopar::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn pairs of the last dim by the angles whose cosines and sines are given: ``x · cos + swapped(x) · sin``.

    x (batch, a, b, width), a and b heads and length in either order. cos and sin (1 or batch, 1 or a, 1 or b, size), size ≤
    width: the first ``size`` entries turn, the rest stays. Pairs are (i, i + size / 2), or ``interleaved`` (2i, 2i + 1).
    Computed in float32 at least, rounded to the dtype of x. No gradient flows to cos and sin.
    """
    check(x, cos, sin)
    return turned(x, cos, sin, interleaved, False)


@torch.library.custom_op("autopar::rotary_backward", mutates_args=())
def rotary_backward(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of x: the transposed turn."""
    return turned(grad, cos, sin, interleaved, True)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    if on_triton(x) and x.numel():
        from autopar.kernels.device.rotary import turn

        return turn(x, cos, sin, interleaved, back)
    dtype, size = wide(x.dtype), cos.shape[-1]
    v, c, s = x[..., :size].to(dtype), cos.to(dtype), sin.to(dtype)
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, size // 2), slice(size // 2, None))
    )
    made = torch.empty_like(x)
    a, b = v[..., first], v[..., second]
    if back:
        made[..., :size][..., first] = a * c[..., first] + b * s[..., second]
        made[..., :size][..., second] = b * c[..., second] - a * s[..., first]
    else:
        made[..., :size][..., first] = a * c[..., first] - b * s[..., first]
        made[..., :size][..., second] = b * c[..., second] + a * s[..., second]
    made[..., size:] = x[..., size:]
    return made


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    fits = x.dim() == 4 == cos.dim() and cos.shape == sin.shape and 0 < cos.shape[-1] <= x.shape[-1]
    if not fits or cos.shape[-1] % 2 or any(c not in (1, n) for c, n in zip(cos.shape[:3], x.shape[:3], strict=True)):
        raise KernelError(
            "rotary: x is (batch, a, b, width), cos and sin alike (1 or batch, 1 or a, 1 or b, an even size up to width); "
            f"got x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return torch.empty_like(x)


@rotary_backward.register_fake
def _(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(grad)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return rotary_backward(grad, *ctx.saved_tensors, ctx.interleaved), None, None, None


rotary.register_autograd(backward, setup_context=setup_context)
