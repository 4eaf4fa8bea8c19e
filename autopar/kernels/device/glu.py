"""Gated linear units: entry by entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.backend import power_of_two
from autopar.kernels.device.common import accumulator, sigmoid, tanh
from autopar.kernels.device.norm import flat


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    if ACTIVATION == "silu":
        s = sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if ACTIVATION == "gelu":
        half = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * half, half + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    t = tanh(inner)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)


@triton.jit
def gate_rows(
    gate, up, out, rows, width, g_row, u_row, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    fits = (row < rows) & (column < width)
    x = tl.load(gate + row * g_row + column, fits, 0.0).to(ACC)
    u = tl.load(up + row * u_row + column, fits, 0.0).to(ACC)
    value, _ = activated(x, ACTIVATION)
    tl.store(out + row * width + column, (value * u).to(out.dtype.element_ty), fits)


@triton.jit
def gradient_rows(
    grad, gate, up, d_gate, d_up, rows, width, d_row, g_row, u_row, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    fits = (row < rows) & (column < width)
    d = tl.load(grad + row * d_row + column, fits, 0.0).to(ACC)
    x = tl.load(gate + row * g_row + column, fits, 0.0).to(ACC)
    u = tl.load(up + row * u_row + column, fits, 0.0).to(ACC)
    value, slope = activated(x, ACTIVATION)
    tl.store(d_gate + row * width + column, (d * u * slope).to(d_gate.dtype.element_ty), fits)
    tl.store(d_up + row * width + column, (d * value).to(d_up.dtype.element_ty), fits)


def tiles(width: int) -> tuple[int, int]:
    """Rows and columns of a program: 2,048 entries."""
    columns = min(power_of_two(width), 1024)
    return 2048 // columns, columns


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) · up``."""
    out = gate.new_empty(gate.shape)
    g, u = flat(gate), flat(up)
    count, width = g.shape
    rows, columns = tiles(width)
    with torch.cuda.device_of(gate):
        gate_rows[(-(-count // rows), -(-width // columns))](
            g, u, out, count, width, g.stride(0), u.stride(0), COLUMNS=columns, ROWS=rows, ACTIVATION=activation,
            ACC=accumulator(gate.dtype), num_warps=4,
        )  # fmt: skip
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    d, g, u = flat(grad), flat(gate), flat(up)
    count, width = g.shape
    rows, columns = tiles(width)
    with torch.cuda.device_of(gate):
        gradient_rows[(-(-count // rows), -(-width // columns))](
            d, g, u, d_gate, d_up, count, width, d.stride(0), g.stride(0), u.stride(0), COLUMNS=columns, ROWS=rows,
            ACTIVATION=activation, ACC=accumulator(gate.dtype), num_warps=4,
        )  # fmt: skip
    return d_gate, d_up
