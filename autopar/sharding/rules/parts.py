"""Parts and wholes: split, chunk, slice, select, unbind, cat, stack, pad: dims that are concatenations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.sharding.call import arguments, frozen, letters, output_shapes, sentence, shape, term, wrap
from autopar.sharding.example import example, tensor
from autopar.sharding.rule import Local, rule

aten = torch.ops.aten


def _local_split(bound: dict[str, Any], local: Local) -> dict[str, Any]:
    dim = wrap(bound["dim"], len(local.inputs[0]))
    sizes = [out[dim] for out in local.outputs]
    if "split_size" in bound and isinstance(bound["split_size"], int):
        return {"split_size": sizes[0]}
    return {"split_size" if "split_size" in bound else "split_sizes": sizes}


@rule(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    localize=_local_split,
    examples=[
        example(aten.split.Tensor, tensor(4, 18), 6, -1),
        example(aten.split.Tensor, tensor(4, 30), 12, 1),
        example(aten.split_with_sizes.default, tensor(24, 5), [12, 6, 6]),
        example(aten.split_with_sizes.default, tensor(4, 10), [3, 7], 1),
    ],
)
def split(node: fx.Node) -> str:
    names = letters(len(shape(node.args[0])))
    dim = wrap(arguments(node)["dim"], len(names))
    parts = ", ".join([term(names, "~")] * len(output_shapes(node)))
    names[dim] = f"{names[dim]}*"
    return f"{term(names, '~')} -> {parts}"


@rule(
    aten.chunk.default,
    aten.unsafe_chunk.default,
    examples=[
        example(aten.chunk.default, tensor(4, 12), 2, -1),
        example(aten.chunk.default, tensor(22, 3), 4),
        example(aten.chunk.default, tensor(4, 12), 2, -1, patterns={"a1.0": {(2, 4)}, "a1.1": {(2, 4)}}),
    ],
)
def chunk(node: fx.Node) -> str:
    """Unequal chunks stay right: when every chunk divides, the local chunk size is the whole one's share."""
    return split(node)


@rule(
    aten.unbind.int,
    examples=[example(aten.unbind.int, tensor(4, 3, 6), 1)],
)
def unbind(node: fx.Node) -> str:
    names = letters(len(shape(node.args[0])))
    dim = wrap(arguments(node)["dim"], len(names))
    part = term([x for i, x in enumerate(names) if i != dim], "~")
    return f"{term(frozen(names, [dim]), '~')} -> {', '.join([part] * len(output_shapes(node)))}"


@rule(
    aten.select.int,
    examples=[example(aten.select.int, tensor(4, 3, 6), 1, -1), example(aten.select.int, tensor(4), 0, 1)],
)
def select(node: fx.Node) -> str:
    names = letters(len(shape(node.args[0])))
    dim = wrap(arguments(node)["dim"], len(names))
    part = term([x for i, x in enumerate(names) if i != dim], "~")
    return f"{term(frozen(names, [dim]), '~')} -> {part}"


def _bounds(node: fx.Node) -> tuple[int, int, int]:
    """(dim, start, length) of a slice or narrow."""
    bound, old = arguments(node), shape(node.args[0])
    dim = wrap(bound["dim"], len(old))
    start = bound["start"] or 0
    start = max(0, start + old[dim]) if start < 0 else min(start, old[dim])
    return dim, start, shape(node)[dim]


def _local_slice(bound: dict[str, Any], local: Local) -> dict[str, Any]:
    dim, start, size = _bounds(local.node)
    if local.outputs[0][dim] == size:
        return {}
    start, size = start // local.degree, local.outputs[0][dim]
    if "length" in bound:
        return {"start": start, "length": size}
    return {"start": start, "end": start + size}


@rule(
    aten.slice.Tensor,
    aten.narrow.default,
    localize=_local_slice,
    examples=[
        example(aten.slice.Tensor, tensor(4, 18), 1, 0, 6),
        example(aten.slice.Tensor, tensor(4, 18), 1, 6, 12, patterns={"x": {(6,)}}),
        example(aten.slice.Tensor, tensor(4, 18), 1, -6, 9223372036854775807, patterns={"x": {(6, 6)}}),
        example(aten.slice.Tensor, tensor(4, 18), 0, 0, 9223372036854775807),
        example(aten.slice.Tensor, tensor(4, 18), 1, 0, 9223372036854775807, 2),
        example(aten.slice.Tensor, tensor(4, 18), 1, 5, 7),
        example(aten.narrow.default, tensor(12, 4), 0, 6, 6),
    ],
)
def slice_(node: fx.Node) -> str:
    """A slice is one part of a concatenation of (what is before it, itself, what is after it)."""
    old = shape(node.args[0])
    dim, start, size = _bounds(node)
    names = letters(len(old))
    if size == old[dim]:
        return f"{term(names, '~')} -> {term(names, '~')}"
    whole, part = list(names), list(names)
    if arguments(node).get("step", 1) != 1 or size == 0:
        whole[dim], part[dim] = "x!", "y!"
    else:
        around = [(f"x={start}", start), ("y", size), (f"z={old[dim] - start - size}", old[dim] - start - size)]
        whole[dim] = f"[{' '.join(x for x, n in around if n)}]"
        part[dim] = "y"
    return f"{term(whole, '~')} -> {term(part, '~')}"


@rule(
    aten.cat.default,
    aten.concat.default,
    examples=[
        example(aten.cat.default, [tensor(4, 6), tensor(4, 12)], -1),
        example(aten.cat.default, [tensor(6, 3), tensor(6, 3), tensor(12, 3)]),
    ],
)
def cat(node: fx.Node) -> str | None:
    """None where an empty one-dimensional tensor stands in (torch allows it, of old)."""
    shapes = [shape(a) for a in node.args[0]]  # type: ignore[union-attr]
    names = letters(len(shapes[0]))
    if any(len(s) != len(names) for s in shapes):
        return None
    part = term(names, "~")
    dim = wrap(arguments(node)["dim"], len(names))
    names[dim] = f"{names[dim]}*"
    return f"{', '.join([part] * len(shapes))} -> {term(names, '~')}"


@rule(aten.stack.default, examples=[example(aten.stack.default, [tensor(4, 6), tensor(4, 6)], -1)])
def stack(node: fx.Node) -> str:
    parts = node.args[0]
    names = letters(len(shape(parts[0])))  # type: ignore[index]
    made = list(names)
    made.insert(wrap(arguments(node)["dim"], len(names) + 1), "n!")
    return f"{', '.join([term(names, '~')] * len(parts))} -> {term(made, '~')}"  # type: ignore[arg-type]


@rule(
    aten.pad.default,
    aten.constant_pad_nd.default,
    examples=[
        example(aten.pad.default, tensor(4, 6), [1, 2]),
        example(aten.pad.default, tensor(4, 6), [0, 0, 1, 0], "constant", 1.5),
        example(aten.constant_pad_nd.default, tensor(4, 6), [0, -1]),
    ],
)
def pad(node: fx.Node) -> str:
    """Padded dims may not be split; linear where zeros are filled in (or copies of what is there)."""
    bound, rank = arguments(node), len(shape(node))
    padded = {rank - 1 - i // 2 for i, n in enumerate(bound["pad"]) if n}
    mark = "~" if not bound["value"] else ""
    old = [f"p{i}!" if i in padded else f"a{i}" for i in range(rank)]
    new = [f"q{i}!" if i in padded else f"a{i}" for i in range(rank)]
    return f"{term(old, mark)} -> {term(new, mark)}"


@rule(
    aten.flip.default,
    aten.roll.default,
    aten.diff.default,
    aten.tril.default,
    aten.triu.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
    examples=[
        example(aten.flip.default, tensor(4, 6), [1]),
        example(aten.reflection_pad1d.default, tensor(2, 6, 5), [1, 2]),
        example(aten.roll.default, tensor(4, 6), [2], [-1]),
        example(aten.diff.default, tensor(4, 6)),
        example(aten.diff.default, tensor(4, 6), 1, 0, tensor(2, 6)),
        example(aten.tril.default, tensor(3, 4, 6)),
        example(aten.triu.default, tensor(3, 4, 6), 1),
    ],
)
def along_dims(node: fx.Node) -> str | None:
    """Linear operators that mix positions along some dims, which stay whole."""
    bound, rank = arguments(node), len(shape(node))
    if bound.get("dims") == []:
        return None
    last = [-1] if "1d" in str(node.target) else [-2, -1]
    mixed = {wrap(d, rank) for d in bound.get("dims", [bound["dim"]] if "dim" in bound else last)}

    def side(prefix: str) -> str:
        return term((f"{prefix}{i}!" if i in mixed else f"a{i}" for i in range(rank)), "~")

    inputs = {"self": side("x"), "prepend": side("y"), "append": side("z")}
    return sentence(node, side("o"), **inputs)
