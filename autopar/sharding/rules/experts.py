"""A mixture of experts in one: experts, or each expert's inner width, may be split."""

from __future__ import annotations

import torch
from torch import fx

import autopar.kernels  # noqa: F401 (registers the operator)
from autopar.sharding.call import sentence
from autopar.sharding.example import counted, example, integers, tensor
from autopar.sharding.rule import rule

routed = torch.ops.autopar.routed_experts.default
GIVEN = (tensor(6, 10), tensor(6, 3), integers(6, 3, high=4), counted(4))
WEIGHTS = (tensor(4, 8, 10), tensor(4, 8, 10), tensor(4, 10, 8))


@rule(
    routed,
    examples=[example(routed, *GIVEN, *WEIGHTS, "silu"), example(routed, *GIVEN, None, *WEIGHTS[1:], "gelu")],
)
def routed_experts(node: fx.Node) -> str:
    """A device with some experts computes the tokens that chose these, and a sum over devices is the mixture; so it is with
    a part of every expert's inner width. Tokens may be split, whoever computes them."""
    given = {"tokens": "t d!", "scores": "t k!", "chosen": "t k!", "numbers": "e+"}
    return sentence(node, "t d!", **given, gate="e+ f+ d!", up="e+ f+ d!", down="e+ d! f+")
