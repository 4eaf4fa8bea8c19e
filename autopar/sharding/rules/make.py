"""Tensors made from nothing: each device makes its part, where the parts are alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.sharding.call import input_shapes, letters, shape, term
from autopar.sharding.example import example, tensor
from autopar.sharding.rule import Local, rule

aten = torch.ops.aten


def _local_size(bound: dict[str, Any], local: Local) -> dict[str, Any]:
    return {"size": list(local.outputs[0])}


@rule(
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.new_empty.default,
    localize=_local_size,
    examples=[
        example(aten.full.default, [4, 6], 2.0),
        example(aten.zeros.default, [4, 6]),
        example(aten.new_ones.default, tensor(3), [4, 6]),
        example(aten.ones.default, []),
    ],
)
def filled(node: fx.Node) -> str:
    """The operand of ``new_…`` gives its type alone."""
    like = [term(f"x{i}!" for i in range(len(s))) for s in input_shapes(node)]
    return f"{', '.join(like)} -> {term(letters(len(shape(node))))}"


@rule(
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
    aten.eye.default,
    aten.scalar_tensor.default,
    aten.rand.default,
    aten.randn.default,
    examples=[example(aten.arange.default, 6), example(aten.arange.start, 2, 8), example(aten.eye.default, 4)],
)
def whole(node: fx.Node) -> str:
    """Counters and random numbers: every device makes all of it; a shard is cut from it locally."""
    return f" -> {term(f'{x}!' for x in letters(len(shape(node))))}"
