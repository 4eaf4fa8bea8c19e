"""Attention in plain torch, for devices without Triton: torch's fused CPU kernel where it can, else written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autopar.kernels.backend import wide

if TYPE_CHECKING:
    from autopar.kernels.attention import Shape

aten = torch.ops.aten
FAR = 1e4
"""The log-sum-exp given to torch's kernel for a query that sees nothing: its probabilities come out zero."""


def forward(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """The mixture and the log-sum-exp of the scores, as `flash_attention` defines them."""
    group = query.shape[1] // key.shape[1]
    key, value = repeated(key, group), repeated(value, group)
    if not fused(query, key, value, shape):
        return written(query, key, value, shape)
    query, key, value = dense(query), dense(key), dense(value)
    if plain(shape):
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, shape.causal, scale=shape.scale)
    added = bias(query, key, shape)
    blind = (added == -torch.inf).all(-1)
    mask = added.masked_fill(blind.unsqueeze(-1), 0.0).to(query.dtype)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=shape.scale
    )
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)


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
    group = query.shape[1] // key.shape[1]
    wide_key, wide_value = repeated(key, group), repeated(value, group)
    if grad_lse is not None or not fused(query, key, value, shape):
        dq, dk, dv = written_backward(grad, grad_lse, query, wide_key, wide_value, out, lse, shape)
    else:
        mask = None
        if not plain(shape):
            added = bias(query, key, shape)
            blind = (added == -torch.inf).all(-1, keepdim=True)
            mask = added.masked_fill(blind, 0.0).to(query.dtype)
            grad = grad.masked_fill(blind, 0.0)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dense(grad), dense(query), dense(wide_key), dense(wide_value), dense(out),
            lse.masked_fill(lse == -torch.inf, FAR), 0.0,
            shape.causal and mask is None, attn_mask=mask, scale=shape.scale,
        )  # fmt: skip
    return dq, gathered(dk, group).to(key.dtype), gathered(dv, group).to(value.dtype)


def repeated(x: Tensor, group: int) -> Tensor:
    return x if group == 1 else x.repeat_interleave(group, 1)


def dense(x: Tensor) -> Tensor:
    """With the last dim's elements side by side: torch's kernel takes them to be so, without looking (2.13)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def gathered(x: Tensor, group: int) -> Tensor:
    """The sum over the queries that each key head served."""
    return x if group == 1 else x.unflatten(1, (-1, group)).sum(2)


def plain(shape: Shape) -> bool:
    """Whether no mask is needed but the causal one, counted from the first key."""
    special = (shape.slopes, shape.prefix, shape.query_starts)
    return all(s is None for s in special) and not shape.window and not (shape.causal and shape.offset)


def fused(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> bool:
    """Whether torch's kernel for CPUs takes the call."""
    return (
        query.is_cpu
        and not shape.softcap
        and query.shape[-1] == value.shape[-1]
        and 0 not in (*query.shape, *key.shape)
    )


# ------------------------------------------------------------------ the mask as a tensor


def bias(query: Tensor, key: Tensor, shape: Shape) -> Tensor:
    """What is added to the scores, (1 or batch, 1 or heads, length, keys): ALiBi, −∞ where a key is not seen."""
    dtype, device = wide(query.dtype), query.device
    rows, columns = torch.arange(query.shape[2], device=device), torch.arange(key.shape[2], device=device)
    seen = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    if shape.query_starts is not None and shape.key_starts is not None:
        rows, of_row = within(rows, shape.query_starts)
        columns, of_column = within(columns, shape.key_starts)
        seen = seen & (of_row[:, None] == of_column[None, :])
    distance = columns[None, :] - (rows + shape.offset)[:, None]
    near = torch.ones_like(distance, dtype=torch.bool)
    if shape.causal:
        near = distance <= 0
    if shape.window:
        near = near & (distance > -shape.window) & (distance < shape.window)
    if shape.prefix is not None:
        near = near | (columns < shape.prefix.view(-1, 1, 1, 1))
    added = torch.zeros((), dtype=dtype, device=device)
    if shape.slopes is not None:
        added = shape.slopes.to(dtype).view(1, -1, 1, 1) * distance
    return torch.where(seen & near, added, -torch.inf)


def within(places: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Each place's number within its sequence, and the sequence it belongs to."""
    which = torch.searchsorted(starts, places, right=True) - 1
    return places - starts[which], which


# ------------------------------------------------------------------ written out


def scores(query: Tensor, key: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Scores with their mask, and the soft cap's tanh (the scores themselves without one)."""
    dtype = wide(query.dtype)
    s = query.to(dtype) @ key.to(dtype).mT * shape.scale
    t = s
    if shape.softcap:
        t = torch.tanh(s / shape.softcap)
        s = shape.softcap * t
    return (s if plain(shape) and not shape.causal else s + bias(query, key, shape)), t


def written(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    s, _ = scores(query, key, shape)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return (p @ value.to(p.dtype)).to(query.dtype), lse


def written_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    s, t = scores(query, key, shape)
    blind = (lse == -torch.inf).unsqueeze(-1)
    p = torch.exp(s - lse.unsqueeze(-1).masked_fill(blind, 0.0)).masked_fill(blind, 0.0)
    g = grad.to(p.dtype)
    inner = (g * out.to(p.dtype)).sum(-1)
    if grad_lse is not None:
        inner = inner - grad_lse
    ds = p * (g @ value.to(p.dtype).mT - inner.unsqueeze(-1))
    if shape.softcap:
        ds = ds * (1 - t * t)
    ds = ds * shape.scale
    dq, dk = ds @ key.to(p.dtype), ds.mT @ query.to(p.dtype)
    return dq.to(query.dtype), dk.to(key.dtype), (p.mT @ g).to(value.dtype)
