"""A written-out core made the fused operator: layouts undone, repeated heads unrepeated, terms gathered into one mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.ir.hoist import hoist
from autopar.ir.program import OUTER, Program
from autopar.ir.shapes import infer, same_shape
from passes.attention.written import RESHAPES, Term, UnlikeError, Written, dims, lead, shape

aten = torch.ops.aten
COPIES = {aten.contiguous.default, aten.clone.default}


def fuse(program: Program, name: str, graph: fx.Graph, core: Written, capped: Any = None) -> fx.Node:
    """Put `aten.scaled_dot_product_attention` in a core's place; returns it. ``capped``: see `to_sdpa`. Raises `UnlikeError`."""
    if core.softcap and capped is None:
        raise UnlikeError("the scores are soft-capped")
    with graph.inserting_before(core.mixture):
        make = Maker(graph, core.softmax.meta.get("path", ""))
        query, key, value = operands(make, core)
        mask = gathered(make, core, query)
        if mask is not None and name != OUTER:
            mask = hoist(program, name, mask, "mask")
        if core.softcap:
            if dims(query) != 4 or core.dropout:
                raise UnlikeError("the scores are soft-capped")
            capped(name, mask, int(shape(query)[1]))
        grouped = dims(query) >= 3 and str(shape(query)[-3]) != str(shape(key)[-3])
        options: dict[str, Any] = {"scale": core.scale}
        if grouped:
            options["enable_gqa"] = True
        node = graph.call_function(
            aten.scaled_dot_product_attention.default, (query, key, value, mask, core.dropout, False), options
        )
        node.meta = {"path": make.path, "requires_grad": core.mixture.meta["requires_grad"]}
        if core.softcap:
            node.meta["softcap"] = core.softcap
        q, v = query.meta["val"], value.meta["val"]
        node.meta["val"] = q.new_empty((*q.shape[:-1], v.shape[-1]))  # asked of no kernel: they guard on symbolic sizes
        result = make.shaped(node, shape(core.mixture))
    core.mixture.replace_all_uses_with(result)
    collapse(graph, result)
    return node


class Maker:
    """Makes nodes with values where the graph inserts."""

    def __init__(self, graph: fx.Graph, path: str) -> None:
        self.graph, self.path = graph, path

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {"path": self.path, "requires_grad": False}
        return infer(node)

    def shaped(self, node: fx.Node, wanted: list[Any]) -> fx.Node:
        if [str(s) for s in shape(node)] == [str(s) for s in wanted]:
            return node
        return self(aten.reshape.default, node, list(wanted))


# ------------------------------------------------------------------ queries, keys, values


def operands(make: Maker, core: Written) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and value with the leading dims of the softmax, the key's last dims turned back."""
    wanted = lead(core.softmax)
    query = unflattened(make, core.query, lead(core.product), wanted)
    key = unflattened(make, turned(make, core.key), lead(core.product), wanted)
    value = unflattened(make, core.value, lead(core.mixture), wanted)
    if len({n.meta["val"].dtype for n in (query, key, value)}) > 1:
        raise UnlikeError("queries, keys and values have different dtypes")
    fewer = unrepeated(make, key), unrepeated(make, value)
    if str(lead(fewer[0])) == str(lead(fewer[1])):
        key, value = fewer
    return query, *(broadcast(make, x, query) for x in (key, value))  # type: ignore[return-value]


def turned(make: Maker, node: fx.Node) -> fx.Node:
    """The transpose of the last two dims: the source of a node that is one, else a new one."""
    n = dims(node)
    if node.target is aten.transpose.int and {a % n for a in node.args[1:]} == {n - 1, n - 2}:  # type: ignore[operator]
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.permute.default and list(node.args[1]) == [*range(n - 2), n - 1, n - 2]:  # type: ignore
        return node.args[0]  # type: ignore[return-value]
    return make(aten.transpose.int, node, -2, -1)


def unflattened(make: Maker, node: fx.Node, now: tuple[Any, ...], wanted: tuple[Any, ...]) -> fx.Node:
    """A product's operand with the leading dims that the softmax has."""
    if [str(s) for s in now] == [str(s) for s in wanted]:
        return node
    if [str(s) for s in lead(node)] != [str(s) for s in now]:
        raise UnlikeError("the product broadcasts what is reshaped afterwards")
    if node.target in RESHAPES:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        if [str(s) for s in shape(source)] == [str(s) for s in (*wanted, *shape(node)[-2:])]:
            return source
    return make(aten.reshape.default, node, [*wanted, *shape(node)[-2:]])


def unrepeated(make: Maker, node: fx.Node) -> fx.Node:
    """Keys or values before each of their heads was repeated for its group of queries."""
    inner: Any = node
    while inner.target in COPIES:
        inner = inner.args[0]
    n = dims(node)
    if inner.target is aten.repeat_interleave.self_int and n == 4 and inner.args[2] in (1, -3):
        return inner.args[0]  # type: ignore[return-value]
    wide: Any = inner.args[0] if inner.target in RESHAPES else inner
    while isinstance(wide, fx.Node) and wide.target in COPIES:
        wide = wide.args[0]
    if n != 4 or not isinstance(wide, fx.Node) or wide.target is not aten.expand.default:
        return node
    source: fx.Node = wide.args[0]  # type: ignore[assignment]
    if wide is inner:  # one head for all queries
        same = [str(a) == str(b) for a, b in zip(shape(source), shape(wide), strict=False)]
        return source if dims(source) == 4 and same == [True, False, True, True] else node
    b, heads, _, *rest = shape(wide) if dims(wide) == 5 else (None,) * 5
    if dims(wide) != 5 or [str(s) for s in shape(source)] != [str(s) for s in (b, heads, 1, *rest)]:
        return node
    if [str(s) for s in shape(node)[2:]] != [str(s) for s in rest] or str(shape(node)[0]) != str(b):
        return node
    if source.target is aten.unsqueeze.default and source.args[1] in (2, -3):
        return source.args[0]  # type: ignore[return-value]
    return make(aten.squeeze.dim, source, 2)


def broadcast(make: Maker, node: fx.Node, query: fx.Node) -> fx.Node:
    """Leading dims as the query's; heads may be fewer, in four dims, where they divide the query's."""
    ours, theirs = lead(node), lead(query)
    kept = 3 if dims(query) == 4 and len(ours) == 2 else 2
    free = len(theirs) - (kept - 2)
    if [str(s) for s in ours[:free]] == [str(s) for s in theirs[:free]] and len(ours) == len(theirs):
        return node
    heads = ours[-1:] if kept == 3 else ()
    return make(aten.expand.default, node, [*theirs[:free], *heads, *shape(node)[-2:]])


# ------------------------------------------------------------------ the mask


def gathered(make: Maker, core: Written, query: fx.Node) -> fx.Node | None:
    """One mask, added to the scores, from all terms; a lone term as it stands. None without terms."""
    dtype = query.meta["val"].dtype
    if len(core.terms) == 1 and core.terms[0].fill == float("-inf"):
        term = core.terms[0]
        seen = term.node if term.where_false else make(aten.logical_not.default, term.node)
        return placed(make, seen, term, core)
    total = None
    for term in core.terms:
        added = placed(make, addend(make, term, dtype), term, core)
        while dims(added) < 2:  # the operator's masks have a dim for the queries
            added = make(aten.unsqueeze.default, added, 0)
        total = added if total is None else make(aten.add.Tensor, total, added)
    return total


def addend(make: Maker, term: Term, dtype: torch.dtype) -> fx.Node:
    node = term.node
    if term.fill is not None:
        fill = max(term.fill, torch.finfo(dtype).min) if term.fill != float("-inf") else term.fill
        zero = make(aten.full.default, [], 0.0, dtype=dtype, device=torch.device("meta"), pin_memory=False)
        if term.where_false:
            return make(aten.where.ScalarOther, node, zero, fill)
        return make(aten.masked_fill.Scalar, zero, node, fill)
    value = node.meta["val"]
    if value.dtype != dtype:
        if value.is_floating_point() and torch.finfo(value.dtype).max > torch.finfo(dtype).max:
            node = make(aten.clamp.default, node, torch.finfo(dtype).min)  # the lowest number must not become −∞
        node = make(aten.to.dtype, node, dtype)
    return node if term.factor == 1.0 else make(aten.mul.Tensor, node, term.factor)


def placed(make: Maker, node: fx.Node, term: Term, core: Written) -> fx.Node:
    """A term with the leading dims the softmax has, where it was added under others."""
    wanted = lead(core.softmax)
    if [str(s) for s in term.lead] == [str(s) for s in wanted] or dims(node) <= 2:
        return node
    if [str(s) for s in lead(node)] == [str(s) for s in term.lead]:
        return make(aten.reshape.default, node, [*wanted, *shape(node)[-2:]])
    if all(str(s) == "1" for s in lead(node)):
        return make(aten.reshape.default, node, shape(node)[-2:])
    raise UnlikeError("a bias is broadcast over heads that are reshaped afterwards")


def collapse(graph: fx.Graph, node: fx.Node) -> None:
    """A reshape of a reshape is one, and none where the shape is the first one's again."""
    if node.target is not aten.reshape.default:
        return
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    for user in list(node.users):
        if user.target in RESHAPES and same_shape(user.meta["val"], source.meta["val"]):
            user.replace_all_uses_with(source)
            graph.erase_node(user)
