"""AdamW (Loshchilov and Hutter 2019) in one pass over a parameter: `adamw_`, which changes its operands."""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.errors import KernelError
from autopar.kernels.backend import on_triton


@torch.library.custom_op("autopar::adamw_", mutates_args=("parameter", "first", "second", "copy"))
def adamw_(
    parameter: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    copy: Tensor | None = None,
) -> None:
    """One step, in place, as torch.optim.AdamW takes it; ``step`` counts from 1.

    parameter, first and second (the moments) have one shape and lie contiguous; grad has that shape and any floating dtype and is
    multiplied by ``scale`` first (clipping, or the loss scale's inverse). ``copy``: a half-precision copy of the parameter,
    written along. Computed in float32, float64 for a float64 parameter. Raises `KernelError` for other shapes.
    """
    tensors = [t for t in (parameter, first, second, copy) if t is not None]
    if any(t.shape != parameter.shape or not t.is_contiguous() for t in tensors) or grad.shape != parameter.shape:
        raise KernelError(
            "adamw_: parameter, moments and copy have one shape and lie contiguous, the gradient has that shape; got "
            f"{[tuple(t.shape) for t in (*tensors, grad)]}"
        )
    if not parameter.numel():
        return
    if on_triton(parameter):
        from autopar.kernels.device.adamw import step as run

        run(parameter, grad, first, second, step, lr, beta1, beta2, eps, weight_decay, scale, copy)
        return
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    g = grad.to(wide) * scale if scale != 1.0 else grad.to(wide)
    m = first.to(wide).lerp(g, 1 - beta1)
    v = second.to(wide).mul(beta2).addcmul_(g, g, value=1 - beta2)
    p = parameter.to(wide) * (1 - lr * weight_decay)
    root = (v / (1 - beta2**step)).sqrt_().add_(eps)
    p.addcdiv_(m, root, value=-lr / (1 - beta1**step))
    for target, made in ((first, m), (second, v), (parameter, p)):
        target.copy_(made)
    if copy is not None:
        copy.copy_(p)


@adamw_.register_fake
def _(
    parameter: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    copy: Tensor | None = None,
) -> None:
    return None
