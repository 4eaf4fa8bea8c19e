"""Reductions, softmax, cumulative and ranking operators: the dims they run along."""

from __future__ import annotations

import torch
from torch import fx

from autopar.sharding.call import arguments, broadcast, frozen, input_shapes, letters, output_shapes, shape, term, wrap
from autopar.sharding.example import example, tensor, truths
from autopar.sharding.rule import rule

aten = torch.ops.aten


def _reduced(node: fx.Node, mark: str, tag: str) -> str:
    """Dims that are reduced get ``mark``, or none listed: all; kept ones of length 1 are ``1``."""
    bound, old = arguments(node), shape(node.args[0])
    dims = bound.get("dim")
    chosen = range(len(old)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {wrap(d, len(old)) for d in chosen} if old else set()
    names = letters(len(old))
    left = (
        ["1" if i in gone else x for i, x in enumerate(names)]
        if bound.get("keepdim")
        else [x for i, x in enumerate(names) if i not in gone]
    )
    outs = ", ".join([term(left, tag)] * len(output_shapes(node)))
    return f"{term(frozen(names, gone, mark) if gone else names, tag)} -> {outs}"


@rule(
    aten.sum.default,
    aten.sum.dim_IntList,
    examples=[
        example(aten.sum.default, tensor(4, 6)),
        example(aten.sum.default, truths(4, 6)),
        example(aten.sum.dim_IntList, tensor(2, 4, 6), [1], True),
        example(aten.sum.dim_IntList, tensor(2, 4, 6), [0, -1]),
        example(aten.sum.default, tensor()),
    ],
)
def sums(node: fx.Node) -> str:
    return _reduced(node, "+", "~")


@rule(
    aten.mean.dim,
    aten.mean.default,
    examples=[example(aten.mean.dim, tensor(2, 4, 6), [-1], True), example(aten.mean.default, tensor(4, 6))],
)
def means(node: fx.Node) -> str:
    """Linear, but the mean over a shard is no share of the whole mean."""
    return _reduced(node, "!", "~")


@rule(
    aten.amax.default,
    aten.amin.default,
    aten.max.default,
    aten.min.default,
    aten.max.dim,
    aten.min.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.any.default,
    aten.any.dim,
    aten.all.default,
    aten.all.dim,
    aten.logsumexp.default,
    aten.prod.dim_int,
    aten.prod.default,
    aten.var.dim,
    aten.var.correction,
    aten.var.default,
    aten.std.dim,
    aten.std.default,
    aten.std.correction,
    aten.var_mean.correction,
    aten.median.dim,
    aten.all.dims,
    aten.any.dims,
    aten.norm.Scalar,
    aten.cosine_similarity.default,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    examples=[
        example(aten.amax.default, tensor(4, 6), [1], True),
        example(aten.max.dim, tensor(4, 6), 1),
        example(aten.max.default, tensor(4, 6)),
        example(aten.argmax.default, tensor(4, 6), -1),
        example(aten.any.dim, truths(4, 6), 1),
        example(aten.var_mean.correction, tensor(4, 6), [1], correction=1),
        example(aten.cosine_similarity.default, tensor(4, 6), tensor(1, 6), 1),
        example(aten.logsumexp.default, tensor(2, 4, 6), [1]),
        example(aten.var.correction, tensor(4, 6), [1], correction=0, keepdim=True),
        example(aten.norm.ScalarOpt_dim, tensor(4, 6), 2, [-1], True),
        example(aten.linalg_vector_norm.default, tensor(4, 6), 2, [-1], True),
    ],
)
def reductions(node: fx.Node) -> str:
    """All other reductions keep the reduced dims whole."""
    if node.target is aten.cosine_similarity.default:
        return _similarity(node)
    return _reduced(node, "!", "")


def _similarity(node: fx.Node) -> str:
    """Two operands, broadcast against each other, reduced along one dim."""
    whole = torch.broadcast_shapes(*input_shapes(node))
    names = letters(len(whole))
    dim = wrap(arguments(node)["dim"], len(names))
    marked = frozen(names, [dim])
    left, right = (term(broadcast(s, marked)) for s in input_shapes(node))
    return f"{left}, {right} -> {term(x for i, x in enumerate(names) if i != dim)}"


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.glu.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.stable,
    aten.kthvalue.default,
    aten.cummax.default,
    aten.argsort.default,
    examples=[
        example(aten.softmax.int, tensor(2, 4, 6), -1),
        example(aten.log_softmax.int, tensor(4, 6), 1),
        example(aten.glu.default, tensor(4, 12), -1),
        example(aten.sort.default, tensor(4, 6), -1),
        example(aten.kthvalue.default, tensor(4, 6), 2, 1),
        example(aten.cummax.default, tensor(4, 6), 1),
    ],
)
def along(node: fx.Node) -> str:
    """The dim it runs along stays whole (and may change its length)."""
    bound, names = arguments(node), letters(len(shape(node.args[0])))
    dim = wrap(bound["dim"], len(names))
    out = ["z!" if i == dim else x for i, x in enumerate(names)]
    if bound.get("keepdim") is False:
        out.remove("z!")
    return f"{term(frozen(names, [dim]))} -> {', '.join([term(out)] * len(output_shapes(node)))}"


@rule(aten.cumsum.default, examples=[example(aten.cumsum.default, tensor(4, 6), -1)])
def cumsum(node: fx.Node) -> str:
    names = letters(len(shape(node.args[0])))
    held = term(frozen(names, [arguments(node)["dim"]]) if names else names, "~")
    return f"{held} -> {held}"


@rule(aten.topk.default, examples=[example(aten.topk.default, tensor(4, 6), 2)])
def topk(node: fx.Node) -> str:
    return along(node)
