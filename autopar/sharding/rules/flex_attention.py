"""Attention by torch's flex_attention."""

from __future__ import annotations

import torch
from torch import fx

import autopar.kernels  # noqa: F401 (registers the operator)
from autopar.sharding.call import arguments, broadcast, sentence, shape, term
from autopar.sharding.example import Spec, constant, example, integers, tensor, truths
from autopar.sharding.rule import rule

flex = torch.ops.autopar.flex_attention.default
BIAS = Spec((1, 6, 1, 4), constant=True)


@rule(
    flex,
    examples=[
        example(flex, tensor(2, 6, 4, 5), tensor(2, 6, 8, 5), tensor(2, 6, 8, 3), truths(2, 1, 4, 8)),
        example(flex, tensor(2, 12, 4, 5), tensor(2, 6, 4, 5), tensor(2, 6, 4, 5), None, constant(12), causal=True),
        example(flex, tensor(2, 6, 4, 5), tensor(2, 1, 4, 5), tensor(2, 1, 4, 5), causal=True, window=2, softcap=2.0),
        example(flex, tensor(2, 6, 4, 5), tensor(2, 2, 4, 5), tensor(2, 2, 4, 5), BIAS, causal=True),
        example(
            flex, tensor(6, 4, 4, 5), tensor(6, 4, 4, 5), tensor(6, 4, 4, 5), None, None, integers(6, high=4),
            integers(6, 4, high=2), causal=True,
        ),
    ],
)  # fmt: skip
def attention(node: fx.Node) -> str:
    """Batch and heads; grouped queries are ``(k g)``, their key heads ``k``. Queries may be split along the sequence where no
    position matters."""
    bound = arguments(node)
    heads, key_heads = shape(bound["query"])[1], shape(bound["key"])[1]
    queries, keys = "h", "h"
    if heads != key_heads:
        queries, keys = (f"(k={key_heads} g)", "k") if key_heads > 1 else ("g", "1")
    free = not (bound["causal"] or bound["window"] or bound["slopes"] is not None or bound["documents"] is not None)
    rows, mask = "l" if free else "l!", ""
    if isinstance(bound["mask"], fx.Node):
        mask = term(broadcast(shape(bound["mask"]), ["b", queries, rows, "s!"]))
    return sentence(
        node,
        term(["b", queries, rows, "e!"]),
        query=term(["b", queries, rows, "d!"]),
        key=term(["b", keys, "s!", "d!"]),
        value=term(["b", keys, "s!", "e!"]),
        mask=mask,
        slopes=queries,
        prefix="b",
        documents=term(["b", rows]),
    )
