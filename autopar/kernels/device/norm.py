"""Norms: one program holds whole rows, so that each entry is read once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.backend import power_of_two
from autopar.kernels.device.common import accumulator, programs


@triton.jit
def normalize(
    x, residual, weight, bias, out, total, rows, width, x_row, r_row, eps,
    BLOCK: tl.constexpr, CENTERED: tl.constexpr, ADDED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One row. ``out`` and ``total`` (the sum, where ADDED) are dense."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    fits = at < width
    v = tl.load(x + row * x_row + at, fits, 0.0)
    if ADDED:
        v = (v.to(ACC) + tl.load(residual + row * r_row + at, fits, 0.0).to(ACC)).to(v.dtype)
        tl.store(total + row * width + at, v, fits)
    v = v.to(ACC)
    if CENTERED:
        v = tl.where(fits, v - tl.sum(v, 0) / width, 0.0)
    y = v / tl.sqrt(tl.sum(v * v, 0) / width + eps)
    if WEIGHTED:
        y *= tl.load(weight + at, fits, 0.0).to(ACC)
    if BIASED:
        y += tl.load(bias + at, fits, 0.0).to(ACC)
    tl.store(out + row * width + at, y.to(out.dtype.element_ty), fits)


@triton.jit
def gradients(
    grad, x, weight, dx, dw, db, rows, width, g_row, x_row, eps,
    BLOCK: tl.constexpr, CENTERED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every so many rows: their dx, and this program's share of the sums dw and db."""
    first, step = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    fits = at < width
    w = tl.load(weight + at, fits, 0.0).to(ACC) if WEIGHTED else 1.0
    of_weight = tl.zeros([BLOCK], ACC)
    of_bias = tl.zeros([BLOCK], ACC)
    for row in range(first, rows, step):
        v = tl.load(x + row * tl.cast(x_row, tl.int64) + at, fits, 0.0).to(ACC)
        g = tl.load(grad + row * tl.cast(g_row, tl.int64) + at, fits, 0.0).to(ACC)
        if CENTERED:
            v = tl.where(fits, v - tl.sum(v, 0) / width, 0.0)
        scale = 1 / tl.sqrt(tl.sum(v * v, 0) / width + eps)
        v *= scale
        if WEIGHTED:
            of_weight += g * v
        if BIASED:
            of_bias += g
        h = g * w
        d = h - v * (tl.sum(h * v, 0) / width)
        if CENTERED:
            d -= tl.sum(h, 0) / width
        tl.store(dx + row * tl.cast(width, tl.int64) + at, (d * scale).to(dx.dtype.element_ty), fits)
    if WEIGHTED:
        tl.store(dw + first.to(tl.int64) * width + at, of_weight, fits)
    if BIASED:
        tl.store(db + first.to(tl.int64) * width + at, of_bias, fits)


def flat(x: Tensor) -> Tensor:
    """``x`` as (rows, width), entries of a row next to each other; a view where its memory allows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """The norm of x (+ residual), and what was normed."""
    rows, added = flat(x), None if residual is None else flat(residual)
    width = x.shape[-1]
    block = power_of_two(width)
    out = x.new_empty(x.shape)
    total = x if residual is None else x.new_empty(x.shape)
    r: Any = rows if added is None else added
    with torch.cuda.device_of(x):
        normalize[(rows.shape[0],)](
            rows, r, x if weight is None else weight, x if bias is None else bias, out, total, rows.shape[0], width,
            rows.stride(0), r.stride(0), eps, BLOCK=block, CENTERED=centered, ADDED=residual is not None,
            WEIGHTED=weight is not None, BIASED=bias is not None, ACC=accumulator(x.dtype), num_warps=warps(block),
        )  # fmt: skip
    return out, total


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, centered: bool, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty ones for those that are not there."""
    g, rows = flat(grad), flat(x)
    count, width = rows.shape
    block = power_of_two(width)
    many = min(count, programs(x.device))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx = x.new_empty(x.shape)
    dw = x.new_empty((many if weight is not None else 0, width), dtype=dtype)
    db = x.new_empty((many if biased else 0, width), dtype=dtype)
    with torch.cuda.device_of(x):
        gradients[(many,)](
            g, rows, x if weight is None else weight, dx, dw, db, count, width, g.stride(0), rows.stride(0), eps,
            BLOCK=block, CENTERED=centered, WEIGHTED=weight is not None, BIASED=biased, ACC=accumulator(x.dtype),
            num_warps=warps(block),
        )  # fmt: skip
    return (
        dx,
        x.new_empty(0) if weight is None else dw.sum(0).to(weight.dtype),
        db.sum(0).to(x.dtype) if biased else x.new_empty(0),
    )
