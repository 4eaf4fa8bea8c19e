"""Which mask of the batch a tensor is: documents packed in one row, a prefix; found by evaluating it on rows of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.ir.causal import ancestors, computed, numbers
from autopar.ir.program import Program
from autopar.ir.specialize import meaning
from passes.attention.masks import TRIALS, Mask, band, hidden
from passes.attention.written import UnlikeError

DRAWS = 6
"""Random rows at each size on which a mask must be what it is taken for."""


@dataclass(frozen=True)
class Rows:
    """A mask by sizes alone, and the batch's entries that narrow (documents) or widen (prefix) it."""

    mask: Mask
    documents: fx.Node | None
    prefix: fx.Node | None


def of_batch(program: Program, mask: fx.Node) -> Rows | None:
    """What a mask of the outer graph is made of; None where that is something else."""
    order = ancestors(mask)
    given = [n for n in order if n.op == "placeholder"]
    inputs = [n for n in given if n.meta["kind"] == "input"]
    held = {n: program.tensors[n.meta["name"]] for n in given if n.meta["kind"] == "constant"}
    documents, prefixes = ([n for n in inputs if whole(n) and n.meta["val"].dim() == d] for d in (2, 1))
    known = len(inputs) + len(held) == len(given) and len(inputs) == len(documents) + len(prefixes)
    if not inputs or not known or any(n.op == "call_module" for n in order) or any(t.is_meta for t in held.values()):
        return None
    if len(documents) > 1 or len(prefixes) > 1 or any(numbers(n) for n in order) or not program.sizes:
        return None
    row = Row(program, order, held, next(iter(documents), None), next(iter(prefixes), None))
    try:
        return row.recognized()
    except (UnlikeError, RuntimeError, IndexError, ValueError):  # it does not even work on rows such as ours
        return None


def whole(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool


@dataclass(frozen=True)
class Row:
    """A mask and the entries of the batch it reads, to be tried."""

    program: Program
    order: list[fx.Node]
    held: dict[fx.Node, torch.Tensor]
    documents: fx.Node | None
    prefix: fx.Node | None

    def recognized(self) -> Rows | None:
        plain = {band(self.seen(trial, self.zeros(trial))) for trial in TRIALS}
        if len(plain) > 1:
            return None
        mask = plain.pop()
        draw = torch.Generator().manual_seed(0)
        for trial in TRIALS:
            for _ in range(DRAWS):
                rows = self.drawn(trial, draw)
                if not torch.equal(self.seen(trial, rows), self.meant(mask, trial, rows)):
                    return None
        return Rows(mask, self.documents, self.prefix if mask.causal else None)

    def zeros(self, trial: dict[str, int]) -> dict[fx.Node, torch.Tensor]:
        found = {}
        if self.documents is not None:
            found[self.documents] = torch.zeros(trial["batch"], trial["sequence"], dtype=torch.int64)
        if self.prefix is not None:
            found[self.prefix] = torch.zeros(trial["batch"], dtype=torch.int64)
        return found

    def drawn(self, trial: dict[str, int], draw: torch.Generator) -> dict[fx.Node, torch.Tensor]:
        high = {self.documents: 4, self.prefix: trial["sequence"] + 1}
        return {n: torch.randint(high[n], z.shape, generator=draw) for n, z in self.zeros(trial).items()}

    def seen(self, trial: dict[str, int], rows: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        """Where the mask lets something through, (batch, length, keys); `UnlikeError` where it also adds something."""
        names = {s: meaning(self.program, s) for s in self.program.sizes}
        sizes = {s: trial[what] for s, what in names.items()}
        given = {n: t.to(n.meta["val"].dtype) for n, t in rows.items()}
        value: Any = computed(self.order, sizes, {}, {**self.held, **given})[self.order[-1]]
        off = hidden(value)
        if value.dtype != torch.bool and value.masked_fill(off, 0.0).any():
            raise UnlikeError("its mask adds something")
        while off.dim() < 4:
            off = off.unsqueeze(0)
        if not (off == off[:, :1]).all():
            raise UnlikeError("its mask differs from head to head")
        return ~off[:, 0].expand(trial["batch"], *off.shape[-2:])

    def meant(self, mask: Mask, trial: dict[str, int], rows: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        places = torch.arange(trial["sequence"])
        far = places[:, None] + mask.offset - places
        near = far >= 0 if mask.causal else torch.ones_like(far, dtype=torch.bool)
        near = near & (far < mask.window) if mask.window else near
        near = near.expand(trial["batch"], *far.shape)
        if self.prefix is not None:
            near = near | (places < rows[self.prefix][:, None])[:, None, :]
        if self.documents is not None:
            numbers_ = rows[self.documents]
            near = near & (numbers_[:, :, None] == numbers_[:, None, :])
        return near
