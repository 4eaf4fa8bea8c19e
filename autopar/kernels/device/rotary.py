"""Rotary positions: every pair is read once, in any memory layout of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.backend import power_of_two
from autopar.kernels.device.common import accumulator


@triton.jit
def turn_rows(
    x, cos, sin, out, rows, second, third, x0, x1, x2, x3, o0, o1, o2, o3, c0, c1, c2, c3, s0, s1, s2, s3, width,
    SIZE: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the first three dims. PAIRS and REST: powers of two that hold SIZE / 2 pairs and the rest of a row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    i0 = (row // (second * third)).to(tl.int64)[:, None]
    i1 = (row // third % second).to(tl.int64)[:, None]
    i2 = (row % third).to(tl.int64)[:, None]
    x_at = x + i0 * x0 + i1 * x1 + i2 * x2
    o_at = out + i0 * o0 + i1 * o1 + i2 * o2
    c_at = cos + i0 * c0 + i1 * c1 + i2 * c2
    s_at = sin + i0 * s0 + i1 * s1 + i2 * s2
    pair = tl.arange(0, PAIRS)[None, :]
    if INTERLEAVED:
        p = 2 * pair
        q = p + 1
    else:
        p = pair
        q = p + SIZE // 2
    fits = there & (pair < SIZE // 2)
    a = tl.load(x_at + p * x3, fits, 0.0).to(ACC)
    b = tl.load(x_at + q * x3, fits, 0.0).to(ACC)
    cos_a = tl.load(c_at + p * c3, fits, 0.0).to(ACC)
    cos_b = tl.load(c_at + q * c3, fits, 0.0).to(ACC)
    sin_a = tl.load(s_at + p * s3, fits, 0.0).to(ACC)
    sin_b = tl.load(s_at + q * s3, fits, 0.0).to(ACC)
    if BACK:
        made_a = a * cos_a + b * sin_b
        made_b = b * cos_b - a * sin_a
    else:
        made_a = a * cos_a - b * sin_a
        made_b = b * cos_b + a * sin_b
    tl.store(o_at + p * o3, made_a.to(out.dtype.element_ty), fits)
    tl.store(o_at + q * o3, made_b.to(out.dtype.element_ty), fits)
    if REST:
        rest = SIZE + tl.arange(0, REST)[None, :]
        more = there & (rest < width)
        tl.store(o_at + rest * o3, tl.load(x_at + rest * x3, more, 0.0), more)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    """`rotary` (``back``: its gradient) of x (batch, a, b, width)."""
    out = torch.empty_like(x)
    cos, sin = (t.expand(*x.shape[:3], t.shape[-1]) for t in (cos, sin))
    size, width = cos.shape[-1], x.shape[-1]
    rows = x.numel() // width
    pairs, rest = power_of_two(size // 2), power_of_two(width - size) if width > size else 0
    many = max(2048 // max(pairs, rest), 1)
    with torch.cuda.device_of(x):
        turn_rows[(-(-rows // many),)](
            x, cos, sin, out, rows, x.shape[1], x.shape[2], *x.stride(), *out.stride(), *cos.stride(), *sin.stride(),
            width, SIZE=size, PAIRS=pairs, REST=rest, ROWS=many, INTERLEAVED=interleaved, BACK=back,
            ACC=accumulator(x.dtype), num_warps=4,
        )  # fmt: skip
    return out
