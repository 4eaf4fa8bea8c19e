"""The notation at work: from a sentence (`autopar.sharding.grammar` explains it) and shapes to strategies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from autopar.sharding.grammar import Dim, NotationError, Signature, Term, parse
from autopar.sharding.placement import P, Placement, R, S
from autopar.sharding.strategy import Strategy

__all__ = [
    "Dim",
    "NotationError",
    "Signature",
    "Term",
    "addends",
    "choices",
    "dim_pieces",
    "expand",
    "lengths",
    "parse",
]

Shape = tuple[int, ...]
Pieces = tuple[int, ...]
Patterns = Mapping[str, "frozenset[Pieces] | set[Pieces]"]

MAX_PIECES = 16  # more pieces (every head's half, say) make plans unreadable and are never the best
MAX_COMBINATIONS = 16  # joint choices of pieces for letters that are split together; more are of no use and cost time


def lengths(signature: Signature, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> dict[str, int]:
    """The length of every letter, from the shapes of a call. Raises `NotationError` where they do not fit."""
    shapes = (*inputs, *outputs)
    if len(inputs) != len(signature.inputs) or len(outputs) != len(signature.outputs):
        raise NotationError(f"{signature.text!r}: {len(inputs)} operands and {len(outputs)} outputs in the call")
    known = dict(signature.given)
    open_: list[tuple[Dim, int]] = []
    for term, shape in zip(signature.terms, shapes, strict=True):
        if len(term.dims) != len(shape):
            raise NotationError(
                f"{signature.text!r}: {len(term.dims)} dims written for a tensor of shape {tuple(shape)}"
            )
        for dim, size in zip(term.dims, shape, strict=True):
            if len(dim.letters) == 1:
                if known.setdefault(dim.letters[0], size) != size:
                    raise NotationError(f"{signature.text!r}: '{dim.letters[0]}' is {known[dim.letters[0]]} and {size}")
            elif dim.letters:
                open_.append((dim, size))
            elif size != 1:
                raise NotationError(f"{signature.text!r}: '1' stands for a dim of length {size}")
    while open_:
        rest = [(d, n) for d, n in open_ if not _settle(signature, d, n, known)]
        if len(rest) == len(open_):
            raise NotationError(f"{signature.text!r}: the lengths of {rest[0][0].letters} are not determined")
        open_ = rest
    return known


def _settle(signature: Signature, dim: Dim, size: int, known: dict[str, int]) -> bool:
    """Find the one unknown letter of a group, or check the group; False while several are unknown."""
    unknown = [x for x in dim.letters if x not in known]
    if len(unknown) > 1:
        return False
    have = [known[x] for x in dim.letters if x in known]
    total = sum(have) if dim.joined else math.prod(have)
    if unknown:
        left = size - total if dim.joined else size // total
        known[unknown[0]] = left
        total = total + left if dim.joined else total * left
    if total != size:
        raise NotationError(f"{signature.text!r}: {dim.letters} makes {total}, the dim has {size}")
    return True


# ---------------------------------------------------------------------------------------------------- placements


def dim_pieces(dim: Dim, chosen: Mapping[str, Pieces], known: Mapping[str, int]) -> Pieces | None:
    """The pieces of ``dim`` when the letters in ``chosen`` are split as given; None if it holds none or two."""
    if dim.joined:
        if not all(x in chosen for x in dim.letters):
            return None
        return tuple(p for x in dim.letters for p in chosen[x] if known[x])
    inside = [i for i, x in enumerate(dim.letters) if x in chosen]
    if len(inside) != 1:
        return None
    i = inside[0]
    before = math.prod(known[x] for x in dim.letters[:i])
    after = math.prod(known[x] for x in dim.letters[i + 1 :])
    return tuple(p * after for p in chosen[dim.letters[i]]) * before


def choices(unit: tuple[str, ...], known: Mapping[str, int], patterns: Patterns) -> Iterator[dict[str, Pieces]]:
    """How the letters of a unit may be cut in pieces: plainly first, then by every pattern."""
    options = [[(known[x],), *sorted(p for p in patterns.get(x, ()) if sum(p) == known[x])] for x in unit]
    for combination in itertools.islice(itertools.product(*options), MAX_COMBINATIONS):
        yield dict(zip(unit, combination, strict=True))


def _place(term: Term, chosen: Mapping[str, Pieces], known: Mapping[str, int]) -> Placement | None:
    """Where an operand or output is when the chosen letters are split; None if that cannot be placed."""
    touched = [(i, d) for i, d in enumerate(term.dims) if any(x in chosen for x in d.letters)]
    if not touched:
        return R
    if len(touched) > 1:
        return None
    pieces = dim_pieces(touched[0][1], chosen, known)
    return None if pieces is None or len(pieces) > MAX_PIECES else S(touched[0][0], pieces)


def expand(
    text: str, inputs: Sequence[Shape], outputs: Sequence[Shape], degree: int, patterns: Patterns | None = None
) -> list[Strategy]:
    """Every strategy of a call on ``degree`` devices: all-replicated, one for each letter that divides (and for each of
    its ``patterns``: letter → tuples of piece sizes), one for each ``+``, one for each tag of linear operands."""
    signature = parse(text)
    known = lengths(signature, inputs, outputs)
    found = {Strategy((R,) * len(inputs), (R,) * len(outputs)): None}
    for unit in signature.units:
        if any(known[x] % degree for x in unit) or not any(known[x] for x in unit):
            continue
        for chosen in choices(unit, known, patterns or {}):
            if any(piece % degree for pieces in chosen.values() for piece in pieces):
                continue
            placed = [_place(t, chosen, known) for t in signature.inputs]
            results = [P if unit in signature.summed else _place(t, chosen, known) for t in signature.outputs]
            if None not in placed and None not in results:
                found[Strategy(tuple(p for p in placed if p), tuple(p for p in results if p))] = None
    for tag in signature.tags:
        if all(o.tag in (tag, "") for o in signature.outputs):
            placed = [P if t.tag == tag else R for t in signature.inputs]
            found[Strategy(tuple(placed), (P,) * len(outputs))] = None
    return list(found)


def addends(text: str, strategy: Strategy) -> tuple[int, ...]:
    """Positions of the operands that a device must divide by the degree under this strategy (marked ``/``)."""
    if strategy.special or P not in strategy.outputs:
        return ()
    return tuple(i for i, t in enumerate(parse(text).inputs) if t.addend)
