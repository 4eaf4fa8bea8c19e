"""Losses. A sum over examples may be split; a mean may not, its count would be the shard's."""

from __future__ import annotations

import torch
from torch import fx

from autopar.sharding.call import arguments, broadcast, input_shapes, letters, sentence, shape, term
from autopar.sharding.example import constant, example, integers, tensor
from autopar.sharding.placement import R, S
from autopar.sharding.rule import rule
from autopar.sharding.strategy import Strategy

aten = torch.ops.aten
_MARK = {0: "", 1: "!", 2: "+"}  # aten's reduction: none, mean, sum


def _classes(node: fx.Node, tag: str) -> str | None:
    """Logits ``n c …`` and labels ``n …``; None where the targets are probabilities, of the logits' shape."""
    bound = arguments(node)
    target = bound["target"].meta["val"]
    logits = shape(bound["self"])
    if target.is_floating_point():
        return None
    mark = _MARK[bound["reduction"]]
    rows = [f"{x}{mark}" for x in letters(len(logits) - 1)]
    classes = [*rows[:1], "c!", *rows[1:]] if rows else ["c!"]
    out = rows if bound["reduction"] == 0 else []
    return sentence(node, term(out, tag), self=term(classes, tag), target=term(rows), weight="c!")


def vocab_cross_entropy(node: fx.Node, degree: int) -> list[Strategy]:
    """Each device holds some classes; maximum, sum of exponentials and the label's logit are all-reduced (Megatron)."""
    bound = arguments(node)
    logits = shape(bound["self"])
    dim = 1 if len(logits) > 1 else 0
    soft = bound["label_smoothing"] or bound["target"].meta["val"].is_floating_point()
    if bound["weight"] is not None or soft or logits[dim] % degree:
        return []
    return [Strategy((S(dim), R), (R,), "vocab_cross_entropy")]


_xent = aten.cross_entropy_loss.default


@rule(
    _xent,
    special=vocab_cross_entropy,
    examples=[
        example(_xent, tensor(4, 6), integers(4, high=6), None, 2),
        example(_xent, tensor(4, 6), integers(4, high=6), None, 2, 2),
        example(_xent, tensor(4, 6), integers(4, high=6), None, 1, 2),
        example(_xent, tensor(4, 6), integers(4, high=6), None, 0, 2),
        example(_xent, tensor(4, 6), integers(4, high=6), constant(6), 2, 1, 0.1),
        example(_xent, tensor(2, 6, 4), integers(2, 4, high=6), None, 2),
        example(_xent, tensor(4, 6), tensor(4, 6), None, 2),
    ],
)
def cross_entropy(node: fx.Node) -> str | None:
    return _classes(node, "")


@rule(
    aten.nll_loss_nd.default,
    aten.nll_loss.default,
    aten.nll_loss2d.default,
    examples=[
        example(aten.nll_loss_nd.default, tensor(4, 6), integers(4, high=6), None, 2, 2),
        example(aten.nll_loss.default, tensor(4, 6), integers(4, high=6), constant(6), 0),
        example(aten.nll_loss_nd.default, tensor(2, 6, 4), integers(2, 4, high=6), None, 1),
    ],
)
def nll_loss(node: fx.Node) -> str | None:
    return _classes(node, "~")


@rule(
    aten.mse_loss.default,
    aten.l1_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.binary_cross_entropy.default,
    aten.kl_div.default,
    examples=[
        example(aten.mse_loss.default, tensor(4, 6), tensor(4, 6), 2),
        example(aten.mse_loss.default, tensor(4, 6), tensor(4, 6), 1),
        example(aten.mse_loss.default, tensor(4, 6), tensor(4, 6), 0),
        example(aten.l1_loss.default, tensor(2, 4, 6), tensor(4, 1), 2),
        example(aten.binary_cross_entropy_with_logits.default, tensor(4, 6), tensor(4, 6), None, None, 2),
    ],
)
def elementwise(node: fx.Node) -> str:
    """Losses of pairs of elements, broadcast against each other."""
    whole = torch.broadcast_shapes(*input_shapes(node))
    reduction = arguments(node)["reduction"]
    names = [f"{x}{_MARK[reduction]}" for x in letters(len(whole))]
    out = ["1" if n == 1 else x for n, x in zip(whole, names, strict=True)] if reduction == 0 else []
    return f"{', '.join(term(broadcast(s, names)) for s in input_shapes(node))} -> {term(out)}"
