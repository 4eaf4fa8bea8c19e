"""Convolutions and pooling: batch and channels may be split, space stays whole (no halo exchange)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.sharding.call import arguments, letters, output_shapes, sentence, shape, term
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
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    localize=_local_groups,
    examples=[
        example(aten.conv2d.default, tensor(4, 6, 5, 5), tensor(12, 6, 3, 3), tensor(12), [1, 1], [1, 1]),
        example(aten.conv2d.default, tensor(2, 12, 5, 7), tensor(24, 2, 3, 3), tensor(24), [2, 1], [1, 0], [1, 1], 6),
        example(aten.conv2d.padding, tensor(2, 6, 5, 5), tensor(4, 6, 3, 3), tensor(4), [1, 1], "same"),
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
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    examples=[
        example(aten.conv_transpose2d.input, tensor(2, 6, 4, 5), tensor(6, 4, 3, 3), tensor(4), [2, 2]),
        example(aten.conv_transpose1d.default, tensor(2, 6, 4), tensor(6, 12, 3)),
    ],
)
def transposed(node: fx.Node) -> str | None:
    """As a convolution, the weight the other way round. None for groups, and for an input without a batch dim."""
    bound = arguments(node)
    space = len(shape(bound["weight"])) - 2
    if bound["groups"] > 1 or len(shape(bound["input"])) != space + 2:
        return None
    out, x, k = ([f"{side}{s}!" for s in range(space)] for side in "yxk")
    return sentence(
        node,
        term(["n", "o", *out], "~"),
        input=term(["n", "i+", *x], "~1"),
        weight=term(["i+", "o", *k], "~2"),
        bias="o /",
    )


@rule(
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool3d.default,
    aten.adaptive_max_pool2d.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_linear1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
    examples=[
        example(aten.max_pool2d.default, tensor(4, 6, 5, 7), [2, 2], [2, 2]),
        example(aten.avg_pool2d.default, tensor(4, 6, 5, 7), [2, 2]),
        example(aten.max_pool2d_with_indices.default, tensor(4, 6, 5, 7), [2, 2]),
        example(aten.adaptive_avg_pool2d.default, tensor(4, 6, 5, 7), [1, 1]),
        example(aten.upsample_nearest2d.vec, tensor(4, 6, 5, 7), None, [2.0, 2.0]),
    ],
)
def pooling(node: fx.Node) -> str:
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in str(node.target))
    old_shape, outs = shape(node.args[0]), len(output_shapes(node))
    names = letters(len(old_shape) - spatial)
    mark = "" if "max" in str(node.target) else "~"
    old, new = (term([*names, *(f"{side}{i}!" for i in range(spatial))], mark) for side in "xy")
    return f"{old} -> {', '.join([new] * outs)}"
