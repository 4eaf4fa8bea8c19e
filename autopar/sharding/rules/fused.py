"""Norms, rotary positions and gated units in one kernel each: rows are free."""

from __future__ import annotations

import torch
from torch import fx

import autopar.kernels  # noqa: F401 (registers the operators)
from autopar.sharding.call import arguments, broadcast, letters, sentence, shape, term
from autopar.sharding.example import constant, example, tensor
from autopar.sharding.rule import rule

ops = torch.ops.autopar


@rule(
    ops.rms_norm.default,
    ops.layer_norm.default,
    examples=[
        example(ops.rms_norm.default, tensor(2, 4, 6), tensor(6), 1e-6),
        example(ops.rms_norm.default, tensor(4, 6), None, 1e-6),
        example(ops.layer_norm.default, tensor(2, 4, 6), tensor(6), tensor(6), 1e-6),
    ],
)
def norm(node: fx.Node) -> str:
    """Splitting the rows leaves the weight's gradient partial, by the law of an edge."""
    held = term([*letters(len(shape(node)) - 1), "d!"])
    return sentence(node, held, x=held, weight="d!", bias="d!")


@rule(
    ops.add_rms_norm.default,
    ops.add_layer_norm.default,
    examples=[
        example(ops.add_rms_norm.default, tensor(2, 4, 6), tensor(2, 4, 6), tensor(6), 1e-6),
        example(ops.add_layer_norm.default, tensor(2, 4, 6), tensor(2, 4, 6), tensor(6), tensor(6), 1e-6),
    ],
)
def norm_of_sum(node: fx.Node) -> str:
    held = term([*letters(len(shape(arguments(node)["x"])) - 1), "d!"])
    return sentence(node, f"{held}, {held}", x=held, residual=held, weight="d!", bias="d!")


@rule(
    ops.rotary.default,
    examples=[
        example(ops.rotary.default, tensor(2, 6, 4, 10), constant(1, 1, 4, 8), constant(1, 1, 4, 8)),
        example(ops.rotary.default, tensor(2, 4, 6, 8), constant(2, 4, 1, 8), constant(2, 4, 1, 8), True),
    ],
)
def rotary(node: fx.Node) -> str:
    """Batch, heads and length; the entries of a head stay together, for they turn in pairs."""
    names, bound = letters(3), arguments(node)
    held = term([*names, "w!"])
    tables = {n: term([*broadcast(shape(bound[n])[:3], names), "s!"]) for n in ("cos", "sin")}
    return sentence(node, held, x=held, **tables)


@rule(
    ops.glu.default,
    examples=[example(ops.glu.default, tensor(2, 4, 6), tensor(2, 4, 6), "silu")],
)
def glu(node: fx.Node) -> str:
    """Any dim."""
    held = term(letters(len(shape(node))))
    return sentence(node, held, gate=held, up=held)
