"""Views: operators that regroup, reorder, repeat or drop dims and leave the values as they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from autopar.sharding.call import Shape, arguments, letters, shape, term, wrap
from autopar.sharding.example import Spec, example, tensor
from autopar.sharding.rule import Local, rule

aten = torch.ops.aten


def local_size(bound: dict[str, Any], local: Local) -> dict[str, Any]:
    """Size arguments become the local output's shape; -1 (leave or infer) stays."""
    name = "size" if "size" in bound else "shape"
    lead = len(local.outputs[0]) - len(bound[name])
    return {name: [-1 if n == -1 else m for n, m in zip(bound[name], local.outputs[0][lead:], strict=True)]}


def _blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dims (by position, those of length 1 left out) of equal product."""
    left, right = [i for i, n in enumerate(old) if n != 1], [i for i, n in enumerate(new) if n != 1]
    blocks = []
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (have := math.prod(old[i] for i in a)) != (want := math.prod(new[i] for i in b)):
            if have < want:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        blocks.append((a, b))
    return blocks


def _cuts(sizes: list[int]) -> list[int]:
    return [math.prod(sizes[: i + 1]) for i in range(len(sizes))]


def regroup(old: Shape, new: Shape) -> tuple[list[str], list[str]]:
    """The dims of a view's input and output in common letters; ``1`` for dims of length 1.

    Where the dims of a block do not nest, only what its outermost dims have in common can be split.
    """
    before, after = ["1"] * len(old), ["1"] * len(new)
    count = 0
    for a, b in _blocks(old, new):
        inner, outer = _cuts([old[i] for i in a]), _cuts([new[i] for i in b])
        cuts = sorted({*inner, *outer})
        if any(n % m for m, n in zip(cuts, cuts[1:], strict=False)):
            common = math.gcd(old[a[0]], new[b[0]])
            for names, dims, sizes, side in ((before, a, old, "p"), (after, b, new, "q")):
                for at, i in enumerate(dims):
                    rest = f"{side}{count}_{at}!"
                    own = sizes[i] // common if at == 0 else sizes[i]
                    names[i] = f"(a{count}={common} {side}{count}_{at}={own}!)" if at == 0 else rest
            count += 1
            continue
        for names, dims, ends in ((before, a, inner), (after, b, outer)):
            start = 0
            for i, end in zip(dims, ends, strict=True):
                group = [f"a{count + at}" for at, cut in enumerate(cuts) if start < cut <= end]
                names[i] = group[0] if len(group) == 1 else f"({' '.join(group)})"
                start = end
        count += len(cuts)
    return before, after


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    localize=local_size,
    examples=[
        example(aten.view.default, tensor(2, 4, 18), [2, 4, 6, 3]),
        example(aten.view.default, tensor(2, 4, 36), [2, 4, 3, 6, 2]),
        example(aten.reshape.default, tensor(2, 6, 4, 3), [12, -1]),
        example(aten.reshape.default, tensor(4, 6), [8, 3]),
        example(aten.reshape.default, tensor(12, 6), [18, 4]),
        example(aten.view.default, tensor(1, 6, 1, 4), [6, 1, 2, 2]),
        example(aten.view.default, tensor(6, 2, 4), [12, 4], patterns={"a0": {(2, 4)}}),
    ],
)
def view(node: fx.Node) -> str | None:
    old, new = shape(node.args[0]), shape(node)
    if 0 in old:
        return None
    before, after = regroup(old, new)
    return f"{term(before, '~')} -> {term(after, '~')}"


@rule(
    aten.flatten.using_ints,
    aten.ravel.default,
    examples=[
        example(aten.ravel.default, tensor(4, 6)),
        example(aten.flatten.using_ints, tensor(2, 4, 6, 3), 1, 2),
        example(aten.flatten.using_ints, tensor(2, 6)),
    ],
)
def flatten(node: fx.Node) -> str | None:
    return view(node)


def _local_unflatten(bound: dict[str, Any], local: Local) -> dict[str, Any]:
    dim = wrap(bound["dim"], len(local.inputs[0]))
    return {"sizes": list(local.outputs[0][dim : dim + len(bound["sizes"])])}


@rule(
    aten.unflatten.int,
    localize=_local_unflatten,
    examples=[
        example(aten.unflatten.int, tensor(2, 36, 5), 1, [3, 6, -1]),
        example(aten.unflatten.int, tensor(2, 12), -1, [6, 2]),
    ],
)
def unflatten(node: fx.Node) -> str | None:
    return view(node)


@rule(
    aten.expand.default,
    aten.broadcast_to.default,
    localize=local_size,
    examples=[
        example(aten.expand.default, tensor(2, 1, 4), [2, 6, -1]),
        example(aten.expand.default, tensor(4, 1), [6, 4, 3]),
        example(aten.broadcast_to.default, tensor(2, 1, 6), [2, 4, 6]),
    ],
)
def expand(node: fx.Node) -> str:
    old, new = shape(node.args[0]), shape(node)
    names = letters(len(new))
    tail = names[len(new) - len(old) :]
    kept = ["1" if n == 1 else x for n, x in zip(old, tail, strict=True)]
    made = ["1" if n == 1 else x for n, x in zip(new, names, strict=True)]
    return f"{term(kept, '~')} -> {term(made, '~')}"


@rule(
    aten.expand_as.default,
    examples=[example(aten.expand_as.default, tensor(2, 1, 4), tensor(2, 6, 4))],
)
def expand_as(node: fx.Node) -> str:
    """The other operand gives its shape alone, but its local shape must be that of the local output."""
    first, out = expand(node).split(" -> ")
    return f"{first}, {out.removesuffix(' ~')} -> {out}"


def _local_repeats(bound: dict[str, Any], local: Local) -> dict[str, Any]:
    old, new = local.inputs[0], local.outputs[0]
    padded = (*(1,) * (len(new) - len(old)), *old)
    return {"repeats": [n // m for n, m in zip(new, padded, strict=True)]}


@rule(
    aten.view_as.default,
    aten.reshape_as.default,
    examples=[example(aten.view_as.default, tensor(4, 18), tensor(4, 6, 3))],
)
def view_as(node: fx.Node) -> str:
    """The other operand gives its shape alone, but its local shape must be that of the local output."""
    before, after = regroup(shape(node.args[0]), shape(node))
    return f"{term(before, '~')}, {term(after)} -> {term(after, '~')}"


@rule(
    aten.view_as_complex.default,
    aten.view_as_real.default,
    examples=[
        example(aten.view_as_complex.default, tensor(4, 6, 2)),
        example(aten.view_as_real.default, Spec((4, 6), torch.complex128)),
    ],
)
def pairs(node: fx.Node) -> str:
    """Real and imaginary part are a last dim of length 2."""
    names = letters(min(len(shape(node)), len(shape(node.args[0]))))
    real = [*names, "z!"]
    old, new = (real, names) if len(shape(node.args[0])) > len(names) else (names, real)
    return f"{term(old, '~')} -> {term(new, '~')}"


@rule(
    aten.repeat.default,
    localize=_local_repeats,
    examples=[
        example(aten.repeat.default, tensor(4, 6), [6, 1, 2]),
        example(aten.repeat.default, tensor(1, 6), [4, 3]),
    ],
)
def repeat(node: fx.Node) -> str:
    """A repeated dim is the product of the repeats and the dim; one of length 1 is the repeats alone."""
    old, repeats = shape(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    names, kept, made = letters(len(repeats)), [], []
    lead = len(repeats) - len(old)
    for i, (name, times) in enumerate(zip(names, repeats, strict=True)):
        size = old[i - lead] if i >= lead else 1
        if i >= lead:
            kept.append("1" if size == 1 else name)
        if size == 1:
            made.append("1" if times == 1 else f"r{i}")
        else:
            made.append(name if times == 1 else f"(r{i} {name})")
    return f"{term(kept, '~')} -> {term(made, '~')}"


def _local_interleave(bound: dict[str, Any], local: Local) -> dict[str, Any]:
    dim = wrap(bound["dim"], len(local.inputs[0]))
    total = local.outputs[0][dim]
    size = {} if bound["output_size"] is None else {"output_size": total}
    return {"repeats": total // local.inputs[0][dim], **size}


@rule(
    aten.repeat_interleave.self_int,
    localize=_local_interleave,
    examples=[
        example(aten.repeat_interleave.self_int, tensor(2, 6, 4), 6, 1),
        example(aten.repeat_interleave.self_int, tensor(2, 1, 4), 6, 1, output_size=6),
    ],
)
def repeat_interleave(node: fx.Node) -> str | None:
    old, dim = shape(node.args[0]), arguments(node)["dim"]
    if dim is None:
        return None
    kept, dim = letters(len(old)), wrap(dim, len(old))
    made = list(kept)
    made[dim] = f"({kept[dim]} r)" if old[dim] != 1 else "r"
    kept[dim] = kept[dim] if old[dim] != 1 else "1"
    return f"{term(kept, '~')} -> {term(made, '~')}"


@rule(
    aten.unsqueeze.default,
    examples=[example(aten.unsqueeze.default, tensor(4, 6), -1), example(aten.unsqueeze.default, tensor(4, 6), 0)],
)
def unsqueeze(node: fx.Node) -> str:
    names = letters(len(shape(node.args[0])))
    made = list(names)
    made.insert(wrap(node.args[1], len(names) + 1), "1")  # type: ignore[arg-type]
    return f"{term(names, '~')} -> {term(made, '~')}"


@rule(
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    examples=[
        example(aten.squeeze.dim, tensor(4, 1, 6), 1),
        example(aten.squeeze.dim, tensor(2, 3, 6), 0),
        example(aten.squeeze.dims, tensor(4, 1, 6, 1), [1, -1]),
        example(aten.squeeze.default, tensor(2, 1, 6)),
    ],
)
def squeeze(node: fx.Node) -> str:
    """A dim that is asked for but stays must not be split: a shard of length 1 would vanish."""
    old = shape(node.args[0])
    asked = arguments(node).get("dim", range(len(old)))
    dims = {wrap(d, len(old)) for d in ([asked] if isinstance(asked, int) else asked)}
    names = ["1" if n == 1 else f"a{i}!" if i in dims else f"a{i}" for i, n in enumerate(old)]
    made = [x for i, x in enumerate(names) if not (x == "1" and i in dims)]
    return f"{term(names, '~')} -> {term(made, '~')}"


@rule(
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.numpy_T.default,
    aten.movedim.int,
    aten.moveaxis.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.mT.default,
    aten.adjoint.default,
    examples=[
        example(aten.transpose.int, tensor(2, 4, 6), 1, -1),
        example(aten.permute.default, tensor(2, 4, 6), [2, 0, 1]),
        example(aten.t.default, tensor(4, 6)),
        example(aten.numpy_T.default, tensor(4, 6)),
        example(aten.movedim.int, tensor(2, 4, 6), 0, 2),
    ],
)
def reorder(node: fx.Node) -> str:
    """Whatever it is called: numbers in the place of the letters go through the operator itself."""
    names = letters(len(shape(node.args[0])))
    tracer = torch.empty(tuple(range(1, len(names) + 1)), device="meta")
    made = [names[n - 1] for n in node.target(tracer, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]
    return f"{term(names, '~')} -> {term(made, '~')}"
