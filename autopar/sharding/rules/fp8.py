"""The linear layers in 8-bit floating point, split as any other."""

from __future__ import annotations

import torch
from torch import fx

import autopar.kernels.fp8
import autopar.kernels.fp8_delayed  # noqa: F401 (registers the operator)
from autopar.sharding.call import letters, sentence, shape, term
from autopar.sharding.example import constant, example, tensor
from autopar.sharding.rule import rule

fp8_linear = torch.ops.autopar.fp8_linear.default
fp8_linear_delayed = torch.ops.autopar.fp8_linear_delayed.default
PLAIN = torch.float64, torch.float64


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


@rule(
    fp8_linear_delayed,
    examples=[
        example(fp8_linear_delayed, tensor(2, 4, 6), tensor(12, 6), tensor(12), constant(3, 5), *PLAIN),
        example(fp8_linear_delayed, tensor(4, 6), tensor(12, 6), None, constant(3, 5), *PLAIN),
    ],
)
def linear_delayed(node: fx.Node) -> str:
    """The same; every device has the whole state and notes what it sees of its own parts, which is merged after the step."""
    rows = letters(len(shape(node)) - 1)
    return sentence(node, term([*rows, "n"]), x=term([*rows, "k+"]), weight="n k+", bias="n /", state="s! t!")
