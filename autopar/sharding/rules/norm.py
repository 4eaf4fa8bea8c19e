"""Normalizations: the dims they average over stay whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.sharding.call import arguments, letters, sentence, shape, term
from autopar.sharding.example import constant, example, tensor
from autopar.sharding.rule import Local, rule

aten = torch.ops.aten


@rule(
    aten.layer_norm.default,
    aten.rms_norm.default,
    examples=[
        example(aten.layer_norm.default, tensor(2, 4, 6), [6], tensor(6), tensor(6)),
        example(aten.layer_norm.default, tensor(2, 4, 6), [4, 6]),
        example(aten.rms_norm.default, tensor(2, 4, 6), [6], tensor(6), 1e-6),
    ],
)
def layer_norm(node: fx.Node) -> str:
    """Splitting the rows leaves the weight's gradient partial, by the law of an edge."""
    width = len(arguments(node)["normalized_shape"])
    rows = letters(len(shape(node)) - width)
    inner = term(f"d{i}!" for i in range(width))
    held = term([*rows, *(f"d{i}!" for i in range(width))])
    return sentence(node, held, input=held, weight=inner, bias=inner)


def _local_groups(bound: dict[str, Any], local: Local) -> dict[str, Any]:
    whole = shape(local.node)[1]
    return {"num_groups": bound["num_groups"] * local.outputs[0][1] // whole}


@rule(
    aten.group_norm.default,
    localize=_local_groups,
    examples=[
        example(aten.group_norm.default, tensor(2, 24, 5, 3), 6, tensor(24), tensor(24)),
        example(aten.group_norm.default, tensor(6, 8), 2),
    ],
)
def group_norm(node: fx.Node) -> str:
    """Whole groups of channels may be split."""
    groups = arguments(node)["num_groups"]
    channels = f"(g={groups} c={shape(node)[1] // groups}!)"
    held = term(["n", channels, *(f"x{i}!" for i in range(len(shape(node)) - 2))])
    return sentence(node, held, input=held, weight=channels, bias=channels)


@rule(
    aten.instance_norm.default,
    examples=[
        example(aten.instance_norm.default, tensor(4, 6, 5), tensor(6), tensor(6), None, None, True, 0.1, 1e-5, False),
    ],
)
def instance_norm(node: fx.Node) -> str | None:
    """Batch and channels are apart; None where running statistics would be written in place."""
    if arguments(node)["running_mean"] is not None:
        return None
    held = term(["n", "c", *(f"x{i}!" for i in range(len(shape(node)) - 2))])
    return sentence(node, held, input=held, weight="c", bias="c")


@rule(
    aten.batch_norm.default,
    examples=[
        example(
            aten.batch_norm.default,
            tensor(4, 6, 5),
            tensor(6),
            tensor(6),
            constant(6),
            constant(6),
            False,
            0.1,
            1e-5,
            False,
        ),
        example(aten.batch_norm.default, tensor(4, 6, 5), tensor(6), tensor(6), None, None, True, 0.1, 1e-5, False),
    ],
)
def batch_norm(node: fx.Node) -> str:
    """In training the statistics run over the batch. They are written in place, too: with running statistics nothing
    may be split, because a device would update its own share of a buffer alone."""
    training, tracked = arguments(node)["training"], arguments(node)["running_mean"] is not None
    c = "c!" if training and tracked else "c"
    rest = [f"x{i}{'!' if training else ''}" for i in range(len(shape(node)) - 2)]
    held = term(["n!" if training else "n", c, *rest])
    return sentence(node, held, input=held, weight=c, bias=c, running_mean=c, running_var=c)
