"""Convolutions and pooling: batch and channels may be split, space stays whole (no halo exchange)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.sharding.call import arguments, letters, sentence, shape, term
from autopar.sharding.example import example, tensor
from autopar.sharding.rule import Local, rule

aten = torch.ops.aten


def _local_groups(bound: dict[str, Any], local: Local) -> dict[str, Any]:
    """Splitting the groups divides their number; splitting channels inside of a group does not."""
    split_groups = local.inputs[0] != shape(bound["input"]) and local.inputs[1][0] != shape(bound["weight"])[0]
    return {"groups": bound["groups"] // local.degree} if bound["groups"] > 1 and split_groups else {}


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    localize=_local_groups,
    examples=[
        example(aten.conv2d.default, tensor(4, 6, 5, 5), tensor(12, 6, 3, 3), tensor(12), [1, 1], [1, 1]),
        example(aten.conv2d.default, tensor(2, 12, 5, 7), tensor(24, 2, 3, 3), tensor(24), [2, 1], [1, 0], [1, 1], 6),
        example(aten.conv1d.default, tensor(2, 6, 5), tensor(6, 1, 3), None, [1], [1], [1], 6),
    ],
)
def convolution(node: fx.Node) -> str | None:
    """Splitting the input channels leaves a partial sum. None for an input without a batch dim."""
    bound = arguments(node)
    x, w, groups = shape(bound["input"]), shape(bound["weight"]), bound["groups"]
    if len(x) != len(w):
        return None
    space = len(x) - 2
    i, o = ("i+", "o") if groups == 1 else (f"(g i={w[1]}+)", f"(g={groups} o)")
    if groups > 1 and w[1] == 1:
        i = "g"
    if groups > 1 and w[0] == groups:
        o = "g"
    inner = "1" if w[1] == 1 and groups > 1 else "i+"
    return sentence(
        node,
        term(["n", o, *(f"y{s}!" for s in range(space))], "~"),
        input=term(["n", i, *(f"x{s}!" for s in range(space))], "~1"),
        weight=term([o, inner, *(f"k{s}!" for s in range(space))], "~2"),
        bias=term([o], "/"),
    )


@rule(
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    examples=[
        example(aten.max_pool2d.default, tensor(4, 6, 5, 7), [2, 2], [2, 2]),
        example(aten.avg_pool2d.default, tensor(4, 6, 5, 7), [2, 2]),
        example(aten.adaptive_avg_pool2d.default, tensor(4, 6, 5, 7), [1, 1]),
        example(aten.upsample_nearest2d.vec, tensor(4, 6, 5, 7), None, [2.0, 2.0]),
    ],
)
def pooling(node: fx.Node) -> str:
    spatial = 1 if "1d" in str(node.target) else 2
    names = letters(len(shape(node)) - spatial)
    mark = "" if "max" in str(node.target) else "~"
    old, new = (term([*names, *(f"{side}{i}!" for i in range(spatial))], mark) for side in "xy")
    return f"{old} -> {new}"
