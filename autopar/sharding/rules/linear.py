"""Matrix products: linear, matmul, bmm, addmm, baddbmm, mm, einsum and their like."""

from __future__ import annotations

import string

import torch
from torch import fx

from autopar.sharding.call import arguments, broadcast, letters, sentence, shape, term
from autopar.sharding.example import example, tensor
from autopar.sharding.rule import rule

aten = torch.ops.aten


@rule(
    aten.linear.default,
    examples=[
        example(aten.linear.default, tensor(2, 4, 6), tensor(12, 6), tensor(12), patterns={"n": {(6, 6)}, "k": {(6,)}}),
        example(aten.linear.default, tensor(4, 6), tensor(12, 6), patterns={"n": {(6, 6)}}),
        example(aten.linear.default, tensor(6), tensor(4, 6)),
    ],
)
def linear(node: fx.Node) -> str:
    """Split n: by columns; split k: by rows, the output a partial sum, each device adding its share of the bias."""
    rows = letters(len(shape(node)) - 1)
    return sentence(node, term([*rows, "n"], "~"), input=term([*rows, "k+"], "~1"), weight="n k+ ~2", bias="n /")


@rule(
    aten.addmm.default,
    examples=[
        example(aten.addmm.default, tensor(12), tensor(4, 6), tensor(6, 12), patterns={"n": {(6, 6)}}),
        example(aten.addmm.default, tensor(4, 12), tensor(4, 6), tensor(6, 12), beta=0.5, alpha=2.0),
        example(aten.addmm.default, tensor(1, 1), tensor(4, 6), tensor(6, 12)),
    ],
)
def addmm(node: fx.Node) -> str:
    added = term(broadcast(shape(arguments(node)["self"]), ["m", "n"]), "/")
    return sentence(node, "m n ~", self=added, mat1="m k+ ~1", mat2="k+ n ~2")


@rule(
    aten.baddbmm.default,
    examples=[
        example(aten.baddbmm.default, tensor(2, 4, 12), tensor(2, 4, 6), tensor(2, 6, 12), beta=0.5),
        example(aten.baddbmm.default, tensor(2, 1, 12), tensor(2, 4, 6), tensor(2, 6, 12), patterns={"b": {(2,)}}),
    ],
)
def baddbmm(node: fx.Node) -> str:
    added = term(broadcast(shape(arguments(node)["self"]), ["b", "m", "n"]), "/")
    return sentence(node, "b m n ~", self=added, batch1="b m k+ ~1", batch2="b k+ n ~2")


@rule(aten.bmm.default, examples=[example(aten.bmm.default, tensor(2, 4, 6), tensor(2, 6, 12))])
def bmm(node: fx.Node) -> str:
    return "b m k+ ~1, b k+ n ~2 -> b m n ~"


@rule(aten.mm.default, examples=[example(aten.mm.default, tensor(4, 6), tensor(6, 12))])
def mm(node: fx.Node) -> str:
    return "m k+ ~1, k+ n ~2 -> m n ~"


@rule(aten.mv.default, examples=[example(aten.mv.default, tensor(4, 6), tensor(6))])
def mv(node: fx.Node) -> str:
    return "m k+ ~1, k+ ~2 -> m ~"


@rule(aten.dot.default, examples=[example(aten.dot.default, tensor(6), tensor(6))])
def dot(node: fx.Node) -> str:
    return "k+ ~1, k+ ~2 -> . ~"


@rule(
    aten.addmv.default,
    examples=[example(aten.addmv.default, tensor(4), tensor(4, 6), tensor(6))],
)
def addmv(node: fx.Node) -> str:
    added = term(broadcast(shape(arguments(node)["self"]), ["m"]), "/")
    return sentence(node, "m ~", self=added, mat="m k+ ~1", vec="k+ ~2")


@rule(
    aten.inner.default,
    examples=[example(aten.inner.default, tensor(2, 4, 6), tensor(3, 6))],
)
def inner(node: fx.Node) -> str | None:
    """None where one of the two has no dims: that is a plain product."""
    left, right = (letters(len(shape(a)) - 1, x) for a, x in zip(node.args, "ab", strict=True))
    if () in [shape(a) for a in node.args]:
        return None
    return f"{term([*left, 'k+'], '~1')}, {term([*right, 'k+'], '~2')} -> {term([*left, *right], '~')}"


@rule(
    aten.tensordot.default,
    examples=[example(aten.tensordot.default, tensor(2, 4, 6), tensor(6, 4, 3), [1, 2], [1, 0])],
)
def tensordot(node: fx.Node) -> str:
    """Pairs of dims are summed over; the others follow each other."""
    bound = arguments(node)
    left, right = letters(len(shape(node.args[0])), "a"), letters(len(shape(node.args[1])), "b")
    for i, (p, q) in enumerate(zip(bound["dims_self"], bound["dims_other"], strict=True)):
        left[p] = right[q] = f"k{i}+"
    out = [x for x in (*left, *right) if not x.endswith("+")]
    return f"{term(left, '~1')}, {term(right, '~2')} -> {term(out, '~')}"


@rule(
    aten.cdist.default,
    examples=[example(aten.cdist.default, tensor(2, 4, 5), tensor(2, 6, 5))],
)
def cdist(node: fx.Node) -> str:
    """Distances of all pairs: no product, but split as one."""
    left, right = (shape(a) for a in node.args[:2])
    batch = letters(len(shape(node)) - 2)
    rows, columns = ([*broadcast(s[:-2], batch), x, "d!"] for s, x in ((left, "m"), (right, "n")))
    return f"{term(rows)}, {term(columns)} -> {term([*batch, 'm', 'n'])}"


@rule(aten.outer.default, examples=[example(aten.outer.default, tensor(4), tensor(6))])
def outer(node: fx.Node) -> str:
    return "m ~1, n ~2 -> m n ~"


@rule(
    aten.matmul.default,
    examples=[
        example(aten.matmul.default, tensor(2, 4, 6), tensor(6, 12)),
        example(aten.matmul.default, tensor(2, 3, 4, 6), tensor(2, 3, 6, 12)),
        example(aten.matmul.default, tensor(2, 1, 4, 6), tensor(3, 6, 12)),
        example(aten.matmul.default, tensor(6), tensor(6, 4)),
        example(aten.matmul.default, tensor(2, 4, 6), tensor(6)),
        example(aten.matmul.default, tensor(6), tensor(6)),
    ],
)
def matmul(node: fx.Node) -> str:
    """Batch dims broadcast; a vector has no row (or column) dim."""
    left, right = (shape(a) for a in node.args)
    rows, columns = ["m"] * (len(left) > 1), ["n"] * (len(right) > 1)
    batch = letters(len(shape(node)) - len(rows) - len(columns))
    a = [*broadcast(left[:-2], batch), *rows, "k+"]
    b = [*broadcast(right[:-2], batch), "k+", *columns]
    return f"{term(a, '~1')}, {term(b, '~2')} -> {term([*batch, *rows, *columns], '~')}"


def _spelled_out(equation: str, shapes: list[tuple[int, ...]]) -> str:
    """The equation with letters in place of every ``...``; dims that broadcast are aligned at the end."""
    if "..." not in equation:
        return equation
    left, arrow, right = equation.partition("->")
    parts = left.split(",")
    free = [x for x in string.ascii_letters if x not in equation]
    counts = [len(s) - len(p.replace("...", "")) if "..." in p else 0 for p, s in zip(parts, shapes, strict=True)]
    names = free[: max(counts)]
    parts = [p.replace("...", "".join(names[len(names) - n :])) for p, n in zip(parts, counts, strict=True)]
    implied = "".join(names) + "".join(sorted(x for x in set(left) - set(".,") if left.count(x) == 1))
    return f"{','.join(parts)}->{right.replace('...', ''.join(names)) if arrow else implied}"


@rule(
    aten.einsum.default,
    examples=[
        example(aten.einsum.default, "bqhd,bkhd->bhqk", [tensor(2, 4, 6, 3), tensor(2, 8, 6, 3)]),
        example(aten.einsum.default, "bhqk,bkhd->bqhd", [tensor(2, 6, 4, 8), tensor(2, 8, 6, 3)]),
        example(aten.einsum.default, "bij, bjk", [tensor(2, 4, 6), tensor(2, 6, 3)]),
        example(aten.einsum.default, "ab->", [tensor(4, 6)]),
        example(aten.einsum.default, "ab,ab,b->ab", [tensor(4, 6), tensor(1, 6), tensor(6)]),
        example(aten.einsum.default, "...ij,jk", [tensor(2, 4, 6), tensor(6, 3)]),
        example(aten.einsum.default, "...md,...nd->...mn", [tensor(2, 4, 6), tensor(2, 8, 6)]),
    ],
)
def einsum(node: fx.Node) -> str | None:
    """The equation is nearly the notation. None for a repeated index in one operand (a diagonal)."""
    shapes = [shape(a) for a in node.args[1]]  # type: ignore[union-attr]
    left, arrow, right = _spelled_out(str(node.args[0]).replace(" ", ""), shapes).partition("->")
    parts = left.split(",")
    if any(len(set(p)) != len(p) for p in parts):
        return None
    if not arrow:
        right = "".join(sorted(x for x in set(left) - {","} if left.count(x) == 1))
    fits = {x: max(s[p.index(x)] for p, s in zip(parts, shapes, strict=True) if x in p) for p in parts for x in p}
    terms = [
        term(["1" if n == 1 else x if x in right else f"{x}+" for x, n in zip(p, s, strict=True)], f"~{i}")
        for i, (p, s) in enumerate(zip(parts, shapes, strict=True))
    ]
    return f"{', '.join(terms)} -> {term(['1' if fits[x] == 1 else x for x in right], '~')}"
