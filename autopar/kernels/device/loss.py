"""The output layer and its loss: tiles of logits that never leave a program, or never all of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.device.attention import soft_cap
from autopar.kernels.device.common import accumulator, precision, programs

CHUNK = 1 << 26
"""Gradients of logits that are held at once in the backward: 128 MB in half precision."""


@triton.jit
def logits_of(
    x, weight, bias, row, column, rows, classes, width, x_row, w_row, cap, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, BIASED: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile (M, N) of logits, −∞ beyond the last class, and the soft cap's tanh."""
    acc = tl.zeros([M, N], ACC)
    at = tl.arange(0, K)
    x_at = x + row.to(tl.int64)[:, None] * x_row + at[None, :]
    w_at = weight + column.to(tl.int64)[None, :] * w_row + at[:, None]
    there, here = (row < rows)[:, None], (column < classes)[None, :]
    for start in range(0, width, K):
        fits = start + at < width
        a = tl.load(x_at + start, there & fits[None, :], 0.0)
        b = tl.load(w_at + start, here & fits[:, None], 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    if BIASED:
        acc += tl.load(bias + column, column < classes, 0.0).to(ACC)[None, :]
    t = acc
    if CAP:
        acc, t = soft_cap(acc, cap)
    return tl.where(here, acc, float("-inf")), t


@triton.jit
def sums(
    x, weight, bias, labels, lse, picked, rows, classes, width, part, x_row, w_row, cap,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIASED: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp and label's logit of M rows over ``part`` classes; results (parts, rows)."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    begin = tl.program_id(1) * part
    label = tl.load(labels + row, row < rows, -1)
    top = tl.full([M], float("-inf"), ACC)
    total = tl.zeros([M], ACC)
    found = tl.zeros([M], ACC)
    for start in range(begin, tl.minimum(begin + part, classes), N):
        column = start + tl.arange(0, N)
        s, _ = logits_of(
            x, weight, bias, row, column, rows, classes, width, x_row, w_row, cap, M, N, K, BIASED, CAP, ACC, PRECISION
        )
        larger = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - larger) + tl.sum(tl.exp(s - larger[:, None]), 1)
        mine = (column[None, :] == label[:, None]) & (column < classes)[None, :]
        found += tl.sum(tl.where(mine, s, 0.0), 1)
        top = larger
    to = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(lse + to, top + tl.log(total), row < rows)
    tl.store(picked + to, found, row < rows)


@triton.jit
def gradients(
    x, weight, bias, labels, lse, grad_lse, grad_picked, out, rows, classes, width, first, x_row, w_row, cap,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIASED: tl.constexpr, CAP: tl.constexpr, OF_SUM: tl.constexpr,
    OF_LABEL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of some classes, the first of which is class ``first`` of the labels; out (rows, classes)."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    there = row < rows
    s, t = logits_of(
        x, weight, bias, row, column, rows, classes, width, x_row, w_row, cap, M, N, K, BIASED, CAP, ACC, PRECISION
    )
    d = tl.zeros([M, N], ACC)
    if OF_SUM:
        d += tl.exp(s - tl.load(lse + row, there, 0.0)[:, None]) * tl.load(grad_lse + row, there, 0.0)[:, None]
    if OF_LABEL:
        mine = first + column[None, :] == tl.load(labels + row, there, -1)[:, None]
        d += tl.where(mine, tl.load(grad_picked + row, there, 0.0)[:, None], 0.0)
    if CAP:
        d *= 1 - t * t
    to = out + row.to(tl.int64)[:, None] * classes + column[None, :]
    tl.store(to, d.to(out.dtype.element_ty), there[:, None] & (column < classes)[None, :])


def tile(x: Tensor) -> dict[str, int]:
    """Rows, classes and entries of a step; warps and loads that run ahead."""
    if x.is_cpu:
        return {"M": 32, "N": 64, "K": 32, "num_warps": 4, "num_stages": 1}
    if x.dtype.itemsize > 2:
        return {"M": 32, "N": 64, "K": 32, "num_warps": 4, "num_stages": 2}
    return {"M": 128, "N": 128, "K": 64, "num_warps": 8, "num_stages": 3}


def dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and label's logit of every row."""
    x, weight, labels = dense(x), dense(weight), labels.contiguous()
    (rows, width), classes, size = x.shape, weight.shape[0], tile(x)
    blocks = -(-rows // size["M"])
    parts = max(min(programs(x.device) // 2 // blocks, -(-classes // size["N"])), 1)
    part = -(-classes // (parts * size["N"])) * size["N"]
    parts = -(-classes // part)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    lse, picked = (x.new_empty((parts, rows), dtype=acc) for _ in range(2))
    with torch.cuda.device_of(x):
        sums[(blocks, parts)](
            x, weight, x if bias is None else bias, labels, lse, picked, rows, classes, width, part, x.stride(0),
            weight.stride(0), softcap, BIASED=bias is not None, CAP=softcap > 0, ACC=accumulator(x.dtype),
            PRECISION=precision(x.dtype), **size,
        )  # fmt: skip
    return (lse[0], picked[0]) if parts == 1 else (torch.logsumexp(lse, 0), picked.sum(0))


def backward(
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
    """Gradients of x, weight and bias, some classes at a time: products are the library's."""
    x, weight, labels = dense(x), dense(weight), labels.contiguous()
    (rows, width), classes, size = x.shape, weight.shape[0], tile(x)
    of_sum, of_label = (lse if g is None else g.contiguous() for g in (grad_lse, grad_picked))
    step = min(max(CHUNK // rows // size["N"], 1) * size["N"], classes)
    dx = torch.zeros(x.shape, dtype=lse.dtype, device=x.device)
    dw = weight.new_empty(weight.shape) if weighted else weight.new_empty(0)
    db = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    for begin in range(0, classes, step):
        part = weight[begin : begin + step]
        count = part.shape[0]
        grad = x.new_empty((rows, count))
        with torch.cuda.device_of(x):
            gradients[(-(-rows // size["M"]), -(-count // size["N"]))](
                x, part, x if bias is None else bias[begin:], labels, lse, of_sum, of_label, grad, rows, count, width,
                begin, x.stride(0), weight.stride(0), softcap, BIASED=bias is not None, CAP=softcap > 0,
                OF_SUM=grad_lse is not None, OF_LABEL=grad_picked is not None, ACC=accumulator(x.dtype),
                PRECISION=precision(x.dtype), **size,
            )  # fmt: skip
        dx += grad @ part
        if weighted:
            torch.mm(grad.T, x, out=dw[begin : begin + step])
        if bias is not None:
            db[begin : begin + step] = grad.sum(0, dtype=lse.dtype)
    return dx.to(x.dtype), dw, db
