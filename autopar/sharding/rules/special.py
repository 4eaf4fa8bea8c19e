"""Reference implementations of strategies with a local function of their own, all devices simulated in one process.

``SPECIAL[name](node, shards, degree)``: ``shards[operand][device]`` → ``[device][output]``. The emitted code does the
same with process groups; here a reduction over devices is a sum over a list. Both are autograd functions where a
collective stands in the middle, so that a device's gradient comes from its own gradient of the (replicated) loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.sharding.call import arguments
from autopar.sharding.rules.index import looked_up

Shards = list[list[torch.Tensor]]


def vocab_embedding(node: fx.Node, shards: Shards, degree: int) -> Shards:
    """Rows outside of the device's range give zeros: the sum over devices is the look-up."""
    bound = arguments(node)
    return [[_rows(w, ids, r, bound["padding_idx"])] for r, (w, ids) in enumerate(zip(*shards, strict=True))]


def _rows(weight: torch.Tensor, ids: torch.Tensor, rank: int, padding: int) -> torch.Tensor:
    count, start = weight.shape[0], rank * weight.shape[0]
    here = (ids >= start) & (ids < start + count)
    mine = padding - start if padding >= 0 and start <= padding < start + count else -1
    found = torch.ops.aten.embedding.default(weight, (ids - start) * here, mine)
    return found * here.unsqueeze(-1)


def split_lookup(node: fx.Node, shards: Shards, degree: int) -> Shards:
    """Entries outside of the device's range give zeros: the sum over devices is the look-up."""
    at = looked_up(node)
    assert at is not None
    return [
        [_found(node, source, index + (index < 0) * degree * source.shape[at], at, r)]
        for r, (source, index) in enumerate(zip(*shards, strict=True))
    ]


def _found(node: fx.Node, source: torch.Tensor, index: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    count, start = source.shape[dim], rank * source.shape[dim]
    here = (index >= start) & (index < start + count)
    local = (index - start) * here
    if node.target is torch.ops.aten.gather.default:
        return source.gather(dim, local) * here
    found = torch.ops.aten.index.Tensor(source, [None] * dim + [local])
    return found * here.view(*here.shape, *[1] * (source.dim() - dim - 1))


class _CrossEntropy(torch.autograd.Function):
    """Arguments: labels, ignore_index, reduction, class dim, then the logits of every device."""

    @staticmethod
    def forward(ctx: Any, labels: torch.Tensor, ignored: int, reduction: int, dim: int, *logits: torch.Tensor) -> Any:
        top = torch.stack([x.amax(dim) for x in logits]).amax(0).unsqueeze(dim)  # all_reduce MAX
        exps = [(x - top).exp() for x in logits]
        total = torch.stack([e.sum(dim) for e in exps]).sum(0)  # all_reduce SUM
        kept = labels != ignored
        hits, own = [], []
        for rank, x in enumerate(logits):
            at = labels - rank * x.shape[dim]
            here = kept & (at >= 0) & (at < x.shape[dim])
            hits.append((at * here, here))
            own.append((x - top).gather(dim, (at * here).unsqueeze(dim)).squeeze(dim) * here)
        losses = (total.log() - torch.stack(own).sum(0)) * kept  # all_reduce SUM
        count = kept.sum()
        ctx.exps, ctx.total, ctx.hits, ctx.kept, ctx.count = exps, total, hits, kept, count
        ctx.reduction, ctx.dim = reduction, dim
        loss = losses if reduction == 0 else losses.sum() if reduction == 2 else losses.sum() / count
        return tuple(loss.clone() for _ in logits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # type: ignore[override]
        made = []
        for grad, exp, (at, here) in zip(grads, ctx.exps, ctx.hits, strict=True):
            each = grad * ctx.kept / (ctx.count if ctx.reduction == 1 else 1)
            g = exp / ctx.total.unsqueeze(ctx.dim) * each.unsqueeze(ctx.dim)
            made.append(g.scatter_add(ctx.dim, at.unsqueeze(ctx.dim), -(each * here).unsqueeze(ctx.dim)))
        return (None, None, None, None, *made)


def vocab_cross_entropy(node: fx.Node, shards: Shards, degree: int) -> Shards:
    """The loss on every device, from logits split over the classes; each device gets the gradient of its own logits."""
    bound = arguments(node)
    dim = 1 if shards[0][0].dim() > 1 else 0
    losses = _CrossEntropy.apply(shards[1][0], bound["ignore_index"], bound["reduction"], dim, *shards[0])
    return [[loss] for loss in losses]


def vocab_linear_cross_entropy(node: fx.Node, shards: Shards, degree: int) -> Shards:
    """As the emitted code does it: log-sum-exps and labels' logits over the classes of every device, summed up. On each
    device gradients flow to its own."""
    import autopar.kernels  # noqa: F401 (registers the operator)

    bound = arguments(node)
    parts = []
    for rank in range(degree):
        held = iter(each[rank] for each in shards)
        x, weight, labels = next(held), next(held), next(held)
        bias = None if bound["bias"] is None else next(held)
        own = labels - rank * weight.shape[0]
        parts.append(torch.ops.autopar.linear_logsumexp(x, weight, own, bias, bound["softcap"]))
    kept = shards[2][0] != bound["ignore_index"]
    losses = []
    for rank in range(degree):
        seen = [p if r == rank else tuple(t.detach() for t in p) for r, p in enumerate(parts)]
        lse = torch.logsumexp(torch.stack([p[0] for p in seen]), 0)
        losses.append([((lse - sum(p[1] for p in seen)) * kept).sum()])
    return losses


SPECIAL: dict[str, Callable[[fx.Node, Shards, int], Shards]] = {
    "vocab_embedding": vocab_embedding,
    "split_lookup": split_lookup,
    "vocab_cross_entropy": vocab_cross_entropy,
    "vocab_linear_cross_entropy": vocab_linear_cross_entropy,
}
