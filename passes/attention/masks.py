"""Which mask a tensor is: causal, shifted, a window, ALiBi; found by evaluating it, not by how it is made.

A mask that is made of nothing but sizes is computed at two small batches and compared with what the kernel's options mean. A
window may be wider than these: numbers that masks compare positions with are made small for the trial, twice, and the window
must follow them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autopar.ir.causal import ancestors, computed, numbers
from autopar.ir.program import Program
from autopar.ir.specialize import meaning
from passes.attention.written import ABSORBS, UnlikeError

aten = torch.ops.aten
TRIALS = ({"batch": 2, "sequence": 9}, {"batch": 3, "sequence": 13})
SMALL = (4, 5)
"""What a number wider than the trials is replaced by."""


@dataclass(frozen=True)
class Mask:
    """The kernel's options that make the same mask. ``slopes``: the node that holds them, up to ``factor``."""

    causal: bool
    offset: int = 0
    window: int = 0
    slopes: fx.Node | None = None
    factor: float = 1.0


def recognized(program: Program, mask: fx.Node, heads: int) -> Mask:
    """The mask of a node of the outer graph, whatever the batch and length. Raises `UnlikeError` that says why it is none."""
    order = ancestors(mask)
    held = {n: program.tensors[n.meta["name"]] for n in order if n.op == "placeholder" and n.meta["kind"] == "constant"}
    if any(n.op == "call_module" or (n.op == "placeholder" and n not in held) for n in order):
        raise UnlikeError("its mask depends on the batch or on values of the model")
    if any(t.is_meta or type(t) is not torch.Tensor for t in held.values()):
        raise UnlikeError("its mask is made of constants whose values are not at hand")
    wide = sorted({abs(c) for n in order for c in numbers(n)})
    plain = tried(program, order, heads, {}, held)
    if not wide or all(tried(program, order, heads, {c: s}, held) == plain for c in wide for s in SMALL):
        return plain
    if len(wide) == 1 and not plain.window:
        first, second = (tried(program, order, heads, {wide[0]: s}, held) for s in SMALL)
        if second.window == first.window + 1 and replace(first, window=0) == plain:
            return replace(plain, window=wide[0] + first.window - SMALL[0])
    raise UnlikeError(f"its mask changes at {' and '.join(map(str, wide))} in a way that is no window")


def tried(
    program: Program, order: list[fx.Node], heads: int, small: dict[int, int], held: dict[fx.Node, torch.Tensor]
) -> Mask:
    """The mask at both trials, which must agree. ``small``: numbers replaced."""
    names = {s: meaning(program, s) for s in program.sizes}
    values = [{s: trial[what] for s, what in names.items()} for trial in TRIALS] if names else [{}]
    found = []
    for sizes in values:
        env = computed(order, sizes, small, held)
        found.append((band(env[order[-1]]), env))
    if any(f[0] != found[0][0] for f in found):
        raise UnlikeError("its mask is none that a kernel makes")
    mask = found[0][0]
    biases = [slopes_of(env[order[-1]], heads) for _, env in found]
    if any(b is None for b in biases):
        return mask
    return with_slopes(mask, order, [env for _, env in found], biases[0])  # type: ignore[arg-type]


# ------------------------------------------------------------------ reading one


def hidden(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask lets nothing through."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise UnlikeError(f"its mask holds {mask.dtype}")
    return mask <= max(torch.finfo(mask.dtype).min / 2, ABSORBS)  # lowest plus a bias is not lowest, and hides as well


def band(mask: torch.Tensor) -> Mask:
    """A pattern that is the same for all heads and sequences, as (causal, offset, window)."""
    seen = ~hidden(mask)
    while seen.dim() > 2:
        if not (seen == seen[:1]).all():
            raise UnlikeError("its mask differs from sequence to sequence or from head to head")
        seen = seen[0]
    if seen.all():
        return Mask(causal=False)
    if seen.shape[0] == 1:
        raise UnlikeError("its mask hides keys from all queries alike")
    rows, columns = seen.shape
    far = torch.arange(rows)[:, None] - torch.arange(columns)
    offset = int(seen[0].nonzero().max()) if seen[0].any() else -1
    first = seen[-1].nonzero()
    low = int(first.min()) if len(first) else 0
    window = rows - 1 + offset - low + 1 if low else 0
    made = far + offset >= 0
    made = made & (far + offset < window) if window else made
    if not torch.equal(made, seen):
        raise UnlikeError("its mask is none that a kernel makes")
    return Mask(causal=True, offset=offset, window=window)


def slopes_of(mask: torch.Tensor, heads: int) -> torch.Tensor | None:
    """One slope for each head by which scores grow along the keys; None where a mask adds nothing."""
    if mask.dtype == torch.bool:
        return None
    off, added = hidden(mask), mask.double()
    while added.dim() > 3:
        if not (added == added[:1]).all():
            raise UnlikeError("its bias differs from sequence to sequence")
        added, off = added[0], off[0]
    added, off = (x if x.dim() == 3 else x.unsqueeze(0) for x in (added, off))
    if not added.masked_fill(off, 0.0).any():
        return None
    if added.shape[-1] < 2 or off[:, -1, :2].any():
        raise UnlikeError("its bias is no ALiBi")
    slopes = added[:, -1, 1] - added[:, -1, 0]
    line = slopes[:, None, None] * torch.arange(added.shape[-1])
    rest = (added - line).masked_fill(off, -torch.inf)
    apart = (rest - rest.amax(-1, keepdim=True)).masked_fill(off, 0.0)
    if float(apart.abs().max()) > 1e-6 * max(float(line.abs().max()), 1.0):
        raise UnlikeError("its bias is no ALiBi")
    return slopes.expand(heads)


def with_slopes(mask: Mask, order: list[fx.Node], envs: list[dict[fx.Node, Any]], slopes: torch.Tensor) -> Mask:
    """The node among a mask's ancestors that holds the slopes, up to a factor."""
    for node in order:
        held = [e[node] for e in envs]
        if not all(isinstance(h, torch.Tensor) and h.is_floating_point() and h.numel() == len(slopes) for h in held):
            continue
        flat = [h.double().flatten() for h in held]
        if any(not torch.equal(f, flat[0]) for f in flat) or not float(flat[0][0]):
            continue
        factor = float(slopes[0] / flat[0][0])
        if torch.allclose(flat[0] * factor, slopes, rtol=1e-6, atol=0):
            exact = round(factor) if abs(factor - round(factor)) < 1e-6 and round(factor) else factor
            return replace(mask, slopes=node, factor=float(exact))
    raise UnlikeError("the slopes of its ALiBi stand nowhere by themselves")
