"""The output layer and its loss in one."""

from __future__ import annotations

import torch
from torch import fx

import autopar.kernels  # noqa: F401 (registers the operator)
from autopar.sharding.call import arguments, sentence, shape
from autopar.sharding.example import example, integers, tensor
from autopar.sharding.placement import R, S
from autopar.sharding.rule import rule
from autopar.sharding.strategy import Strategy

loss = torch.ops.autopar.linear_cross_entropy.default


def vocab_linear_cross_entropy(node: fx.Node, degree: int) -> list[Strategy]:
    """Each device holds some classes' weights; what rows need of all classes is two numbers each, all-reduced."""
    bound = arguments(node)
    if shape(bound["weight"])[0] % degree:
        return []
    held = {"x": R, "weight": S(0), "labels": R, "bias": S(0)}
    return [Strategy(tuple(held[n] for n, v in bound.items() if isinstance(v, fx.Node)), (R,), loss_name)]


loss_name = "vocab_linear_cross_entropy"


@rule(
    loss,
    special=vocab_linear_cross_entropy,
    examples=[
        example(loss, tensor(4, 5), tensor(6, 5), integers(4, high=6)),
        example(loss, tensor(4, 5), tensor(6, 5), integers(4, high=6), tensor(6), 2),
        example(loss, tensor(4, 5), tensor(6, 5), integers(4, high=6), None, 3, 2.0),
    ],
)
def linear_cross_entropy(node: fx.Node) -> str:
    """A sum over rows, which may be split."""
    return sentence(node, ".", x="n+ d!", weight="v! d!", labels="n+", bias="v!")
