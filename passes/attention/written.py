"""Written-out attention, read back: softmax(scale · q @ k.T + terms) @ v, whatever lies in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.ir.shapes import same_shape

aten = torch.ops.aten

SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default}
RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}
SAME = {aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.alias.default}
"""Operators that leave every value what it is, rounding apart."""

ABSORBS = -1e30
"""Added to a float64 of at most 1e13, a number this low is the sum: half of float64's 53 bits reach no further down."""


class UnlikeError(Exception):
    """This is no attention that the fused operator can express: why."""


@dataclass(frozen=True)
class Term:
    """``factor · node`` added to the scores; with ``fill`` the scores are that number where ``node`` is true (false:
    ``where_false``). ``lead``: the scores' leading dims where the term is added."""

    node: fx.Node
    factor: float = 1.0
    lead: tuple[Any, ...] = ()
    fill: float | None = None
    where_false: bool = False


@dataclass
class Written:
    """A core as written. ``scores`` is what the softmax reads; ``key`` still stands transposed."""

    softmax: fx.Node
    scores: fx.Node
    product: fx.Node
    mixture: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    dropout: float = 0.0
    scale: float = 1.0
    terms: list[Term] = field(default_factory=list)
    softcap: float = 0.0


def read(softmax: fx.Node) -> Written | None:
    """The core around a softmax; None where it mixes no values. Raises `UnlikeError` for what cannot be fused."""
    mixture, dropout, alone = forwards(softmax)
    if mixture is None:
        return None
    scores: Any = softmax.args[0]
    if not reaches(scores):
        return None
    if softmax.args[1] not in (-1, dims(softmax) - 1):
        raise UnlikeError("the softmax does not run over the keys")
    if not alone:
        raise UnlikeError("the attention weights are read elsewhere too")
    scale, terms, product, cap = backwards(scores)
    factors: Any = product.args[1:3] if product.target is aten.baddbmm.default else product.args[:2]
    query, key = factors
    value: Any = mixture.args[1]
    return Written(softmax, scores, product, mixture, query, key, value, dropout, scale, terms, cap)


def forwards(softmax: fx.Node) -> tuple[fx.Node | None, float, bool]:
    """The product of the weights with the values, the dropout before it, and whether nobody else reads the weights."""
    node, dropout, alone = softmax, 0.0, True
    for _ in range(8):
        alone &= len(node.users) == 1
        nexts = [u for u in node.users if passes_on(u)]
        product = next((u for u in node.users if u.target in PRODUCTS and u.args[0] is node), None)
        if product is not None and product.target is not aten.baddbmm.default:
            return product, dropout, alone
        if not nexts:
            return None, dropout, alone
        node = nexts[0]
        if node.target is aten.dropout.default and node.args[2] is True:
            if dropout:
                raise UnlikeError("the attention weights are dropped out twice")
            dropout = float(node.args[1])  # type: ignore[arg-type]
    return None, dropout, alone


def passes_on(node: fx.Node) -> bool:
    return node.target in SAME or node.target in RESHAPES or node.target in (aten.dropout.default, aten.expand.default)


def reaches(node: Any, depth: int = 16) -> bool:
    """Whether a product lies on the way up from a node through what `backwards` may meet."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not depth:
        return False
    if node.target in PRODUCTS:
        return True
    return any(reaches(a, depth - 1) for a in scored(node))


def scored(node: fx.Node) -> list[Any]:
    """The operands of a node that may be scores: of its shape, or what it reshapes."""
    if node.target in (aten.where.self, aten.where.ScalarOther):
        return list(node.args[1:])
    if node.target in RESHAPES:
        return [node.args[0]]
    return [a for a in node.args if isinstance(a, fx.Node) and same_shape(a.meta["val"], node.meta["val"])]


# ------------------------------------------------------------------ from the softmax up to q @ k.T


def backwards(node: fx.Node) -> tuple[float, list[Term], fx.Node, float]:
    """(scale, terms, product, cap) such that ``node`` is s + Σ terms, the latter filled in where they fill; s is scale · product,
    with a cap cap · tanh(scale · product / cap)."""
    factor, terms, last, cap = 1.0, [], node, 0.0
    while node.target not in PRODUCTS:
        if node is not last and len(node.users) > 1:
            raise UnlikeError(f"the scores are read elsewhere too ({node.name})")
        if node.target is aten.tanh.default and not cap:
            cap, node = factor, node.args[0]  # type: ignore[assignment]
            continue
        following, by, added = step(node)
        if cap and added:
            raise UnlikeError(f"something is added to the scores before their soft cap ({node.name})")
        terms += [scaled(t, factor) for t in added]
        factor *= by
        node = following
    if len(node.users) > 1:
        raise UnlikeError(f"the scores are read elsewhere too ({node.name})")
    if cap and abs(factor - round(factor, 12)) < 1e-15:
        factor = round(factor, 12)
    if node.target is aten.baddbmm.default:
        if cap:
            raise UnlikeError("something is added to the scores before their soft cap")
        beta, alpha = (float(node.kwargs.get(k, 1.0)) for k in ("beta", "alpha"))  # type: ignore[arg-type]
        if beta:
            terms.append(Term(node.args[0], beta * factor, lead(node)))  # type: ignore[arg-type]
        factor *= alpha
    return factor, terms, node, abs(cap)


def scaled(term: Term, factor: float) -> Term:
    return term if term.fill is not None else Term(term.node, term.factor * factor, term.lead)


def step(node: fx.Node) -> tuple[fx.Node, float, list[Term]]:
    """One operator up: the scores below it, what it multiplies them by, and what it adds."""
    args: Any = node.args
    target = node.target
    if target in SAME and floating(args[0]):
        return args[0], 1.0, []
    if target in RESHAPES and [str(s) for s in shape(args[0])[-2:]] == [str(s) for s in shape(node)[-2:]]:
        return args[0], 1.0, []
    if target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar) and number(args[1]):
        return args[0], float(args[1]) if "mul" in str(target) else 1.0 / float(args[1]), []
    if target is aten.add.Tensor and not node.kwargs and all(isinstance(a, fx.Node) for a in args):
        scores, other = (args[0], args[1]) if whole(args[0], node) else (args[1], args[0])
        if whole(scores, node):
            return scores, 1.0, [Term(other, 1.0, lead(node))]
    if target in (aten.masked_fill.Scalar, aten.where.ScalarOther):
        keeps = target is aten.where.ScalarOther
        scores, mask = (args[1], args[0]) if keeps else (args[0], args[1])
        if whole(scores, node) and hides(args[2], node):
            return scores, 1.0, [Term(mask, 1.0, lead(node), args[2], keeps)]
    if target in (aten.softplus.default, aten.clamp.default):
        raise UnlikeError(f"the scores are clipped ({node.name})")
    raise UnlikeError(f"{node.target} stands between the scores and their softmax ({node.name})")


def whole(node: Any, result: fx.Node) -> bool:
    return isinstance(node, fx.Node) and same_shape(node.meta["val"], result.meta["val"]) and reaches(node)


def hides(value: Any, node: fx.Node) -> bool:
    """Whether adding a number leaves as little of a score as putting it in its place: it is −∞ or lower than any score."""
    return number(value) and (value <= ABSORBS or value <= torch.finfo(node.meta["val"].dtype).min)


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def floating(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.meta["val"].is_floating_point()


def shape(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)


def lead(node: fx.Node) -> tuple[Any, ...]:
    return tuple(shape(node)[:-2])


def dims(node: fx.Node) -> int:
    return node.meta["val"].dim()
