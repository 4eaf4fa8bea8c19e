"""Launching flash attention: tiles by head size, grids, strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopar.kernels.backend import power_of_two
from autopar.kernels.device import attention, attention_backward
from autopar.kernels.device.common import accumulator, precision, shared_memory

if TYPE_CHECKING:
    from autopar.kernels.attention import Shape


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step of a program, the warps that share it, and how many loads run ahead."""

    m: int
    n: int
    warps: int
    stages: int


FORWARD = {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)}
OF_QUERIES = {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 16, 8, 2)}
OF_KEYS = {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 64, 8, 1)}
"""Tiles for half precision by head size (rounded up to a power of two): the largest whose accumulators stay in registers on
sm_80 and sm_90, as their compiled code says."""
SMALL = Tile(32, 32, 4, 1)
"""For float32, whose products run without tensor cores, and for the interpreter."""


def tile(table: dict[int, Tile], width: int, query: Tensor) -> Tile:
    if query.is_cpu or query.dtype.itemsize > 2:
        return SMALL if width <= 128 else Tile(16, 16, 4, 1)
    if width > 256:
        return Tile(16, 16, 8, 1)
    best = table[max(width, 64)]
    needed = (best.m + 2 * best.n * best.stages) * width * query.dtype.itemsize
    return best if needed <= shared_memory(query.device) else Tile(best.m, best.n, best.warps, 1)


def constants(query: Tensor, value: Tensor, shape: Shape) -> dict[str, Any]:
    """The compile-time arguments that all three kernels take."""
    return {
        "D": query.shape[-1],
        "DV": value.shape[-1],
        "BLOCK_D": max(power_of_two(query.shape[-1]), 16),
        "BLOCK_V": max(power_of_two(value.shape[-1]), 16),
        "CAUSAL": shape.causal,
        "WINDOW": shape.window > 0,
        "PREFIX": shape.prefix is not None,
        "ALIBI": shape.slopes is not None,
        "CAP": shape.softcap > 0,
        "VARLEN": shape.query_starts is not None,
        "ACC": accumulator(query.dtype),
        "PRECISION": precision(query.dtype),
    }


def dense(x: Tensor) -> Tensor:
    """``x`` with entries of its last dim next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def lengths(query: Tensor, key: Tensor, shape: Shape) -> tuple[int, int, int]:
    """Sequences, and the most queries and keys that one has."""
    if shape.query_starts is None:
        return query.shape[0], query.shape[2], key.shape[2]
    return shape.query_starts.numel() - 1, shape.longest or query.shape[2], key.shape[2]


def tensors(shape: Shape, query: Tensor) -> list[Tensor]:
    """Slopes, prefixes and starts; any tensor in place of those that are not there, which nobody reads."""
    return [
        query if x is None else x.contiguous()
        for x in (shape.slopes, shape.prefix, shape.query_starts, shape.key_starts)
    ]


def forward(query: Tensor, key: Tensor, value: Tensor, shape: Shape, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``out`` and ``lse``; returns them."""
    query, key, value = dense(query), dense(key), dense(value)
    fixed = constants(query, value, shape)
    chosen = tile(FORWARD, max(fixed["BLOCK_D"], fixed["BLOCK_V"]), query)
    sequences, queries, _ = lengths(query, key, shape)
    heads = query.shape[1]
    grid = (-(-queries // chosen.m), sequences * heads)
    if 0 not in grid:
        with torch.cuda.device_of(query):
            attention.forward[grid](
                query, key, value, *tensors(shape, query), out, lse, shape.scale, shape.softcap,
                *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
                heads, heads // key.shape[1], query.shape[2], key.shape[2], shape.offset, shape.window,
                BLOCK_M=chosen.m, BLOCK_N=chosen.n, num_warps=chosen.warps, num_stages=chosen.stages, **fixed,
            )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query, key, value, grad = dense(query), dense(key), dense(value), dense(grad)
    delta = (grad.to(lse.dtype) * out).sum(-1)
    delta = (delta if grad_lse is None else delta - grad_lse).contiguous()
    lse = lse.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    fixed = constants(query, value, shape)
    width = max(fixed["BLOCK_D"], fixed["BLOCK_V"])
    sequences, queries, keys = lengths(query, key, shape)
    heads, key_heads = query.shape[1], key.shape[1]
    sizes = (heads, heads // key_heads, query.shape[2], key.shape[2], shape.offset, shape.window)
    given = (query, key, value, grad, lse, delta, *tensors(shape, query))
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3])
    with torch.cuda.device_of(query):
        chosen = tile(OF_QUERIES, width, query)
        grid = (-(-queries // chosen.m), sequences * heads)
        if 0 not in grid:
            attention_backward.of_queries[grid](
                *given, dq, shape.scale, shape.softcap, *strides, *dq.stride()[:3], *lse.stride()[:2], *sizes,
                BLOCK_M=chosen.m, BLOCK_N=chosen.n, num_warps=chosen.warps, num_stages=chosen.stages, **fixed,
            )  # fmt: skip
        chosen = tile(OF_KEYS, width, query)
        grid = (-(-keys // chosen.n), sequences * key_heads)
        if 0 not in grid:
            attention_backward.of_keys[grid](
                *given, dk, dv, shape.scale, shape.softcap, *strides, *dk.stride()[:3], *dv.stride()[:3],
                *lse.stride()[:2], *sizes,
                BLOCK_M=chosen.m, BLOCK_N=chosen.n, num_warps=chosen.warps, num_stages=chosen.stages, **fixed,
            )  # fmt: skip
    return dq, dk, dv
