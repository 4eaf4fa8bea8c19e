"""Flash attention, backward: scores are computed again, tile by tile (Dao 2023, FlashAttention-2, algorithm 2).

One kernel walks over the keys for a tile of queries (their gradients), one over the queries for a tile of keys, all heads of
its group one after another: nothing is added up in memory by several programs, so gradients are the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from autopar.kernels.device.attention import LOG2E, place, scores, span, visible


@triton.jit
def probabilities(
    q, k, lse, scale, cap, slope, positions, columns, queries_left, keys, prefix, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, ALIBI: tl.constexpr, CAP: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, columns) of the softmax, and the soft cap's tanh. ``k`` stands transposed; ``queries_left``: rows that are there."""
    s, t = scores(q, k, scale, cap, slope, positions[:, None], columns[None, :], ACC, PRECISION, ALIBI, CAP)
    seen = visible(positions[:, None], columns[None, :], keys, prefix, window, CAUSAL, WINDOW, PREFIX)
    known = queries_left & (lse != float("-inf"))
    s = tl.where(seen & known[:, None], s, float("-inf"))
    return tl.exp2((s - tl.where(known, lse, 0.0)[:, None]) * LOG2E), t


@triton.jit
def tile(at, rows, stride, columns, there, fits):
    """(rows, columns) of what lies at ``at``, zeros outside; columns lie side by side."""
    return tl.load(at + rows[:, None] * stride + columns[None, :], there[:, None] & fits[None, :], 0.0)


@triton.jit
def turned(at, rows, stride, columns, there, fits):
    """The same transposed, (columns, rows)."""
    return tl.load(at + rows[None, :] * stride + columns[:, None], fits[:, None] & there[None, :], 0.0)


@triton.jit
def readers(
    first, queries, offset, prefix, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """The first and the end of the queries that may see one of the keys from ``first`` on; whole tiles before."""
    begin = 0
    end = queries
    if CAUSAL:
        begin = tl.maximum(first - offset, 0)
        if PREFIX:
            begin = tl.where(first < prefix, 0, begin)
    if WINDOW:
        if not CAUSAL:
            begin = tl.maximum(first - offset - window + 1, 0)
        if not PREFIX:
            end = tl.minimum(first + BLOCK_N + window - 1 - offset, queries)
    return begin // BLOCK_M * BLOCK_M, end


@triton.jit
def of_scores(p, t, g, value, inner, CAP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of the scores, before the soft cap and without the scale; ``value`` stands transposed."""
    ds = p * (tl.dot(g, value, input_precision=PRECISION, out_dtype=ACC) - inner[:, None])
    if CAP:
        ds *= 1 - t * t
    return ds


@triton.jit
def of_queries(
    q, k, v, grad, lse, delta, slopes, prefixes, q_starts, k_starts, dq, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    d_batch, d_head, d_row, l_batch, l_head, heads, group, queries, keys, offset, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, ALIBI: tl.constexpr,
    CAP: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries."""
    first = tl.program_id(0) * BLOCK_M
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    q_from, queries = place(q_starts, queries, batch, q_batch, q_row, VARLEN)
    k_from, keys = place(k_starts, keys, batch, k_batch, k_row, VARLEN)
    v_from, _ = place(k_starts, keys, batch, v_batch, v_row, VARLEN)
    g_from, _ = place(q_starts, queries, batch, g_batch, g_row, VARLEN)
    d_from, _ = place(q_starts, queries, batch, d_batch, d_row, VARLEN)
    l_from, _ = place(q_starts, queries, batch, l_batch, 1, VARLEN)
    if first >= queries:
        return
    head64 = head.to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    wide_d, wide_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    there, d_fits, v_fits = rows < queries, wide_d < D, wide_v < DV
    query = tile(q + q_from + head64 * q_head, rows, q_row, wide_d, there, d_fits)
    g = tile(grad + g_from + head64 * g_head, rows, g_row, wide_v, there, v_fits)
    log = tl.load(lse + l_from + head64 * l_head + rows, there, float("-inf"))
    inner = tl.load(delta + l_from + head64 * l_head + rows, there, 0.0)
    k_at = k + k_from + (head // group).to(tl.int64) * k_head
    v_at = v + v_from + (head // group).to(tl.int64) * v_head
    slope = tl.load(slopes + head).to(ACC) if ALIBI else 0.0
    prefix = tl.load(prefixes + batch).to(tl.int32) if PREFIX else 0
    low, _, high = span(
        first, tl.minimum(first + BLOCK_M, queries), keys, offset, prefix, window, BLOCK_N, CAUSAL, WINDOW, PREFIX
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in range(low, high, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        here = columns < keys
        key = turned(k_at, columns, k_row, wide_d, here, d_fits)
        value = turned(v_at, columns, v_row, wide_v, here, v_fits)
        p, t = probabilities(
            query, key, log, scale, cap, slope, rows + offset, columns, there, keys, prefix, window,
            CAUSAL, WINDOW, PREFIX, ALIBI, CAP, ACC, PRECISION,
        )  # fmt: skip
        ds = of_scores(p, t, g, value, inner, CAP, ACC, PRECISION)
        acc = tl.dot(ds.to(key.dtype), tl.trans(key), acc, input_precision=PRECISION, out_dtype=ACC)
    d_at = dq + d_from + head64 * d_head + rows[:, None] * d_row + wide_d[None, :]
    tl.store(d_at, (acc * scale).to(dq.dtype.element_ty), mask=there[:, None] & d_fits[None, :])


@triton.jit
def of_keys(
    q, k, v, grad, lse, delta, slopes, prefixes, q_starts, k_starts, dk, dv, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    x_batch, x_head, x_row, y_batch, y_head, y_row, l_batch, l_head, heads, group, queries, keys, offset, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, ALIBI: tl.constexpr,
    CAP: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values of one key head. ``x_…`` and ``y_…``: strides of dk and dv."""
    first = tl.program_id(0) * BLOCK_N
    key_heads = heads // group
    batch = tl.program_id(1) // key_heads
    key_head = tl.program_id(1) % key_heads
    q_from, queries = place(q_starts, queries, batch, q_batch, q_row, VARLEN)
    k_from, keys = place(k_starts, keys, batch, k_batch, k_row, VARLEN)
    v_from, _ = place(k_starts, keys, batch, v_batch, v_row, VARLEN)
    g_from, _ = place(q_starts, queries, batch, g_batch, g_row, VARLEN)
    x_from, _ = place(k_starts, keys, batch, x_batch, x_row, VARLEN)
    y_from, _ = place(k_starts, keys, batch, y_batch, y_row, VARLEN)
    l_from, _ = place(q_starts, queries, batch, l_batch, 1, VARLEN)
    if first >= keys:
        return
    key_head64 = key_head.to(tl.int64)
    columns = first + tl.arange(0, BLOCK_N)
    wide_d, wide_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    here, d_fits, v_fits = columns < keys, wide_d < D, wide_v < DV
    key = turned(k + k_from + key_head64 * k_head, columns, k_row, wide_d, here, d_fits)
    value = turned(v + v_from + key_head64 * v_head, columns, v_row, wide_v, here, v_fits)
    prefix = tl.load(prefixes + batch).to(tl.int32) if PREFIX else 0
    begin, end = readers(first, queries, offset, prefix, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, PREFIX)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_V], ACC)
    for member in range(group):
        head = key_head * group + member
        head64 = head.to(tl.int64)
        slope = tl.load(slopes + head).to(ACC) if ALIBI else 0.0
        q_at = q + q_from + head64 * q_head
        g_at = grad + g_from + head64 * g_head
        l_at = lse + l_from + head64 * l_head
        delta_at = delta + l_from + head64 * l_head
        for start in range(begin, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            there = rows < queries
            query = tile(q_at, rows, q_row, wide_d, there, d_fits)
            g = tile(g_at, rows, g_row, wide_v, there, v_fits)
            log = tl.load(l_at + rows, there, float("-inf"))
            inner = tl.load(delta_at + rows, there, 0.0)
            p, t = probabilities(
                query, key, log, scale, cap, slope, rows + offset, columns, there, keys, prefix, window,
                CAUSAL, WINDOW, PREFIX, ALIBI, CAP, ACC, PRECISION,
            )  # fmt: skip
            dv_acc = tl.dot(tl.trans(p.to(g.dtype)), g, dv_acc, input_precision=PRECISION, out_dtype=ACC)
            ds = of_scores(p, t, g, value, inner, CAP, ACC, PRECISION)
            dk_acc = tl.dot(tl.trans(ds.to(query.dtype)), query, dk_acc, input_precision=PRECISION, out_dtype=ACC)
    x_at = dk + x_from + key_head64 * x_head + columns[:, None] * x_row + wide_d[None, :]
    y_at = dv + y_from + key_head64 * y_head + columns[:, None] * y_row + wide_v[None, :]
    tl.store(x_at, (dk_acc * scale).to(dk.dtype.element_ty), mask=here[:, None] & d_fits[None, :])
    tl.store(y_at, dv_acc.to(dv.dtype.element_ty), mask=here[:, None] & v_fits[None, :])
