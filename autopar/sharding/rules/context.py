"""What programs call where sequences are split over cp: along tp, whatever is not the sequence is free."""

from __future__ import annotations

from typing import Any

from torch import fx

from autopar.ir.context import ALL_TO_ALL, RING, ContextAttention, operator
from autopar.ir.ops import operands
from autopar.sharding.call import arguments, broadcast, frozen, letters, shape, term
from autopar.sharding.example import constant, example, tensor
from autopar.sharding.rule import rule

MOVES = ("own_part", "scatter_parts", "gather_parts", "gather_parts_sum", "reduce_scatter_parts")


@rule(
    *(operator(name) for name in MOVES),
    examples=[
        example(operator("own_part"), tensor(2, 4, 6), 1, 2, [], False),
        example(operator("own_part"), tensor(6, 8), 1, 2, [4, 4], True),
        example(operator("gather_parts"), tensor(4, 6), 0, 2, [], False),
        example(operator("gather_parts_sum"), tensor(6, 4), 1, 2, [4, 4], False),
    ],
)
def moves(node: fx.Node) -> str:
    """The dim that is split over cp stays whole along tp."""
    held = term(frozen(letters(len(shape(node))), [arguments(node)["dim"]]), "~")
    before = frozen(letters(len(shape(node))), [arguments(node)["dim"]])
    before[arguments(node)["dim"]] = "s!"
    return f"{term(before, '~')} -> {held}"


@rule(
    operator("exchange_parts"),
    examples=[example(operator("exchange_parts"), tensor(2, 4, 6), 1, 2, 2, [], [], False)],
)
def exchange(node: fx.Node) -> str:
    bound = arguments(node)
    before, after = (frozen(letters(len(shape(node))), [bound["source"], bound["target"]]) for _ in range(2))
    after[bound["source"]], after[bound["target"]] = "s!", "t!"
    return f"{term(before, '~')} -> {term(after, '~')}"


@rule(
    *(operator(name) for name in ("all_reduce", "all_reduce_both", "copy_in", "share_gradient")),
    examples=[
        example(operator("all_reduce"), tensor(4, 6), 2),
        example(operator("share_gradient"), tensor(4, 6), 2),
    ],
)
def sums(node: fx.Node) -> str:
    held = term(letters(len(shape(node))), "~")
    return f"{held} -> {held}"


ring, heads = ContextAttention(RING, 2, True), ContextAttention(ALL_TO_ALL, 2, True)


@rule(
    ContextAttention,
    examples=[
        example(ring, tensor(2, 6, 4, 5), tensor(2, 6, 4, 5), tensor(2, 6, 4, 3), causal=True),
        example(ring, tensor(2, 12, 4, 5), tensor(2, 4, 4, 5), tensor(2, 4, 4, 5), mask=constant(2, 1, 4, 8)),
        example(ring, tensor(3, 6, 4, 5), tensor(3, 1, 4, 5), tensor(3, 1, 4, 5), slopes=constant(6), causal=True),
        example(heads, tensor(2, 12, 4, 5), tensor(2, 12, 4, 5), tensor(2, 12, 4, 5), mask=constant(1, 12, 8, 8)),
        example(heads, tensor(3, 24, 4, 5), tensor(3, 4, 4, 5), tensor(3, 4, 4, 5), slopes=constant(24)),
    ],
)
def attention(node: fx.Node) -> str:
    """Batch and heads; with the all-to-all, heads in as many as cp takes of each."""
    bound: dict[str, Any] = {**dict(zip(("query", "key", "value"), node.args, strict=True)), **node.kwargs}
    target = node.target
    assert isinstance(target, ContextAttention)
    own = target.degree if target.kind == ALL_TO_ALL else 1
    count, keys = shape(bound["query"])[1], shape(bound["key"])[1]
    part = f" c={own}!" if own > 1 else ""
    key = f"(k={keys // own}{part})" if part else "k"
    query = f"(k={keys // own}{part} g)" if count != keys else key
    if keys == 1:
        key, query = "1", "g" if count > 1 else "1"
    packed = isinstance(bound.get("query_starts"), fx.Node)
    batch = "b!" if packed else "b"
    held = {
        "query": term([batch, query, "l!", "d!"]),
        "key": term([batch, key, "l!", "d!"]),
        "slopes": query,
        "prefix": batch,
    }
    held |= {"value": term([batch, key, "l!", "e!"]), "query_starts": "n!", "key_starts": "n!"}
    if isinstance(bound.get("mask"), fx.Node):
        held["mask"] = term(broadcast(shape(bound["mask"]), [batch, query, "r!", "s!"]))
    given = [n for n in bound if isinstance(bound[n], fx.Node)]
    assert len(given) == len(operands(node))
    return f"{', '.join(held[n] for n in given)} -> {term([batch, query, 'l!', 'e!'])}"
