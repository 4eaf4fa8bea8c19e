"""The explicit collectives of an emitted program: each moves a tensor forward, and its gradient backward.

Every function takes the tensor parallel process group last. "Whole" is the same on every rank, "parts" sum to the whole.
``pieces`` are the global sizes of the parts that a split dim is a concatenation of (fused projections); None for one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

Pieces = tuple[int, ...] | None
Step = Callable[[torch.Tensor], torch.Tensor]


class Move(torch.autograd.Function):
    """``forward`` on the way there, ``backward`` on the gradient's way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Step, backward: Step) -> torch.Tensor:
        ctx.back = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return ctx.back(grad), None, None


def keep(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def summed(x: torch.Tensor, tp: ProcessGroup, in_place: bool = False) -> torch.Tensor:
    x = x.contiguous() if in_place else x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=tp)
    return x


def gathered(x: torch.Tensor, dim: int, pieces: Pieces, tp: ProcessGroup) -> torch.Tensor:
    """Shards of every rank, put together along ``dim``."""
    n = tp.size()
    flat = x.new_empty(n * x.numel())
    dist.all_gather_single(flat, x.reshape(-1), group=tp)
    flat = flat.view(n, *x.shape)
    if pieces is None:
        return flat.movedim(0, dim).reshape(*x.shape[:dim], n * x.shape[dim], *x.shape[dim + 1 :])
    shards = [s.split([p // n for p in pieces], dim) for s in flat.unbind(0)]
    return torch.cat([shards[r][i] for i in range(len(pieces)) for r in range(n)], dim)


def ordered(x: torch.Tensor, dim: int, pieces: Pieces, n: int) -> torch.Tensor:
    """All ranks' shards stacked: (n, shard)."""
    if pieces is None:
        return x.unflatten(dim, (n, x.shape[dim] // n)).movedim(dim, 0)
    parts = [p.chunk(n, dim) for p in x.split(list(pieces), dim)]
    return torch.stack([torch.cat([p[r] for p in parts], dim) for r in range(n)])


def sliced(x: torch.Tensor, dim: int, pieces: Pieces, tp: ProcessGroup) -> torch.Tensor:
    """This rank's shard of a whole tensor."""
    n, rank = tp.size(), tp.rank()
    if pieces is None:
        return x.narrow(dim, rank * (x.shape[dim] // n), x.shape[dim] // n)
    return torch.cat([p.chunk(n, dim)[rank] for p in x.split(list(pieces), dim)], dim)


def reduced(x: torch.Tensor, dim: int, pieces: Pieces, tp: ProcessGroup) -> torch.Tensor:
    """This rank's shard of the sum over ranks."""
    stacked = ordered(x, dim, pieces, tp.size()).contiguous()
    out = stacked.new_empty(stacked[0].numel())
    dist.reduce_scatter_single(out, stacked.view(-1), group=tp)
    return out.view(stacked.shape[1:])


def exchanged(x: torch.Tensor, source: int, target: int, pieces: Pieces, tp: ProcessGroup) -> torch.Tensor:
    """Split along ``source`` to split along ``target`` (in ``pieces``)."""
    sent = ordered(x, target, pieces, tp.size()).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=tp)
    return torch.cat(got.unbind(0), source)


# ------------------------------------------------------------------ moves, forward / backward


def copy_in(x: torch.Tensor, tp: ProcessGroup, in_place: bool = False) -> torch.Tensor:
    """Whole to whole; the gradient comes in parts and is summed (Megatron's f).

    ``in_place``: in the gradient's own memory, which no one else reads where all readers of ``x`` are matrix products.
    """
    return Move.apply(x, keep, lambda g: summed(g, tp, in_place))


def all_reduce(x: torch.Tensor, tp: ProcessGroup, in_place: bool = False) -> torch.Tensor:
    """Parts to whole; the gradient is whole already (Megatron's g).

    ``in_place``: in the memory of ``x``, a matrix product that no one else reads.
    """
    return Move.apply(x, lambda v: keep(summed(v, tp, in_place)), keep)


def all_reduce_both(x: torch.Tensor, tp: ProcessGroup, in_place: bool = False) -> torch.Tensor:
    """Parts to whole; the gradient comes in parts, too. ``in_place``: as in `all_reduce`."""
    return Move.apply(x, lambda v: keep(summed(v, tp, in_place)), lambda g: summed(g, tp))


def all_gather(x: torch.Tensor, dim: int, tp: ProcessGroup, pieces: Pieces = None) -> torch.Tensor:
    """Shards to whole; the gradient is whole on every rank."""
    return Move.apply(x, lambda v: gathered(v, dim, pieces, tp), lambda g: sliced(g, dim, pieces, tp))


def all_gather_sum(x: torch.Tensor, dim: int, tp: ProcessGroup, pieces: Pieces = None) -> torch.Tensor:
    """Shards to whole; the gradient comes in parts: reduce-scatter."""
    return Move.apply(x, lambda v: gathered(v, dim, pieces, tp), lambda g: reduced(g, dim, pieces, tp))


def reduce_scatter(x: torch.Tensor, dim: int, tp: ProcessGroup, pieces: Pieces = None) -> torch.Tensor:
    """Parts to shards; the gradient is gathered."""
    return Move.apply(x, lambda v: reduced(v, dim, pieces, tp), lambda g: gathered(g, dim, pieces, tp))


def scatter(x: torch.Tensor, dim: int, tp: ProcessGroup, pieces: Pieces = None) -> torch.Tensor:
    """Whole to shards, without communication; the gradient is gathered."""
    return Move.apply(x, lambda v: sliced(v, dim, pieces, tp), lambda g: gathered(g, dim, pieces, tp))


def all_to_all(
    x: torch.Tensor, source: int, target: int, tp: ProcessGroup, pieces: Pieces = None, pieces_before: Pieces = None
) -> torch.Tensor:
    """Shards along ``source`` (in ``pieces_before``) to shards along ``target`` (in ``pieces``), and back."""
    if source == target or pieces_before is not None:
        return Move.apply(
            x,
            lambda v: sliced(gathered(v, source, pieces_before, tp), target, pieces, tp),
            lambda g: sliced(gathered(g, target, pieces, tp), source, pieces_before, tp),
        )
    if pieces is not None:
        return Move.apply(
            x,
            lambda v: exchanged(v, source, target, pieces, tp),
            lambda g: sliced(gathered(g, target, pieces, tp), source, None, tp),
        )
    return Move.apply(
        x,
        lambda v: exchanged(v, source, target, None, tp),
        lambda g: exchanged(g, target, source, None, tp),
    )


# ------------------------------------------------------------------ operators with collectives of their own


def vocabulary_embedding(weight: torch.Tensor, ids: torch.Tensor, padding: int, tp: ProcessGroup) -> torch.Tensor:
    """Rows of a table split over its rows: parts, zero where another rank has the row. ``padding``: -1 for none."""
    rows = weight.shape[0]
    local = ids - tp.rank() * rows
    outside = (local < 0) | (local >= rows)
    row = padding - tp.rank() * rows  # whose gradient is zero, where this rank has it
    row = row if padding >= 0 and 0 <= row < rows else -1
    found = torch.ops.aten.embedding.default(weight, local.masked_fill(outside, 0), row)
    return found.masked_fill(outside.unsqueeze(-1), 0)


def split_index(source: torch.Tensor, dim: int, index: torch.Tensor, tp: ProcessGroup) -> torch.Tensor:
    """Entries ``index`` (any shape) of dim ``dim``, over which ``source`` is split: parts, zero where another rank has them."""
    local, outside = own_entries(source, dim, index, tp)
    found = torch.ops.aten.index.Tensor(source, [None] * dim + [local])
    return found.masked_fill(outside.view(*index.shape, *[1] * (source.dim() - dim - 1)), 0)


def split_gather(source: torch.Tensor, dim: int, index: torch.Tensor, tp: ProcessGroup) -> torch.Tensor:
    """`torch.gather` along the dim over which ``source`` is split: parts, zero where another rank has the entry."""
    local, outside = own_entries(source, dim, index, tp)
    return source.gather(dim, local).masked_fill(outside, 0)


def own_entries(
    source: torch.Tensor, dim: int, index: torch.Tensor, tp: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where this rank holds the entries ``index`` of the whole (0 for those it does not), and which it does not."""
    count = source.shape[dim]
    index = torch.where(index < 0, index + count * tp.size(), index)
    local = index - tp.rank() * count
    outside = (local < 0) | (local >= count)
    return local.masked_fill(outside, 0), outside


class VocabularyCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits split over classes: three small all-reduces, no rank holds all logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignore: int, tp: ProcessGroup) -> torch.Tensor:
        classes = logits.shape[-1]
        top = logits.detach().amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp)
        shifted = logits - top.unsqueeze(-1)
        exp = shifted.exp()
        total = exp.sum(-1)
        dist.all_reduce(total, group=tp)
        local = labels - tp.rank() * classes
        mine = (local >= 0) & (local < classes) & (labels != ignore)
        local = local.masked_fill(~mine, 0)
        target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0)
        dist.all_reduce(target, group=tp)
        kept = labels != ignore
        ctx.save_for_backward(exp.div_(total.unsqueeze(-1)), local, mine, kept)
        return (total.log() - target).masked_fill(~kept, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        softmax, local, mine, kept = ctx.saved_tensors
        grad = grad.masked_fill(~kept, 0)
        out = softmax * grad.unsqueeze(-1)
        out.scatter_add_(-1, local.unsqueeze(-1), -(grad.masked_fill(~mine, 0)).unsqueeze(-1))
        return out, None, None, None


def vocabulary_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, reduction: str, ignore: int, dim: int, tp: ProcessGroup
) -> torch.Tensor:
    """`F.cross_entropy` on logits whose class dim ``dim`` is split. ``reduction``: none, mean or sum."""
    loss = VocabularyCrossEntropy.apply(logits.movedim(dim, -1), labels, ignore, tp)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / (labels != ignore).sum() if reduction == "mean" else total


class LogSumExp(torch.autograd.Function):
    """log Σ exp over the ranks, entry by entry; the gradient is whole on every rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: ProcessGroup) -> torch.Tensor:
        top = x.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp)
        total = (x - top).exp()
        dist.all_reduce(total, group=tp)
        out = total.log() + top
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, out = ctx.saved_tensors
        return grad * (x - out).exp(), None


def vocabulary_linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ignore: int,
    softcap: float,
    tp: ProcessGroup,
) -> torch.Tensor:
    """`kernels.linear_cross_entropy` with the classes split: two numbers a row are summed up, no rank makes all logits.

    The gradient of ``x`` comes in parts.
    """
    from autopar import kernels

    own = labels - tp.rank() * weight.shape[0]
    lse, picked = kernels.linear_logsumexp(x, weight, own, bias, softcap)
    losses = LogSumExp.apply(lse, tp) - all_reduce(picked, tp)
    return losses.masked_fill(labels == ignore, 0.0).sum()


@contextlib.contextmanager
def split_rng(x: torch.Tensor, tp: ProcessGroup) -> Iterator[None]:
    """Other random numbers on every rank, for dropout on a tensor that is split; the ranks' common stream goes on.

    One draw of the common stream seeds the ranks' own, so recomputation (which restores the common one) repeats it.
    """
    seed = int(torch.randint(2**31, (), device="cpu")) + 7919 * (tp.rank() + 1)
    kept = torch.get_rng_state() if x.device.type == "cpu" else torch.cuda.get_rng_state(x.device)
    torch.manual_seed(seed) if x.device.type == "cpu" else torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(kept) if x.device.type == "cpu" else torch.cuda.set_rng_state(kept, x.device)
