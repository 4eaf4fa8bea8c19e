"""What a program calls where its sequences are split over cp: moves of the sequence, and attention over all of it.

A program for one device along cp holds local lengths; these operators stand where the devices talk. They have no process
group: in one process they compute what a device gets where all devices hold the same, which is enough for shapes and for
proving rules along tp. Emitted code calls `autopar.lower.sequences`.

``pieces``: sizes of the parts that a split dim is a concatenation of (sequences laid end to end), empty for one.
``zigzag``: device r holds the chunks r and 2n - 1 - r of 2n, so that causal attention is the same work for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("context", "DEF")
AXIS = "context"  # the namespace of the operators
RING, ALL_TO_ALL = "ring", "all_to_all"
KINDS = (RING, ALL_TO_ALL)


def part(x: Tensor, dim: int, degree: int, pieces: list[int], zigzag: bool) -> Tensor:
    """Whole → this device's part; no communication, the gradient is zero elsewhere."""
    own = [p.narrow(dim, 0, p.shape[dim] // degree) for p in x.split(pieces or [x.shape[dim]], dim)]
    return torch.cat(own, dim)


def gather(x: Tensor, dim: int, degree: int, pieces: list[int], zigzag: bool) -> Tensor:
    """Parts → whole; the gradient is whole on every device."""
    own = x.split([p // degree for p in pieces] or [x.shape[dim]], dim)
    return torch.cat([p for p in own for _ in range(degree)], dim)


def all_reduce(x: Tensor, degree: int) -> Tensor:
    return x * degree


def copy_in(x: Tensor, degree: int) -> Tensor:
    return x.clone()


def exchange(
    x: Tensor, source: int, target: int, degree: int, pieces: list[int], before: list[int], zigzag: bool
) -> Tensor:
    """Split along ``source`` (in pieces ``before``) → split along ``target`` (in ``pieces``)."""
    return part(gather(x, source, degree, before, zigzag), target, degree, pieces, zigzag)


MOVED = "(Tensor x, int dim, int degree, int[] pieces, bool zigzag) -> Tensor"
OPERATORS: dict[str, tuple[str, Any]] = {
    "own_part": (MOVED, part),
    "scatter_parts": (MOVED, part),  # its gradient is gathered
    "gather_parts": (MOVED, gather),
    "gather_parts_sum": (MOVED, gather),  # its gradient comes in summands: reduce-scatter
    "reduce_scatter_parts": (MOVED, part),
    "all_reduce": ("(Tensor x, int degree) -> Tensor", all_reduce),
    "all_reduce_both": ("(Tensor x, int degree) -> Tensor", all_reduce),
    "copy_in": ("(Tensor x, int degree) -> Tensor", copy_in),
    "share_gradient": (
        "(Tensor x, int degree) -> Tensor",
        copy_in,
    ),  # each device gives its share of a gradient all have whole
    "exchange_parts": (
        "(Tensor x, int source, int target, int degree, int[] pieces, int[] before, bool zigzag) -> Tensor",
        exchange,
    ),
}
for _name, (_schema, _function) in OPERATORS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, _function, "CompositeImplicitAutograd")


def operator(name: str) -> Any:
    """The overload of one of `OPERATORS`."""
    return getattr(torch.ops.context, name).default


class ContextAttention:
    """The target of attention over sequences that are split over cp.

    Its node has query (batch, heads, length, width), key and value (batch, kv_heads, length, width), local lengths; by
    name ``mask`` (tensor that broadcasts to (batch, heads, length, all keys)), and the options of
    `autopar.kernels.flash_attention`. ``kind``: ``ring`` (keys and values go round), or ``all_to_all`` (heads are split
    while attention runs, and sequences are whole).
    """

    def __init__(self, kind: str, degree: int, zigzag: bool) -> None:
        assert kind in KINDS, kind
        self.kind, self.degree, self.zigzag = kind, degree, zigzag
        self.__name__ = f"{kind}_attention"
        self.__module__ = __name__

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """What a device gets where all hold the same: for shapes, and for proving rules along tp."""
        mask = options.get("mask")
        if query.is_meta:
            batch, heads, length, _ = query.shape
            return query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        keys, values = (torch.cat([x] * self.degree, -2) for x in (key, value))
        group = query.shape[1] // key.shape[1]
        scores = query @ keys.repeat_interleave(group, 1).mT * (options.get("scale") or query.shape[-1] ** -0.5)
        if options.get("slopes") is not None:
            scores = scores + options["slopes"].view(-1, 1, 1)
        mask = mask if mask is None or mask.shape[-2] == 1 else mask.narrow(-2, 0, query.shape[-2])
        scores = (
            scores if mask is None else scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -1e9)
        )
        return scores.softmax(-1) @ values.repeat_interleave(group, 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContextAttention) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((self.kind, self.degree, self.zigzag))

    def __repr__(self) -> str:
        return f"{AXIS}.{self.__name__}"
