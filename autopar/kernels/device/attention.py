"""Flash attention, forward: the scores exist tile by tile (Dao 2023, FlashAttention-2, algorithm 1)."""

from __future__ import annotations

import triton
import triton.language as tl

from autopar.kernels.device.common import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(starts, length, batch, stride_batch, stride_row, VARLEN: tl.constexpr):
    """Where a sequence begins (in elements), and how many rows it has: packed sequences lie one after another."""
    if VARLEN:
        first = tl.load(starts + batch)
        rows = tl.load(starts + batch + 1) - first
        return first.to(tl.int64) * stride_row, rows
    return batch.to(tl.int64) * stride_batch, length


@triton.jit
def soft_cap(x, cap):
    """cap · tanh(x / cap), and tanh(x / cap)."""
    t = tanh(x / cap)
    return cap * t, t


@triton.jit
def visible(positions, columns, keys, prefix, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr):
    """Which keys (columns) a query sees from its position among them."""
    there = columns < keys
    if CAUSAL or WINDOW:
        near = there
        if CAUSAL:
            near = columns <= positions
        if WINDOW:
            near = near & (positions - columns < window)
            if not CAUSAL:
                near = near & (columns - positions < window)
        if PREFIX:
            near = near | (columns < prefix)
        there = there & near
    return there


@triton.jit
def span(
    first, last, keys, offset, prefix, window, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """For queries first … last − 1: keys from ``low`` may be seen, all before ``full`` are, none from ``high`` on."""
    low = 0
    high = keys
    full = keys
    if CAUSAL:
        high = last + offset
        full = first + offset + 1
        if PREFIX:
            high = tl.maximum(high, prefix)
            full = tl.maximum(full, prefix)
        high = tl.minimum(high, keys)
    if WINDOW:
        full = 0
        if not PREFIX:
            low = tl.maximum(first + offset - window + 1, 0) // BLOCK * BLOCK
        if not CAUSAL:
            high = tl.minimum(last + offset + window - 1, keys)
    full = tl.minimum(tl.maximum(full, 0), keys) // BLOCK * BLOCK
    full = tl.maximum(full, low)
    high = tl.maximum(high, low)
    return low, tl.minimum(full, high), high


@triton.jit
def scores(
    q, k, scale, cap, slope, positions, columns, ACC: tl.constexpr, PRECISION: tl.constexpr,
    ALIBI: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """(rows, columns) before the mask, and the soft cap's tanh. ``k`` stands transposed."""
    s = tl.dot(q, k, input_precision=PRECISION, out_dtype=ACC) * scale
    t = s
    if CAP:
        s, t = soft_cap(s, cap)
    if ALIBI:
        s += slope * (columns - positions).to(ACC)
    return s, t


@triton.jit
def sweep(
    acc, total, top, q, k_at, v_at, begin, end, keys, prefix, window, positions, scale, cap, slope, stride_k, stride_v,
    wide_d, wide_v, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
    ALIBI: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass over the keys begin … end, in tiles: the mixture, the sum of exponentials and the largest score so far."""
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        here = columns < keys
        k_fits = (wide_d < D)[:, None] & here[None, :] if MASKED else (wide_d < D)[:, None]
        v_fits = here[:, None] & (wide_v < DV)[None, :] if MASKED else (wide_v < DV)[None, :]
        if MASKED or BLOCK_D != D:
            k = tl.load(k_at + columns[None, :] * stride_k + wide_d[:, None], mask=k_fits, other=0.0)
        else:
            k = tl.load(k_at + columns[None, :] * stride_k + wide_d[:, None])
        s, _ = scores(q, k, scale, cap, slope, positions[:, None], columns[None, :], ACC, PRECISION, ALIBI, CAP)
        s *= LOG2E
        if MASKED:
            seen = visible(positions[:, None], columns[None, :], keys, prefix, window, CAUSAL, WINDOW, PREFIX)
            s = tl.where(seen, s, float("-inf"))
        larger = tl.maximum(top, tl.max(s, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(s - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None]
        if MASKED or BLOCK_V != DV:
            v = tl.load(v_at + columns[:, None] * stride_v + wide_v[None, :], mask=v_fits, other=0.0)
        else:
            v = tl.load(v_at + columns[:, None] * stride_v + wide_v[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=ACC)
        top = larger
    return acc, total, top


@triton.jit
def forward(
    q, k, v, slopes, prefixes, q_starts, k_starts, out, lse, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row, l_batch, l_head,
    heads, group, queries, keys, offset, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, ALIBI: tl.constexpr,
    CAP: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Rows that see no key get zeros and a log-sum-exp of −∞."""
    first = tl.program_id(0) * BLOCK_M
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    q_from, queries = place(q_starts, queries, batch, q_batch, q_row, VARLEN)
    k_from, keys = place(k_starts, keys, batch, k_batch, k_row, VARLEN)
    v_from, _ = place(k_starts, keys, batch, v_batch, v_row, VARLEN)
    o_from, _ = place(q_starts, queries, batch, o_batch, o_row, VARLEN)
    l_from, _ = place(q_starts, queries, batch, l_batch, 1, VARLEN)
    if first >= queries:
        return
    rows = first + tl.arange(0, BLOCK_M)
    wide_d, wide_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    there = rows < queries
    q_at = q + q_from + head.to(tl.int64) * q_head + rows[:, None] * q_row + wide_d[None, :]
    query = tl.load(q_at, mask=there[:, None] & (wide_d < D)[None, :], other=0.0)
    k_at = k + k_from + (head // group).to(tl.int64) * k_head
    v_at = v + v_from + (head // group).to(tl.int64) * v_head
    slope = tl.load(slopes + head).to(ACC) if ALIBI else 0.0
    prefix = tl.load(prefixes + batch).to(tl.int32) if PREFIX else 0
    low, full, high = span(
        first, tl.minimum(first + BLOCK_M, queries), keys, offset, prefix, window, BLOCK_N, CAUSAL, WINDOW, PREFIX
    )
    acc = tl.zeros([BLOCK_M, BLOCK_V], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    acc, total, top = sweep(
        acc, total, top, query, k_at, v_at, low, full, keys, prefix, window, rows + offset, scale, cap, slope, k_row,
        v_row, wide_d, wide_v, False, BLOCK_N, D, DV, BLOCK_D, BLOCK_V, CAUSAL, WINDOW, PREFIX, ALIBI, CAP, ACC,
        PRECISION,
    )  # fmt: skip
    acc, total, top = sweep(
        acc, total, top, query, k_at, v_at, full, high, keys, prefix, window, rows + offset, scale, cap, slope, k_row,
        v_row, wide_d, wide_v, True, BLOCK_N, D, DV, BLOCK_D, BLOCK_V, CAUSAL, WINDOW, PREFIX, ALIBI, CAP, ACC,
        PRECISION,
    )  # fmt: skip
    nothing = total == 0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    o_at = out + o_from + head.to(tl.int64) * o_head + rows[:, None] * o_row + wide_v[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=there[:, None] & (wide_v < DV)[None, :])
    log = tl.where(nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * LN2)
    tl.store(lse + l_from + head.to(tl.int64) * l_head + rows, log, mask=there)
