"""How an emitted program splits sequences over the devices of the cp axis: moves of the sequence, and attention over it.

Every function takes the process group of cp as ``cp``. Device r of n holds the r-th n-th of every sequence; in ``zigzag``
order the chunks r and 2n - 1 - r of 2n, so that causal attention is the same work for all. ``pieces``: the sizes of the
sequences that lie end to end along the split dim; None for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from autopar.lower.collectives import (
    Move,
    Pieces,
    gathered,
    keep,
    reduced,
    sliced,
)

CALLED = (
    "own_part", "scatter_parts", "gather_parts", "gather_parts_sum", "reduce_scatter_parts", "exchange_parts", "share_gradient",
    "ring_attention", "all_to_all_attention",
)  # fmt: skip
"""What emitted stages import of this file."""


def shuffled(x: torch.Tensor, dim: int, pieces: Pieces, n: int) -> torch.Tensor:
    """A whole tensor with the chunks of every piece in zigzag order: 0, 2n-1, 1, 2n-2, …"""
    parts = []
    for piece in x.split(list(pieces or (x.shape[dim],)), dim):
        chunks = piece.chunk(2 * n, dim)
        parts += [chunks[c] for r in range(n) for c in (r, 2 * n - 1 - r)]
    return torch.cat(parts, dim)


def unshuffled(x: torch.Tensor, dim: int, pieces: Pieces, n: int) -> torch.Tensor:
    """The inverse of `shuffled`."""
    parts = []
    for piece in x.split(list(pieces or (x.shape[dim],)), dim):
        chunks = piece.chunk(2 * n, dim)
        parts += [chunks[2 * r] for r in range(n)] + [chunks[2 * r + 1] for r in reversed(range(n))]
    return torch.cat(parts, dim)


def own(x: torch.Tensor, dim: int, cp: ProcessGroup, pieces: Pieces, zigzag: bool) -> torch.Tensor:
    """This device's part of a whole tensor."""
    return sliced(shuffled(x, dim, pieces, cp.size()) if zigzag else x, dim, pieces, cp)


def whole(x: torch.Tensor, dim: int, cp: ProcessGroup, pieces: Pieces, zigzag: bool) -> torch.Tensor:
    """All devices' parts, put together."""
    x = gathered(x, dim, pieces, cp)
    return unshuffled(x, dim, pieces, cp.size()) if zigzag else x


def summed_part(x: torch.Tensor, dim: int, cp: ProcessGroup, pieces: Pieces, zigzag: bool) -> torch.Tensor:
    """This device's part of the sum over devices."""
    return reduced(shuffled(x, dim, pieces, cp.size()) if zigzag else x, dim, pieces, cp)


def own_part(x: torch.Tensor, dim: int, cp: ProcessGroup, pieces: Pieces = None, zigzag: bool = False) -> torch.Tensor:
    """This device's part of what all devices have whole; without communication, no gradient is exchanged."""
    return own(x, dim, cp, pieces, zigzag)


def scatter_parts(
    x: torch.Tensor, dim: int, cp: ProcessGroup, pieces: Pieces = None, zigzag: bool = False
) -> torch.Tensor:
    """Whole to parts, without communication; the gradient is gathered."""
    return Move.apply(x, lambda v: own(v, dim, cp, pieces, zigzag), lambda g: whole(g, dim, cp, pieces, zigzag))


def gather_parts(
    x: torch.Tensor, dim: int, cp: ProcessGroup, pieces: Pieces = None, zigzag: bool = False
) -> torch.Tensor:
    """Parts to whole; the gradient is whole on every device."""
    return Move.apply(x, lambda v: whole(v, dim, cp, pieces, zigzag), lambda g: own(g, dim, cp, pieces, zigzag))


def gather_parts_sum(
    x: torch.Tensor, dim: int, cp: ProcessGroup, pieces: Pieces = None, zigzag: bool = False
) -> torch.Tensor:
    """Parts to whole; the gradient comes in summands: reduce-scatter."""
    return Move.apply(x, lambda v: whole(v, dim, cp, pieces, zigzag), lambda g: summed_part(g, dim, cp, pieces, zigzag))


def reduce_scatter_parts(
    x: torch.Tensor, dim: int, cp: ProcessGroup, pieces: Pieces = None, zigzag: bool = False
) -> torch.Tensor:
    """Summands to parts of the sum; the gradient is gathered."""
    return Move.apply(x, lambda v: summed_part(v, dim, cp, pieces, zigzag), lambda g: whole(g, dim, cp, pieces, zigzag))


def exchange_parts(
    x: torch.Tensor,
    source: int,
    target: int,
    cp: ProcessGroup,
    pieces: Pieces = None,
    before: Pieces = None,
    zigzag: bool = False,
) -> torch.Tensor:
    """Parts along ``source`` (of ``before``) to parts along ``target`` (of ``pieces``), and back."""
    return Move.apply(
        x,
        lambda v: own(whole(v, source, cp, before, zigzag), target, cp, pieces, zigzag),
        lambda g: own(whole(g, target, cp, pieces, zigzag), source, cp, before, zigzag),
    )


def share_gradient(x: torch.Tensor, cp: ProcessGroup) -> torch.Tensor:
    """Nothing; of a gradient that every device has whole, each hands back its share of the sum over devices."""
    return Move.apply(x, keep, lambda g: g / cp.size())


# ------------------------------------------------------------------ attention, heads split while it runs


def to_heads(x: torch.Tensor, cp: ProcessGroup, zigzag: bool) -> torch.Tensor:
    """(batch, heads, part, width) to (batch, heads / n, length, width): an all-to-all."""
    n, (batch, heads, part_, width) = cp.size(), x.shape
    sent = x.reshape(batch, n, heads // n, part_, width).transpose(0, 1).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=cp)
    got = got.permute(1, 2, 0, 3, 4).reshape(batch, heads // n, n * part_, width)
    return unshuffled(got, 2, None, n) if zigzag else got


def to_parts(x: torch.Tensor, cp: ProcessGroup, zigzag: bool) -> torch.Tensor:
    """The inverse of `to_heads`; laid out (batch, part, heads, width), as the output projection reads it."""
    n = cp.size()
    x = shuffled(x, 2, None, n) if zigzag else x
    batch, heads, length, width = x.shape
    sent = x.reshape(batch, heads, n, length // n, width).permute(2, 0, 3, 1, 4).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=cp)
    return got.permute(1, 2, 0, 3, 4).reshape(batch, length // n, n * heads, width).transpose(1, 2)


def all_to_all_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cp: ProcessGroup,
    *,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    flash: bool = False,
    zigzag: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Attention with the heads split over cp and whole sequences (Jacobs et al. 2023, DeepSpeed Ulysses).

    ``mask``: whole, (…, 1 or heads, length, length). ``flash``: by `kernels.flash_attention`, with its ``options`` and the
    ``slopes`` of all heads; else by torch's own.
    """
    q, k, v = (
        Move.apply(x, lambda t: to_heads(t, cp, zigzag), lambda g: to_parts(g, cp, zigzag)) for x in (query, key, value)
    )
    n, r = cp.size(), cp.rank()
    slopes = None if slopes is None else slopes.chunk(n)[r]
    if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:
        mask = mask.chunk(n, -3)[r]
    if flash:
        from autopar import kernels

        out, _ = kernels.flash_attention(q, k, v, slopes, scale=scale, causal=causal, **options)
    else:
        grouped = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )
    return Move.apply(out, lambda t: to_parts(t, cp, zigzag), lambda g: to_heads(g, cp, zigzag))


# ------------------------------------------------------------------ attention, keys and values going round


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cp: ProcessGroup,
    *,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    zigzag: bool = False,
    **_: Any,
) -> torch.Tensor:
    """Attention of this device's queries to all keys, which go round with their values (Liu et al. 2023, Ring Attention).

    ``mask``: (…, this device's queries, all keys), boolean (True: seen) or added. The other options are those of
    `kernels.flash_attention`, which computes each pair of chunks; results are merged by their log-sum-exp.
    """
    shape = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    return Ring.apply(query, key, value, mask, slopes, prefix, shape, cp, zigzag)


Chunk = tuple[int, int, int]
"""Where a chunk begins in a device's part, where in the whole sequence, and how long it is."""


def chunks(rank: int, part_: int, n: int, zigzag: bool) -> list[Chunk]:
    """What a device's part consists of."""
    if not zigzag:
        return [(0, rank * part_, part_)]
    half = part_ // 2
    return [(0, rank * half, half), (half, (2 * n - 1 - rank) * half, half)]


def pairs(rank: int, peer: int, part_: int, n: int, zigzag: bool, shape: dict[str, Any], prefix: bool) -> list[Any]:
    """The pairs of chunks (of this device's queries, of a peer's keys) in which some query sees some key, with what is
    left of the mask in them: whether it is causal, the window, and how far the queries are ahead of the keys."""
    causal, window, found = shape["causal"], shape["window"], []
    for q in chunks(rank, part_, n, zigzag):
        for k in chunks(peer, part_, n, zigzag):
            ahead, length = q[1] - k[1], q[2]
            if causal and not prefix and ahead <= -length:
                continue
            if (
                window
                and not prefix
                and (ahead - length >= window - 1 or (not causal and -ahead - length >= window - 1))
            ):
                continue
            past = ahead >= length and not prefix
            inside = not window or ahead + length <= window
            found.append((q, k, causal and not past, 0 if past and inside else window, ahead))
    return found


def passed(tensors: list[torch.Tensor], cp: ProcessGroup) -> tuple[list[torch.Tensor], list[Any]]:
    """Send tensors to the next device of the ring, receive the last one's: where they will be, and what to wait for."""
    n, r = cp.size(), cp.rank()
    after, before = dist.get_global_rank(cp, (r + 1) % n), dist.get_global_rank(cp, (r - 1) % n)
    got = [torch.empty_like(t) for t in tensors]
    moves = [dist.P2POp(dist.isend, t, after, cp) for t in tensors] + [
        dist.P2POp(dist.irecv, t, before, cp) for t in got
    ]
    return got, dist.batch_isend_irecv(moves)


def round_trip(tensors: list[torch.Tensor], cp: ProcessGroup) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Every device's tensors in turn, this device's own first, the next ones on their way meanwhile."""
    n, r = cp.size(), cp.rank()
    for step in range(n):
        got, waiting = passed(tensors, cp) if step < n - 1 else ([], [])
        yield (r - step) % n, tensors
        for work in waiting:
            work.wait()
        tensors = got


class Ring(torch.autograd.Function):
    """Keys and values go round in the forward; in the backward once more, and their gradients with them."""

    @staticmethod
    def forward(ctx: Any, query, key, value, mask, slopes, prefix, shape, cp, zigzag) -> torch.Tensor:  # noqa: ANN001
        n, part_ = cp.size(), query.shape[2]
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.zeros((*query.shape[:-1], value.shape[-1]), dtype=wide, device=query.device)
        lse = torch.full(query.shape[:-1], -torch.inf, dtype=wide, device=query.device)
        for peer, (k, v) in round_trip([key.contiguous(), value.contiguous()], cp):
            for pair in pairs(cp.rank(), peer, part_, n, zigzag, shape, prefix is not None):
                (at, _, length), (start, _, _) = pair[:2]
                mixed, logs = attend(
                    query.narrow(2, at, length), k.narrow(2, start, length), v.narrow(2, start, length),
                    seen(mask, pair), slopes, prefix, shape, pair,
                )  # fmt: skip
                merge(out.narrow(2, at, length), lse.narrow(2, at, length), mixed, logs)
        out = out.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, lse, mask, slopes, prefix)
        ctx.options = (shape, cp, zigzag)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        query, key, value, out, lse, mask, slopes, prefix = ctx.saved_tensors
        shape, cp, zigzag = ctx.options
        n, r, part_ = cp.size(), cp.rank(), query.shape[2]
        dq = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
        dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (key, value))
        back: list[Any] = []
        for peer, (k, v) in round_trip([key.contiguous(), value.contiguous()], cp):
            made = []
            for pair in pairs(r, peer, part_, n, zigzag, shape, prefix is not None):
                (at, _, length), (start, _, _) = pair[:2]
                made.append((pair, attend_backward(
                    grad.narrow(2, at, length), query.narrow(2, at, length), k.narrow(2, start, length),
                    v.narrow(2, start, length), out.narrow(2, at, length), lse.narrow(2, at, length),
                    seen(mask, pair), slopes, prefix, shape, pair,
                )))  # fmt: skip
            for work in back:  # the gradients of this peer's keys and values, from the devices before
                work.wait()
            for ((at, _, length), (start, _, _), *_), (own_q, own_k, own_v) in made:
                dq.narrow(2, at, length).add_(own_q)
                dk.narrow(2, start, length).add_(own_k)
                dv.narrow(2, start, length).add_(own_v)
            (dk, dv), back = passed([dk, dv], cp)
        for work in back:
            work.wait()
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), *(None,) * 6


def merge(out: torch.Tensor, lse: torch.Tensor, mixed: torch.Tensor, logs: torch.Tensor) -> None:
    """Take more keys into a mixture and its log-sum-exp, in place."""
    total = torch.logaddexp(lse, logs)
    base = total.masked_fill(total == -torch.inf, 0.0)
    out.mul_((lse - base).exp().unsqueeze(-1)).add_(mixed * (logs - base).exp().unsqueeze(-1))
    lse.copy_(total)


def seen(mask: torch.Tensor | None, pair: Any) -> torch.Tensor | None:
    """A mask's part for a pair of chunks."""
    if mask is None:
        return None
    (at, _, length), (_, first, _) = pair[:2]
    rows = mask if mask.shape[-2] == 1 else mask.narrow(-2, at, length)
    return rows if rows.shape[-1] == 1 else rows.narrow(-1, first, length)


def attend(q, k, v, mask, slopes, prefix, shape, pair) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN001
    """The mixture of one pair of chunks and its log-sum-exp."""
    if mask is not None:
        scores = masked_scores(q, k, mask, shape, pair)
        lse = scores.logsumexp(-1)
        p = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
        return p @ repeated(v, q).to(p.dtype), lse
    from autopar import kernels

    return kernels.flash_attention(q, k, v, slopes, near(prefix, pair), **of_pair(shape, pair, prefix, slopes))


def attend_backward(grad, q, k, v, out, lse, mask, slopes, prefix, shape, pair) -> Any:  # noqa: ANN001
    """The gradients of one pair of chunks, from the mixture and the log-sum-exp over all keys."""
    if mask is not None:
        scores = masked_scores(q, k, mask, shape, pair)
        blind = (lse == -torch.inf).unsqueeze(-1)
        p = (scores - lse.unsqueeze(-1).masked_fill(blind, 0.0)).exp().masked_fill(blind, 0.0)
        g, group = grad.to(p.dtype), q.shape[1] // k.shape[1]
        inner = (g * out.to(p.dtype)).sum(-1, keepdim=True)
        ds = p * (g @ repeated(v, q).to(p.dtype).mT - inner) * (shape["scale"] or q.shape[-1] ** -0.5)
        dk, dv = ds.mT @ q.to(p.dtype), p.mT @ g
        return ds @ repeated(k, q).to(p.dtype), *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    from autopar import kernels

    return kernels.flash_attention_backward(
        grad, None, q, k, v, out, lse, slopes, near(prefix, pair), **of_pair(shape, pair, prefix, slopes)
    )


def of_pair(
    shape: dict[str, Any], pair: Any, prefix: torch.Tensor | None, slopes: torch.Tensor | None
) -> dict[str, Any]:
    """The options of the kernel for one pair of chunks; a pair without a mask needs no positions."""
    _, _, causal, window, ahead = pair
    offset = ahead if causal or window or prefix is not None or slopes is not None else 0
    return {**shape, "causal": causal, "window": window, "offset": offset}


def near(prefix: torch.Tensor | None, pair: Any) -> torch.Tensor | None:
    """How many keys of a chunk every query sees."""
    return None if prefix is None else (prefix - pair[1][1]).clamp(min=0)


def repeated(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def masked_scores(q, k, mask, shape, pair) -> torch.Tensor:  # noqa: ANN001
    """Scores of one pair of chunks under a dense mask."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ repeated(k, q).to(wide).mT * (shape["scale"] or q.shape[-1] ** -0.5)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask
