"""The grammar of an operator's freedom: one string per call, ``"b m k+, n k+, n / -> b m n"``.

Operands left of the arrow (in the order of `autopar.ir.ops.operands`), outputs right of it, separated by commas; each
is its dims, separated by blanks:

    b, seq      a letter (or word): the same letter has the same length everywhere, and may be split
    k+          summed over: in no output; may be split and leaves a partial sum
    d!          may not be split
    1           a dim of length 1 (broadcast); it is never split
    .           a tensor without dims, alone in its place
    x=4         a letter with its length, where the shapes alone do not tell it
    (h d)       a dim that is the product of letters, outermost first. Splitting the first is the plain split of the
                dim, splitting a later one splits each of the pieces made by the letters before it
    [q k v]     a dim that is the concatenation of letters, which can only be split together, each evenly
    c*          the same without names: on one side ``c*`` is the concatenation of every ``c`` on the other, in order

After the dims of an operand or output a mark may follow:

    ~ ~1 ~2     linear: the operands of one tag may be partial sums together, all others whole; then the outputs that
                carry the tag, or a bare ``~``, are partial sums
    /           an addend: added once to a sum. Where a strategy leaves a partial sum, each device adds its share
                (the operand divided by the degree), so that the sum over devices is right
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache, cached_property

_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_]\w*)(?:=(?P<size>\d+))?(?P<mark>[+!*]?)|(?P<one>1)\b"
    r"|(?P<punct>[()\[\],/.])|(?P<tag>~\d*))"
)


_MISPLACED = {
    ")": "')' closes nothing",
    "]": "']' closes nothing",
    ".": "'.' stands alone, for a tensor without dims",
}


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
    tags: tuple[str, ...] = ()

    @property
    def terms(self) -> tuple[Term, ...]:
        return (*self.inputs, *self.outputs)


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
        return tuple(self.term(part) for part in text.split(",")) if text.strip() else ()

    def term(self, text: str) -> Term:
        """One operand or output: its dims, then a mark."""
        tokens = self.tokens(text)
        tag, addend = None, False
        if tokens and (tokens[-1]["tag"] or tokens[-1]["punct"] == "/"):
            last = tokens.pop()
            tag, addend = last["tag"][1:] if last["tag"] else None, not last["tag"]
        if len(tokens) == 1 and tokens[0]["punct"] == ".":
            return Term((), tag, addend)
        if not tokens:
            raise self.fail("an operand is missing")
        dims = []
        while tokens:
            dims.append(self.dim(tokens.pop(0), tokens))
        return Term(tuple(dims), tag, addend)

    def tokens(self, text: str) -> list[re.Match[str]]:
        found, at, text = [], 0, text.rstrip()
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None:
                raise self.fail(f"cannot read {text[at:].strip()!r}")
            found.append(token)
            at = token.end()
        return found

    def dim(self, first: re.Match[str], rest: list[re.Match[str]]) -> Dim:
        """One dim, which begins with ``first``; what it takes of the rest is removed there."""
        if first["one"]:
            return Dim()
        if first["name"]:
            return Dim((self.letter(first),))
        if first["punct"] not in ("(", "["):
            raise self.fail(_MISPLACED.get(first["punct"], "'~' and '/' end an operand; a comma must follow"))
        closing, letters = {"(": ")", "[": "]"}[first["punct"]], []
        while rest and rest[0]["punct"] != closing:
            token = rest.pop(0)
            if not token["name"] or token["mark"] == "*":
                what = (
                    "groups do not nest"
                    if token["punct"] in ("(", "[")
                    else f"{token[0].strip()!r} cannot stand in a group"
                )
                raise self.fail(what)
            letters.append(self.letter(token))
        if not rest:
            raise self.fail(f"'{first['punct']}' is not closed")
        rest.pop(0)
        if not letters:
            raise self.fail("an empty group")
        return Dim(tuple(letters), joined=closing == "]" and len(letters) > 1)

    def letter(self, token: re.Match[str]) -> str:
        self.note(token["name"], token["mark"], token["size"])
        return token["name"]

    def note(self, name: str, mark: str, size: str | None) -> None:
        if mark and self.marks.setdefault(name, mark) != mark:
            raise self.fail(f"'{name}' is marked both '{self.marks[name]}' and '{mark}'")
        if size is not None:
            self.sizes[name] = int(size)

    def join_stars(self, inputs: tuple[Term, ...], outputs: tuple[Term, ...]) -> tuple[tuple[Term, ...], ...]:
        """Write ``c*`` as the concatenation of numbered letters, one for each ``c`` on the other side."""
        stars = [x for x, mark in self.marks.items() if mark == "*"]
        for star in stars:
            count = itertools.count()
            fan = [
                Term(
                    tuple(Dim((f"{star}.{next(count)}",)) if d == Dim((star,)) else d for d in t.dims), t.tag, t.addend
                )
                for t in self.fan(star, inputs, outputs)
            ]
            names = tuple(f"{star}.{i}" for i in range(next(count)))
            whole = Dim(names, joined=len(names) > 1)
            one = tuple(
                Term(tuple(whole if d == Dim((star,)) else d for d in t.dims), t.tag, t.addend)
                for t in self.stem(star, inputs, outputs)
            )
            inputs, outputs = (one, tuple(fan)) if self.starred_left(star) else (tuple(fan), one)
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


@cache
def parse(text: str) -> Signature:
    """The signature a rule's string stands for. Raises `NotationError`."""
    return _Parser(text).signature()
