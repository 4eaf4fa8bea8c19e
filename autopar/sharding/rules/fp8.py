"""The linear layer in 8-bit floating point, split as any other."""

from __future__ import annotations

import torch
from torch import fx

import autopar.kernels.fp8  # noqa: F401 (registers the operator)
from autopar.sharding.call import letters, sentence, shape, term
from autopar.sharding.example import example, tensor
from autopar.sharding.rule import rule

fp8_linear = torch.ops.autopar.fp8_linear.default


@rule(
    fp8_linear,
    examples=[
        example(fp8_linear, tensor(2, 4, 6), tensor(12, 6), tensor(12), torch.float64, patterns={"n": {(6, 6)}}),
        example(fp8_linear, tensor(4, 6), tensor(12, 6), None, torch.float64),
    ],
)
def linear(node: fx.Node) -> str:
    """As `aten.linear`; a partial input is not taken, since rounding is not linear. The examples round nothing (float64):
    a device that holds a part of the inner width has scales of its own."""
    rows = letters(len(shape(node)) - 1)
    return sentence(node, term([*rows, "n"]), x=term([*rows, "k+"]), weight="n k+", bias="n /")
