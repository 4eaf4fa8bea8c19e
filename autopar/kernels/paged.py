"""Attention of new tokens over keys kept in pages: `paged_attention`, for decoding and for prefill in chunks. No gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.errors import KernelError
from autopar.kernels.backend import on_triton, wide


@torch.library.custom_op("autopar::paged_attention", mutates_args=())
def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    longest: int = 0,
) -> Tensor:
    """Causal attention of each sequence's last tokens over all its keys (Kwon et al. 2023, PagedAttention).

    query (tokens, heads, width): the new tokens of sequence s are the rows starts[s] … starts[s + 1] − 1, one when decoding, a
    chunk when prefilling. keys and values (pages, page size, kv_heads, width): key j of sequence s lies in page
    table[s, j // page size], place j % page size; lengths[s] keys, those of the new tokens included, are there. A new token sees
    the keys up to its own; ``window``: only so many of them. ``longest``: the most new tokens a sequence has, if known.
    table (sequences, pages), lengths (sequences) and starts (sequences + 1) are integers. Returns (tokens, heads, value width).
    """
    check(query, keys, values, table, lengths, starts)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if on_triton(query, True):
        from autopar.kernels.device.paged import attend

        return attend(query, keys, values, table, lengths, starts, factor, window, softcap, longest)
    return reference(query, keys, values, table, lengths, starts, factor, window, softcap)


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Pages gathered, queries padded to the longest, one batched attention."""
    counts = starts[1:] - starts[:-1]
    sequences, longest, group = counts.numel(), int(counts.max()), query.shape[1] // keys.shape[2]
    places = torch.arange(longest, device=query.device)
    there = places < counts[:, None]  # (sequences, longest)
    rows = (starts[:-1, None] + places).masked_fill(~there, 0)
    q = query[rows].transpose(1, 2)  # (sequences, heads, longest, width)
    k, v = (x[table].flatten(1, 2).transpose(1, 2).repeat_interleave(group, 1) for x in (keys, values))
    distance = torch.arange(k.shape[2], device=query.device) - (lengths - counts)[:, None, None] - places[:, None]
    seen = (distance <= 0) & ((distance > -window) if window else True)
    seen = (seen | ~there[:, :, None])[:, None]  # rows that are not there see anything, for the sake of their sums
    if softcap:
        scores = softcap * torch.tanh(q.to(wide(q.dtype)) @ k.to(wide(q.dtype)).mT * (scale / softcap))
        out = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.to(scores.dtype)).to(query.dtype)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale)
    made = query.new_zeros((*query.shape[:2], values.shape[-1]))
    made[rows[there]] = out.transpose(1, 2)[there]
    assert out.shape[0] == sequences, out.shape
    return made


def check(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, starts: Tensor) -> None:
    shapes = {
        "query": query, "keys": keys, "values": values, "table": table, "lengths": lengths, "starts": starts
    }  # fmt: skip
    fits = query.dim() == 3 and keys.dim() == values.dim() == 4 and table.dim() == 2
    fits = fits and keys.shape[:3] == values.shape[:3] and keys.shape[3] == query.shape[2]
    fits = fits and keys.shape[2] > 0 and query.shape[1] % keys.shape[2] == 0
    fits = fits and lengths.shape == table.shape[:1] and starts.shape == (table.shape[0] + 1,)
    if not fits:
        raise KernelError(
            "paged_attention: query (tokens, heads, width), keys and values (pages, page size, kv_heads, width), table "
            "(sequences, pages), lengths (sequences), starts (sequences + 1); got "
            + ", ".join(f"{n} {tuple(t.shape)}" for n, t in shapes.items())
        )


@paged_attention.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    longest: int = 0,
) -> Tensor:
    return query.new_empty((*query.shape[:2], values.shape[-1]))
