"""Attention over pages. A tile holds the queries of all heads that share a key head, so that decoding fills it, too; the keys
of a sequence are shared out over programs where there are few queries (Dao et al. 2023, Flash-Decoding)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.backend import power_of_two
from autopar.kernels.device.attention import LN2, LOG2E, soft_cap
from autopar.kernels.device.common import accumulator, precision, programs


@triton.jit
def attend_pages(
    query, keys, values, table, lengths, starts, out, lse, scale, cap, tokens, heads, group, key_heads, page, window, part,
    q_row, q_head, k_page, k_place, k_head, v_page, v_place, v_head, t_row,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries over ``part`` keys: partial results out (parts, tokens, heads, DV) and lse (parts, tokens, heads)."""
    sequence = tl.program_id(1) // key_heads
    key_head = tl.program_id(1) % key_heads
    begin = tl.load(starts + sequence).to(tl.int32)
    count = tl.load(starts + sequence + 1).to(tl.int32) - begin
    length = tl.load(lengths + sequence).to(tl.int32)
    first = tl.program_id(0) * M
    if first >= count * group:
        return
    member = first + tl.arange(0, M)
    there = member < count * group
    token = member // group
    head = key_head * group + member % group
    row = (begin + token).to(tl.int64)
    wide_d, wide_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_at = query + row[:, None] * q_row + head[:, None] * q_head + wide_d[None, :]
    q = tl.load(q_at, there[:, None] & (wide_d < D)[None, :], 0.0)
    position = length - count + token
    last = length - count + tl.minimum((first + M - 1) // group, count - 1)
    low = tl.program_id(2) * part
    high = tl.minimum(low + part, last + 1)
    if WINDOW:
        low = tl.maximum(low, tl.maximum(length - count + first // group - window + 1, 0) // N * N)
    acc = tl.zeros([M, BLOCK_V], ACC)
    total = tl.zeros([M], ACC)
    top = tl.full([M], float("-inf"), ACC)
    for start in range(low, high, N):
        column = start + tl.arange(0, N)
        here = column < high
        number = tl.load(table + sequence.to(tl.int64) * t_row + column // page, here, 0).to(tl.int64)
        k_at = keys + number * k_page + (column % page) * k_place + key_head * k_head
        v_at = values + number * v_page + (column % page) * v_place + key_head * v_head
        k = tl.load(k_at[None, :] + wide_d[:, None], here[None, :] & (wide_d < D)[:, None], 0.0)
        s = tl.dot(q, k, input_precision=PRECISION, out_dtype=ACC) * scale
        if CAP:
            s, _ = soft_cap(s, cap)
        seen = here[None, :] & (column[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (position[:, None] - column[None, :] < window)
        s = tl.where(seen, s * LOG2E, float("-inf"))
        larger = tl.maximum(top, tl.max(s, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(s - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(p, 1)
        v = tl.load(v_at[:, None] + wide_v[None, :], here[:, None] & (wide_v < DV)[None, :], 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrunk[:, None], input_precision=PRECISION, out_dtype=ACC)
        top = larger
    nothing = total == 0
    to = (tl.program_id(2).to(tl.int64) * tokens + row) * heads + head
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(out + to[:, None] * DV + wide_v[None, :], acc, there[:, None] & (wide_v < DV)[None, :])
    log = tl.where(nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * LN2)
    tl.store(lse + to, log, there)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    window: int,
    softcap: float,
    longest: int,
) -> Tensor:
    """`paged_attention`."""
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    tokens, heads, width = query.shape
    page, key_heads, of_values = keys.shape[1], keys.shape[2], values.shape[-1]
    group, sequences = heads // key_heads, table.shape[0]
    most = (longest or tokens) * group
    m = min(max(power_of_two(most), 16), 64)
    n = 32 if query.is_cpu or query.dtype.itemsize > 2 or width > 64 else 64
    warps, stages = (8 if m * width > 64 * 64 else 4), (1 if width > 128 else 2)  # so that nothing spills on sm_80
    blocks, room = -(-most // m), table.shape[1] * page
    parts = max(min(programs(query.device) // 2 // (blocks * sequences * key_heads), room // 256), 1)
    part = -(-room // parts // n) * n
    parts = -(-room // part)
    acc = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((parts, tokens, heads, of_values), dtype=acc)
    lse = query.new_empty((parts, tokens, heads), dtype=acc)
    with torch.cuda.device_of(query):
        attend_pages[(blocks, sequences * key_heads, parts)](
            query, keys, values, table.contiguous(), lengths.contiguous(), starts.contiguous(), out, lse, scale, softcap,
            tokens, heads, group, key_heads, page, window, part, *query.stride()[:2], *keys.stride()[:3],
            *values.stride()[:3], table.shape[1], D=width, DV=of_values, BLOCK_D=max(power_of_two(width), 16),
            BLOCK_V=max(power_of_two(of_values), 16), M=m, N=n, WINDOW=window > 0, CAP=softcap > 0,
            ACC=accumulator(query.dtype), PRECISION=precision(query.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if parts == 1:
        return out[0].to(query.dtype)
    whole = torch.logsumexp(lse, 0)
    shares = torch.exp(lse - whole.masked_fill(whole == -torch.inf, 0.0))
    return (out * shares.unsqueeze(-1)).sum(0).to(query.dtype)
