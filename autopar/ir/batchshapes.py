"""What operators that move entries do to the rows of a batch: views, joins, slices, indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.ir.mixing import Call, Mixing, Value, leading

aten = torch.ops.aten


def aligned(call: Call, rows: list[tuple[fx.Node, Value]], dims: int) -> Value:
    """Operands whose last dims match the result's: all rows must come to one dim."""
    places = {(v.dim + dims - len(call.shape(n)), v.outer) for n, v in rows}
    if len(places) != 1:
        raise Mixing("sequences meet along two dims")
    return call.kept(*places.pop())


def dims_of(call: Call, name: str, source: fx.Node) -> list[int]:
    """The dims an argument names, counted from the front; all where it names none."""
    said, rank = call.named(name), len(call.shape(source))
    said = list(range(rank)) if said is None or said == [] else [said] if isinstance(said, int) else said
    return [d % max(rank, 1) for d in said]


# ------------------------------------------------------------------ the same entries in another shape


def reshaped(call: Call) -> Value:
    """Rows stay rows where as many entries come before them, and their dim is still batch-major."""
    totals = [call.value(n) for n in call.node.all_input_nodes if call.value(n).kind in ("total", "average")]
    if totals:
        return totals[0]
    source, value = call.rows(merged=True)[0]
    before, shape = leading(call.shape(source), value.dim) * value.outer, tuple(call.out.shape)
    for dim in reversed(range(len(shape))):
        ahead = leading(shape, dim)
        if before % ahead == 0 and shape[dim] % (before // ahead * call.batch) == 0:
            return call.kept(dim, before // ahead)
    raise Mixing("spreads sequences over other dims")


def permuted(call: Call) -> Value:
    source, value = call.rows(merged=True)[0]
    order = list(range(len(call.shape(source))))
    args = call.node.args[1:]
    if call.node.target in (aten.permute.default,):
        order = [int(d) % len(order) for d in args[0]]  # type: ignore[union-attr]
    elif args:
        a, b = (int(d) % len(order) for d in args[:2])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return call.kept(order.index(value.dim), value.outer)


def expanded(call: Call) -> Value:
    source, value = call.rows(merged=True)[0]
    return call.kept(value.dim + call.out.dim() - len(call.shape(source)), value.outer)


def broadcast(call: Call) -> tuple[Value, ...]:
    """Every operand in the common shape."""
    rank = len(call.out[0].shape)
    call.rows()
    given = [(n, call.value(n)) for n in call.node.args[0]]  # type: ignore[union-attr]
    return tuple(call.kept(v.dim + rank - len(call.shape(n))) if v.kind == "rows" else v for n, v in given)  # type: ignore


def repeated(call: Call) -> Value:
    source, value = call.rows()[0]
    dim = value.dim + call.out.dim() - len(call.shape(source))
    if call.named("repeats")[dim] != 1:
        raise Mixing("puts sequences behind each other")
    return call.kept(dim)


def interleaved(call: Call) -> Value:
    """Every entry several times in a row: rows stay in order, whichever dim it is."""
    rows = call.rows()
    if len(rows) != 1 or call.named("dim") is None or not isinstance(call.named("repeats"), int):
        raise Mixing("repeats sequences in another order")
    return call.kept(rows[0][1].dim)


def sliced(call: Call) -> Value:
    """Part of a dim; all of it where that is the batch's."""
    source, value = call.rows()[0]
    if dims_of(call, "dim", source)[0] == value.dim and call.out.shape[value.dim] != call.shape(source)[value.dim]:
        raise Mixing("takes some sequences apart")
    return call.kept(value.dim)


def pieces(call: Call) -> Value:
    source, value = call.rows()[0]
    if dims_of(call, "dim", source)[0] == value.dim:
        raise Mixing("takes some sequences apart")
    gone = call.node.target is aten.unbind.int and dims_of(call, "dim", source)[0] < value.dim
    return call.kept(value.dim - gone)


def selected(call: Call) -> Value:
    source, value = call.rows()[0]
    dim = dims_of(call, "dim", source)[0]
    if dim == value.dim:
        raise Mixing("takes one sequence apart")
    return call.kept(value.dim - (dim < value.dim))


def joined(call: Call) -> Value:
    """cat and stack along another dim than the batch's."""
    rows = call.rows()
    rank = call.out.dim()
    dim = int(call.named("dim", 0)) % rank
    new = call.node.target is aten.stack.default
    places = {v.dim + (new and dim <= v.dim) for _, v in rows}
    if not new and dim in places:
        raise Mixing("puts sequences behind each other")
    if len(places) != 1:
        raise Mixing("sequences meet along two dims")
    return call.kept(places.pop())


def inserted(call: Call) -> Value:
    """slice_scatter and select_scatter along another dim than the batch's."""
    dim = int(call.named("dim", 0)) % call.out.dim()
    lower = call.node.target is aten.select_scatter.default  # its source lacks the dim
    places = {v.dim + (lower and n is call.node.args[1] and dim <= v.dim) for n, v in call.rows()}
    if len(places) != 1 or dim in places:
        raise Mixing("writes over sequences of the batch")
    return call.kept(places.pop())


def padded(call: Call) -> Value:
    source, value = call.rows()[0]
    said = call.named("pad")
    if len(said) // 2 >= len(call.shape(source)) - value.dim:
        raise Mixing("pads the batch")
    return call.kept(value.dim)


# ------------------------------------------------------------------ by index


def embedding(call: Call) -> Value:
    (source, value), *others = call.rows()
    if others or source is not call.node.args[1]:
        raise Mixing("a table made from the batch")
    return call.kept(value.dim)


def index(call: Call) -> Value:
    """``x[i, j, …]``. Rows of x may be picked by an index that gives every sequence its own; rows of an index pick freely."""
    source, indices = call.node.args[0], list(call.node.args[1])  # type: ignore[arg-type]
    used = [d for d, i in enumerate(indices) if i is not None]
    together = used == list(range(used[0], used[-1] + 1))
    shape = torch.broadcast_shapes(*[call.shape(indices[d]) for d in used])  # type: ignore[arg-type]
    start = used[0] if together else 0
    value, places = call.value(source), set()
    for d in used:
        rows = call.value(indices[d])
        if rows.kind == "rows":
            places.add(start + rows.dim + len(shape) - len(call.shape(indices[d])))  # type: ignore[arg-type]
        elif rows.kind != "free":
            call.rows()
    if value.kind == "rows":
        size = call.shape(source)[value.dim]  # type: ignore[arg-type]
        if value.dim in used:
            places.add(start + own_rows(call, indices[value.dim], shape, size))
        elif together and value.dim > used[-1]:
            places.add(value.dim - len(used) + len(shape))
        else:
            places.add(value.dim if together else len(shape) + value.dim - sum(u < value.dim for u in used))
    if len(places) != 1:
        raise Mixing("an index pairs sequences with others")
    return call.kept(places.pop())


def own_rows(call: Call, which: Any, shape: torch.Size, size: int) -> int:
    """The dim along which an index of the batch's dim (of ``size``) gives every sequence entries of its own."""
    value = call.value(which)
    if value.kind != "free" or value.exact is None:
        raise Mixing("picks sequences by an index that is not known")
    picked = value.exact().expand(shape)
    for dim, length in enumerate(shape):
        if length % call.batch == 0:
            each = torch.arange(length) // (length // call.batch)
            wanted = each.reshape([-1 if d == dim else 1 for d in range(len(shape))])
            if bool((picked // (size // call.batch) == wanted).all()):
                return dim
    raise Mixing("an index pairs sequences with others")


def scattered(call: Call) -> Value:
    """Entries written along a dim that is not the batch's, at the same place of all other dims."""
    rows = call.rows()
    for n, v in rows:
        if v.dim in dims_of(call, "dim", n):
            raise Mixing("along the batch")
    return aligned(call, rows, call.out.dim())
