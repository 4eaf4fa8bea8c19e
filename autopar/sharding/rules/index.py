"""Look-ups: embedding, gather, index_select, advanced indexing, one_hot.

The dims looked up in stay whole, or are split: then each device looks up what it has, and the sum is the look-up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.sharding.call import arguments, broadcast, letters, sentence, shape, term, wrap
from autopar.sharding.example import example, integers, tensor
from autopar.sharding.placement import P, R, S
from autopar.sharding.rule import rule
from autopar.sharding.strategy import Strategy

aten = torch.ops.aten


def vocab_embedding(node: fx.Node, degree: int) -> list[Strategy]:
    """Each device holds some rows and looks up the ids it has: the sum over devices is the embedding (Megatron-LM)."""
    rows = shape(node.args[0])[0]
    return [] if rows % degree else [Strategy((S(0), R), (P,), "vocab_embedding")]


@rule(
    aten.embedding.default,
    special=vocab_embedding,
    examples=[
        example(aten.embedding.default, tensor(12, 6), integers(2, 4, high=12)),
        example(aten.embedding.default, tensor(12, 4), integers(6, high=12), 3),
    ],
)
def embedding(node: fx.Node) -> str:
    ids = letters(len(shape(node.args[1])))
    return f"v! e ~, {term(ids)} -> {term([*ids, 'e'], '~')}"


def split_lookup(node: fx.Node, degree: int) -> list[Strategy]:
    """Each device holds a part of the one dim looked up in (a table's rows, the experts of a mixture) and finds what it has,
    zeros elsewhere. (`take_along_dim` broadcasts: its dims are not the source's.)"""
    at = None if node.target is aten.take_along_dim.default else looked_up(node)
    source: Any = node.args[0]
    if at is None or shape(source)[at] % degree or not source.meta["val"].is_floating_point():
        return []
    return [Strategy((S(at), R), (P,), "split_lookup")]


def looked_up(node: fx.Node) -> int | None:
    """The dim that a call looks up in by one tensor of whole numbers; None where that is not so."""
    bound = arguments(node)
    if node.target is not aten.index.Tensor:
        return wrap(bound["dim"], len(shape(bound["self"])))
    at = [i for i, x in enumerate(bound["indices"]) if x is not None]
    return at[0] if len(at) == 1 and bound["indices"][at[0]].meta["val"].dtype != torch.bool else None


@rule(
    aten.gather.default,
    aten.take_along_dim.default,
    special=split_lookup,
    examples=[
        example(aten.gather.default, tensor(4, 5), 1, integers(4, 6, high=5)),
        example(aten.gather.default, tensor(4, 6, 7), -1, integers(4, 2, 3, high=7)),
        example(aten.gather.default, tensor(5, 12, 3), 1, integers(4, 8, 3, high=12)),
        example(aten.take_along_dim.default, tensor(4, 6), integers(1, 3, high=6), 1),
    ],
)
def gather(node: fx.Node) -> str | None:
    """Along the other dims an index of the same length goes with the tensor; a shorter one reads a part of it. None for an
    index that is broadcast, or that counts through the flattened tensor."""
    old, new, bound = shape(node.args[0]), shape(node), arguments(node)
    if bound["dim"] is None or shape(bound.get("index", bound.get("indices"))) != new:
        return None
    dim = wrap(bound["dim"], len(old))
    source = [f"a{i}" if i != dim and n == m else f"x{i}!" for i, (n, m) in enumerate(zip(old, new, strict=True))]
    index = [f"a{i}" if i == dim or n == m else f"y{i}!" for i, (n, m) in enumerate(zip(old, new, strict=True))]
    return f"{term(source, '~')}, {term(index)} -> {term(index, '~')}"


@rule(
    aten.index_select.default,
    special=split_lookup,
    examples=[
        example(aten.index_select.default, tensor(4, 5, 6), 1, integers(12, high=5)),
        example(aten.index_select.default, tensor(4, 6, 5), -2, integers(8, high=6)),
    ],
)
def index_select(node: fx.Node) -> str:
    names = letters(len(shape(node.args[0])))
    dim = wrap(arguments(node)["dim"], len(names))
    source, out = list(names), list(names)
    source[dim], out[dim] = "n!", "i"
    return f"{term(source, '~')}, i -> {term(out, '~')}"


@rule(
    aten.index.Tensor,
    special=split_lookup,
    examples=[
        example(aten.index.Tensor, tensor(4, 6, 5), [integers(12, high=4)]),
        example(aten.index.Tensor, tensor(5, 12, 6), [None, integers(2, 3, high=12)]),
        example(aten.index.Tensor, tensor(5, 4, 6), [None, integers(2, 3, high=4)]),
        example(aten.index.Tensor, tensor(5, 4, 6), [integers(6, 1, high=5), integers(8, high=4)]),
        example(aten.index.Tensor, tensor(5, 4, 3), [integers(6, high=5), None, integers(6, high=3)]),
    ],
)
def index(node: fx.Node) -> str | None:
    """Index tensors broadcast against each other; their dims stand where the first of them does, or first of all when
    they are not neighbours. None for boolean masks, whose result depends on the data."""
    old = shape(node.args[0])
    given = list(node.args[1])  # type: ignore[arg-type]
    at = [i for i, x in enumerate(given) if x is not None]
    if any(given[i].meta["val"].dtype == torch.bool for i in at):
        return None
    shapes = [shape(given[i]) for i in at]
    common = torch.broadcast_shapes(*shapes)
    made = ["1" if n == 1 else x for n, x in zip(common, letters(len(common), "i"), strict=True)]
    names = [f"x{i}!" if i in at else f"a{i}" for i in range(len(old))]
    kept = [x for i, x in enumerate(names) if i not in at]
    start = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    out = [*kept[:start], *made, *kept[start:]]
    terms = [term(broadcast(s, letters(len(common), "i"))) for s in shapes]
    return f"{', '.join([term(names, '~'), *terms])} -> {term(out, '~')}"


@rule(
    aten.index_add.default,
    examples=[example(aten.index_add.default, tensor(4, 5, 6), 1, integers(3, high=5), tensor(4, 3, 6))],
)
def index_add(node: fx.Node) -> str:
    """Dims other than the one added along go together; linear in both tensors at once."""
    names = letters(len(shape(node)))
    dim = wrap(arguments(node)["dim"], len(names))
    held, source = ([f"{x}!" if i == dim else a for i, a in enumerate(names)] for x in "nm")
    return sentence(node, term(held, "~"), self=term(held, "~"), index="m!", source=term(source, "~"))


@rule(
    aten.searchsorted.Tensor,
    aten.bucketize.Tensor,
    examples=[
        example(aten.searchsorted.Tensor, tensor(5), tensor(4, 6)),
        example(aten.bucketize.Tensor, tensor(4, 6), tensor(5)),
    ],
)
def search(node: fx.Node) -> str | None:
    """Values looked up in one sorted row; None for a row each."""
    bound, names = arguments(node), letters(len(shape(node)))
    sorted_ = "sorted_sequence" if "sorted_sequence" in bound else "boundaries"
    if len(shape(bound[sorted_])) != 1:
        return None
    return sentence(node, term(names), **{sorted_: "n!", "self": term(names), "sorter": "n!"})


@rule(aten.one_hot.default, examples=[example(aten.one_hot.default, integers(4, 6, high=5), 5)])
def one_hot(node: fx.Node) -> str | None:
    """None where the number of classes is to be read off the data."""
    if arguments(node)["num_classes"] < 0:
        return None
    names = letters(len(shape(node.args[0])))
    return f"{term(names)} -> {term([*names, 'n!'])}"


@rule(
    aten.scatter_add.default,
    aten.scatter.src,
    examples=[
        example(aten.scatter_add.default, tensor(4, 5), 1, integers(4, 3, high=5), tensor(4, 3)),
        example(aten.scatter_add.default, tensor(5, 6), 0, integers(3, 6, high=5), tensor(3, 6)),
    ],
)
def scatter(node: fx.Node) -> str | None:
    """Dims other than the one scattered along may be split where all three tensors have the same length."""
    bound = arguments(node)
    old, idx, src = shape(bound["self"]), shape(bound["index"]), shape(bound["src"])
    dim = wrap(bound["dim"], len(old))
    same = [i != dim and old[i] == idx[i] == src[i] for i in range(len(old))]

    def names(prefix: str) -> str:
        return term(f"a{i}" if ok else f"{prefix}{i}!" for i, ok in enumerate(same))

    return f"{names('x')}, {names('y')}, {names('z')} -> {names('x')}"
