"""The notation of an operator's freedom: one string per call, ``"b m k+, n k+, n / -> b m n"``.

Operands left of the arrow (in the order of `autopar.ir.ops.operands`), outputs right of it, separated by commas; each is
its dims, separated by blanks:

    b, seq      a letter (or word): the same letter has the same length everywhere, and may be split
    k+          summed over: in no output; may be split and leaves a partial sum
    d!          may not be split
    1           a dim of length 1 (broadcast); it is never split
    .           a tensor without dims, alone in its place
    x=4         a letter with its length, where the shapes alone do not tell it
    (h d)       a dim that is the product of letters, outermost first. Splitting the first is the plain split of the dim,
                splitting a later one splits each of the pieces made by the letters before it
    [q k v]     a dim that is the concatenation of letters, which can only be split together, each evenly
    c*          the same without names: on one side ``c*`` is the concatenation of every ``c`` on the other side, in order

After the dims of an operand or output a mark may follow:

    ~ ~1 ~2     linear: the operands of one tag may be partial sums together, all others whole; then the outputs that
                carry the tag, or a bare ``~``, are partial sums
    /           an addend: added once to a sum. Where a strategy leaves a partial sum, each device adds its share
                (the operand divided by the degree), so that the sum over devices is right
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from autopar.sharding.placement import P, Placement, R, S
from autopar.sharding.strategy import Strategy

Shape = tuple[int, ...]
Pieces = tuple[int, ...]
Patterns = Mapping[str, "frozenset[Pieces] | set[Pieces]"]

MAX_PIECES = 16  # more pieces (every head's half, say) make plans unreadable and are never the best
MAX_COMBINATIONS = 16  # joint choices of pieces for letters that are split together; more are of no use and cost time
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)(?:=(?P<size>\d+))?(?P<mark>[+!*]?)|(?P<one>1)\b"
                    r"|(?P<punct>[()\[\],/.])|(?P<tag>~\d*))")


class NotationError(ValueError):
    """A rule's string that is no sentence of the grammar, or does not fit the shapes of a call."""


@dataclass(frozen=True)
class Dim:
    """``product`` of letters, outermost first (empty: length 1), or, with ``joined``, their concatenation."""

    letters: tuple[str, ...] = ()
    joined: bool = False


@dataclass(frozen=True)
class Term:
    """One operand or output. ``tag``: None, or what follows ``~``; ``addend``: marked with ``/``."""

    dims: tuple[Dim, ...]
    tag: str | None = None
    addend: bool = False

    @cached_property
    def letters(self) -> frozenset[str]:
        return frozenset(x for d in self.dims for x in d.letters)


@dataclass(frozen=True)
class Signature:
    """A parsed string. ``units``: sets of letters that are split together, with ``+`` units in ``summed``."""

    text: str
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    given: tuple[tuple[str, int], ...]
    units: tuple[tuple[str, ...], ...]
    summed: frozenset[tuple[str, ...]]
    tags: tuple[str, ...] = field(default=())

    @property
    def terms(self) -> tuple[Term, ...]:
        return (*self.inputs, *self.outputs)


# ---------------------------------------------------------------------------------------------------- parsing


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.marks: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def fail(self, why: str) -> NotationError:
        return NotationError(f"{self.text!r}: {why}")

    def signature(self) -> Signature:
        sides = self.text.split("->")
        if len(sides) != 2:
            raise self.fail("exactly one '->' is needed between operands and outputs")
        inputs, outputs = (self.side(s) for s in sides)
        inputs, outputs = self.join_stars(inputs, outputs)
        units = self.units((*inputs, *outputs))
        self.check(inputs, outputs, units)
        free = [u for u in units if not any(self.marks.get(x) == "!" for x in u)]
        summed = frozenset(u for u in free if any(self.marks.get(x) == "+" for x in u))
        tags = tuple(dict.fromkeys(t.tag for t in inputs if t.tag is not None))
        return Signature(self.text, inputs, outputs, tuple(self.sizes.items()), tuple(free), summed, tags)

    def side(self, text: str) -> tuple[Term, ...]:
        if not text.strip():
            return ()
        terms: list[Term] = []
        dims: list[Dim] = []
        open_: str = ""
        group: list[str] = []
        tag: str | None = None
        addend = scalar = False
        at = 0

        def close() -> None:
            nonlocal dims, tag, addend, scalar
            if open_:
                raise self.fail(f"'{open_}' is not closed")
            if scalar == bool(dims):
                raise self.fail("'.' stands alone, for a tensor without dims" if scalar else "an operand is missing")
            terms.append(Term(tuple(dims), tag, addend))
            dims, tag, addend, scalar = [], None, False, False

        text = text.rstrip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise self.fail(f"cannot read {text[at:].strip()!r}")
            at = found.end()
            if (tag is not None or addend) and found["punct"] != ",":
                raise self.fail("'~' and '/' end an operand; a comma must follow")
            if name := found["name"]:
                self.note(name, found["mark"], found["size"])
                if open_:
                    group.append(name)
                else:
                    dims.append(Dim((name,)))
                if open_ and found["mark"] == "*":
                    raise self.fail(f"'{name}*' cannot stand inside a group")
            elif found["one"]:
                if open_:
                    raise self.fail("'1' cannot stand inside a group")
                dims.append(Dim())
            elif found["tag"]:
                tag = found["tag"][1:]
            elif found["punct"] in ("(", "["):
                if open_:
                    raise self.fail("groups do not nest")
                open_ = found["punct"]
            elif found["punct"] in (")", "]"):
                if {"(": ")", "[": "]"}.get(open_) != found["punct"]:
                    raise self.fail(f"'{found['punct']}' closes nothing")
                if not group:
                    raise self.fail("an empty group")
                dims.append(Dim(tuple(group), joined=open_ == "[" and len(group) > 1))
                open_, group = "", []
            elif found["punct"] == "/":
                addend = True
            elif found["punct"] == ".":
                scalar = True
            else:
                close()
        close()
        return tuple(terms)

    def note(self, name: str, mark: str, size: str | None) -> None:
        if mark:
            if self.marks.setdefault(name, mark) != mark:
                raise self.fail(f"'{name}' is marked both '{self.marks[name]}' and '{mark}'")
        if size is not None:
            self.sizes[name] = int(size)

    def join_stars(self, inputs: tuple[Term, ...], outputs: tuple[Term, ...]) -> tuple[tuple[Term, ...], ...]:
        """Write ``c*`` as the concatenation of numbered letters, one for each ``c`` on the other side."""
        stars = [x for x, mark in self.marks.items() if mark == "*"]
        for star in stars:
            count = itertools.count()
            fan = [Term(tuple(Dim((f"{star}.{next(count)}",)) if d == Dim((star,)) else d for d in t.dims), t.tag, t.addend)
                   for t in self.fan(star, inputs, outputs)]
            names = tuple(f"{star}.{i}" for i in range(next(count)))
            whole = Dim(names, joined=len(names) > 1)
            one = tuple(Term(tuple(whole if d == Dim((star,)) else d for d in t.dims), t.tag, t.addend)
                        for t in self.stem(star, inputs, outputs))
            inputs, outputs = (one, tuple(fan)) if len(self.hits(star, inputs)) == 1 and self.starred_left(star) \
                else (tuple(fan), one)
        return inputs, outputs

    def starred_left(self, star: str) -> bool:
        left, right = (re.search(rf"\b{star}\*", s) is not None for s in self.text.split("->"))
        if left == right:
            raise self.fail(f"'{star}*' must stand on one side only")
        return left

    def hits(self, star: str, terms: tuple[Term, ...]) -> list[Term]:
        return [t for t in terms if star in t.letters]

    def stem(self, star: str, inputs: tuple[Term, ...], outputs: tuple[Term, ...]) -> tuple[Term, ...]:
        side = inputs if self.starred_left(star) else outputs
        if len(self.hits(star, side)) != 1:
            raise self.fail(f"'{star}*' must stand in exactly one place on its side")
        return side

    def fan(self, star: str, inputs: tuple[Term, ...], outputs: tuple[Term, ...]) -> tuple[Term, ...]:
        side = outputs if self.starred_left(star) else inputs
        if not self.hits(star, side):
            raise self.fail(f"'{star}*' has no '{star}' on the other side")
        return side

    def units(self, terms: tuple[Term, ...]) -> list[tuple[str, ...]]:
        """Letters that a concatenation ties together; every other letter is alone."""
        leader: dict[str, str] = {}

        def find(x: str) -> str:
            while leader.setdefault(x, x) != x:
                x = leader[x]
            return x

        for term in terms:
            for dim in term.dims:
                for letter in dim.letters:
                    find(letter)
                    if dim.joined:
                        leader[find(letter)] = find(dim.letters[0])
        groups: dict[str, list[str]] = {}
        for letter in leader:
            groups.setdefault(find(letter), []).append(letter)
        return [tuple(g) for g in groups.values()]

    def check(self, inputs: tuple[Term, ...], outputs: tuple[Term, ...], units: list[tuple[str, ...]]) -> None:
        for term in (*inputs, *outputs):
            letters = [x for d in term.dims for x in d.letters]
            twice = {x for x in letters if letters.count(x) > 1}
            if twice:
                raise self.fail(f"'{min(twice)}' stands twice in one operand")
        for unit in units:
            marks = {self.marks.get(x, "") for x in unit} - {"", "*"}
            if "!" in marks:
                continue
            inside = [bool(o.letters & set(unit)) for o in outputs]
            if "+" in marks:
                if any(inside):
                    raise self.fail(f"'{unit[0]}+' is summed over and cannot be in an output")
            elif not all(inside):
                raise self.fail(f"'{unit[0]}' is missing in an output: mark it '+' (summed) or '!' (not split)")
        tags = {t.tag for t in inputs if t.tag is not None}
        for output in outputs:
            if tags and output.tag is None:
                raise self.fail("operands carry '~', so every output must")
            if output.tag and output.tag not in tags:
                raise self.fail(f"output '~{output.tag}' has no operand with that tag")
        if any(o.tag is not None for o in outputs) and not tags:
            raise self.fail("an output carries '~', but no operand does")


@lru_cache(maxsize=None)
def parse(text: str) -> Signature:
    """The signature a rule's string stands for. Raises `NotationError`."""
    return _Parser(text).signature()


# ---------------------------------------------------------------------------------------------------- lengths


def lengths(signature: Signature, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> dict[str, int]:
    """The length of every letter, from the shapes of a call. Raises `NotationError` where they do not fit."""
    shapes = (*inputs, *outputs)
    if len(inputs) != len(signature.inputs) or len(outputs) != len(signature.outputs):
        raise NotationError(f"{signature.text!r}: {len(inputs)} operands and {len(outputs)} outputs in the call")
    known = dict(signature.given)
    open_: list[tuple[Dim, int]] = []
    for term, shape in zip(signature.terms, shapes, strict=True):
        if len(term.dims) != len(shape):
            raise NotationError(f"{signature.text!r}: {len(term.dims)} dims written for a tensor of shape {tuple(shape)}")
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
    """The pieces of ``dim`` when the letters in ``chosen`` are split as given; None if it holds none of them (or two)."""
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
