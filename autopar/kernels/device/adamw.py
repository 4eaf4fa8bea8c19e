"""AdamW: entry by entry, each read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.device.common import accumulator

BLOCK = 2048


@triton.jit
def update(
    parameter, grad, first, second, copy, count, kept, rate, beta1, beta2, correction, eps, scale,
    BLOCK: tl.constexpr, COPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``kept`` = 1 − lr · decay, ``rate`` = lr / (1 − β₁ᵗ), ``correction`` = 1 − β₂ᵗ."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    fits = at < count
    g = tl.load(grad + at, fits, 0.0).to(ACC) * scale
    m = tl.load(first + at, fits, 0.0).to(ACC)
    v = tl.load(second + at, fits, 0.0).to(ACC)
    p = tl.load(parameter + at, fits, 0.0).to(ACC)
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    p = p * kept - rate * m / (tl.sqrt(v / correction) + eps)
    tl.store(first + at, m.to(first.dtype.element_ty), fits)
    tl.store(second + at, v.to(second.dtype.element_ty), fits)
    tl.store(parameter + at, p.to(parameter.dtype.element_ty), fits)
    if COPY:
        tl.store(copy + at, p.to(copy.dtype.element_ty), fits)


def step(
    parameter: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    number: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    copy: Tensor | None,
) -> None:
    """One step of `adamw_`."""
    count = parameter.numel()
    with torch.cuda.device_of(parameter):
        update[(-(-count // BLOCK),)](
            parameter, grad.contiguous(), first, second, parameter if copy is None else copy, count,
            1 - lr * weight_decay, lr / (1 - beta1**number), beta1, beta2, 1 - beta2**number, eps, scale,
            BLOCK=BLOCK, COPY=copy is not None, ACC=accumulator(parameter.dtype), num_warps=8,
        )  # fmt: skip
