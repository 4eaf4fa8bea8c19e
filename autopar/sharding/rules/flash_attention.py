"""Attention by this project's own kernel."""

from __future__ import annotations

import torch
from torch import fx

import autopar.kernels  # noqa: F401 (registers the operator)
from autopar.sharding.call import arguments, sentence, shape, term
from autopar.sharding.example import constant, example, integers, tensor
from autopar.sharding.rule import rule

flash = torch.ops.autopar.flash_attention.default


@rule(
    flash,
    examples=[
        example(flash, tensor(2, 6, 4, 5), tensor(2, 6, 8, 5), tensor(2, 6, 8, 3)),
        example(flash, tensor(2, 12, 4, 5), tensor(2, 6, 4, 5), tensor(2, 6, 4, 5), constant(12), causal=True),
        example(flash, tensor(2, 6, 4, 5), tensor(2, 1, 4, 5), tensor(2, 1, 4, 5), causal=True, window=2, softcap=2.0),
        example(
            flash, tensor(6, 4, 4, 5), tensor(6, 4, 4, 5), tensor(6, 4, 4, 5), None, integers(6, high=4), causal=True
        ),
    ],
)
def attention(node: fx.Node) -> str:
    """Batch and heads; grouped queries are ``(k g)``, their key heads ``k``. Queries may be split along the sequence where no
    position matters. Packed sequences stay whole."""
    bound = arguments(node)
    heads, key_heads = shape(bound["query"])[1], shape(bound["key"])[1]
    queries, keys = "h", "h"
    if heads != key_heads:
        queries, keys = (f"(k={key_heads} g)", "k") if key_heads > 1 else ("g", "1")
    free = not (bound["causal"] or bound["window"] or bound["slopes"] is not None or bound["query_starts"] is not None)
    rows, batch = "l" if free else "l!", "b" if bound["query_starts"] is None else "b!"
    return sentence(
        node,
        f"{term([batch, queries, rows, 'e!'])}, {term([batch, queries, rows])}",
        query=term([batch, queries, rows, "d!"]),
        key=term([batch, keys, "s!", "d!"]),
        value=term([batch, keys, "s!", "e!"]),
        slopes=queries,
        prefix=batch,
        query_starts="n!",
        key_starts="n!",
    )
