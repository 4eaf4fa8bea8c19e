"""Scaled dot-product attention."""

from __future__ import annotations

import torch
from torch import fx

from autopar.sharding.call import arguments, broadcast, letters, sentence, shape, term
from autopar.sharding.example import example, tensor
from autopar.sharding.rule import rule

aten = torch.ops.aten
sdpa = aten.scaled_dot_product_attention.default


@rule(
    sdpa,
    examples=[
        example(sdpa, tensor(2, 6, 4, 5), tensor(2, 6, 8, 5), tensor(2, 6, 8, 3), tensor(2, 1, 4, 8)),
        example(sdpa, tensor(2, 6, 4, 5), tensor(2, 6, 4, 5), tensor(2, 6, 4, 5), None, 0.0, True),
        example(sdpa, tensor(2, 12, 4, 5), tensor(2, 6, 4, 5), tensor(2, 6, 4, 5), None, 0.0, True, enable_gqa=True),
        example(
            sdpa, tensor(3, 12, 4, 5), tensor(3, 2, 8, 5), tensor(3, 2, 8, 5), tensor(3, 12, 4, 8), enable_gqa=True
        ),
        example(sdpa, tensor(2, 6, 4, 5), tensor(2, 1, 4, 5), tensor(2, 1, 4, 5), None, 0.0, False, enable_gqa=True),
        example(sdpa, tensor(6, 4, 5), tensor(6, 8, 5), tensor(6, 8, 5), tensor(4, 8)),
    ],
)
def attention(node: fx.Node) -> str:
    """Batch and heads; grouped queries are ``(k g)``, their key heads ``k``. Queries may be split along the sequence,
    each device reading all keys, where the mask is explicit: ``is_causal`` counts from the shard's own start."""
    bound = arguments(node)
    q, k, v = (shape(bound[x]) for x in ("query", "key", "value"))
    batch = letters(len(q) - 2)
    heads, keys, grouped = list(batch), broadcast(k[:-2], batch), list(batch)
    if bound["enable_gqa"] and q[-3] != k[-3]:
        heads[-1] = f"(k={k[-3]} g)" if k[-3] > 1 else "g"
        keys[-1] = "k" if k[-3] > 1 else "1"
        grouped[-1] = heads[-1]
    rows = "l!" if bound["is_causal"] else "l"
    mask = ""
    if isinstance(bound["attn_mask"], fx.Node):
        names = [*grouped, rows, "s!"]
        mask = term(broadcast(shape(bound["attn_mask"]), names))
    return sentence(
        node,
        term([*heads, rows, "e!"]),
        query=term([*heads, rows, "d!"]),
        key=term([*keys, "s!", "d!"]),
        value=term([*broadcast(v[:-2], keys), "s!", "e!"]),
        attn_mask=mask,
    )
