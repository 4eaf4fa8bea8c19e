"""Which pieces a dim of a graph's values may be cut in: what splits, cats and regrouping views make of neighbours.

A fused projection (q, k, v in one matrix) is a plain linear to its own rule. The `split` behind it knows better: its
input is a concatenation, so only a placement that cuts every piece evenly lets the parts be split. This file carries
such pieces along letters, from operator to operator, until nothing new is found.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from autopar.ir.ops import operands
from autopar.sharding.call import input_shapes, output_shapes
from autopar.sharding.notation import MAX_PIECES, Dim, Pieces, Signature, choices, dim_pieces, lengths, parse
from autopar.sharding.rule import sentence_of

Slot = tuple[fx.Node, int, int]  # a node, which of its outputs, which dim
MAX_PATTERNS = 8  # per dim: real models have one or two; the bound keeps odd graphs from costing time

GraphPatterns = dict[fx.Node, dict[str, set[Pieces]]]


@dataclass(eq=False)
class _Item:
    """The letters of one call that are split together, and where they stand."""

    node: fx.Node
    unit: tuple[str, ...]
    known: Mapping[str, int]
    places: list[tuple[Slot, Dim]]
    letters: dict[str, set[Pieces]] = field(default_factory=dict)


def collect_patterns(graph: fx.Graph) -> GraphPatterns:
    """For every node the pieces, beside the plain split, in which letters of its sentence may be cut.

    Nodes without a sentence (placeholders, ``getitem``) file the dims of their output under ``a0``, ``a1``, ….
    """
    items = [item for node in graph.nodes for item in _items(node)]
    readers: dict[Slot, list[_Item]] = {}
    for item in items:
        for slot, _ in item.places:
            readers.setdefault(slot, []).append(item)
    found: dict[Slot, set[Pieces]] = {}
    queue = deque(i for i in items if any(_makes_pieces(d, i) for _, d in i.places))
    waiting = set(queue)
    while queue:
        item = queue.popleft()
        waiting.discard(item)
        for slot in _spread(item, found):
            queue.extend(i for i in readers[slot] if i not in waiting)
            waiting.update(readers[slot])
    return _by_node(graph, items, found)


def _source(node: fx.Node) -> tuple[fx.Node, int]:
    """The node and output a tensor really is: ``getitem`` names an output of its producer."""
    if node.op == "call_function" and node.target is operator.getitem:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return node, 0


def _items(node: fx.Node) -> list[_Item]:
    text = sentence_of(node)
    if text is None:
        return []
    signature = parse(text)
    known = lengths(signature, input_shapes(node), output_shapes(node))
    values = [*map(_source, operands(node)), *((node, i) for i in range(len(signature.outputs)))]
    return [_Item(node, unit, known, _places(signature, unit, values)) for unit in signature.units]


def _places(signature: Signature, unit: tuple[str, ...], values: list[tuple[fx.Node, int]]) -> list[tuple[Slot, Dim]]:
    return [
        ((*value, i), dim)
        for value, term in zip(values, signature.terms, strict=True)
        for i, dim in enumerate(term.dims)
        if any(x in unit for x in dim.letters)
    ]


def _makes_pieces(dim: Dim, item: _Item) -> bool:
    return dim.joined or any(x in item.unit for x in dim.letters[1:])


def _spread(item: _Item, found: dict[Slot, set[Pieces]]) -> list[Slot]:
    """Learn from every place of the letters, tell every place; the dims that learned something."""
    for slot, dim in item.places:
        for pieces in found.get(slot, ()):
            for letter, own in _letter_pieces(dim, item, pieces).items():
                if len(own) > 1:
                    item.letters.setdefault(letter, set()).add(own)
    told: list[Slot] = []
    for chosen in choices(item.unit, item.known, item.letters):
        for slot, dim in item.places:
            pieces = dim_pieces(dim, chosen, item.known)
            if pieces and _learn(found.setdefault(slot, set()), pieces, dim.joined) and slot not in told:
                told.append(slot)
    return told


def _letter_pieces(dim: Dim, item: _Item, pieces: Pieces) -> dict[str, Pieces]:
    """What pieces of a dim mean for the letters of this unit in it: the inverse of `dim_pieces`; empty if nothing."""
    known = item.known
    if dim.joined:
        return _divide(dim.letters, known, pieces)
    made: dict[str, Pieces] = {}
    for i, letter in enumerate(dim.letters):
        before = math.prod(known[x] for x in dim.letters[:i])
        after = math.prod(known[x] for x in dim.letters[i + 1 :])
        block = pieces[: len(pieces) // before] if before else ()
        if letter in item.unit and block * before == pieces and all(p % after == 0 for p in block):
            made[letter] = tuple(p // after for p in block)
    return made


def _divide(letters: tuple[str, ...], known: Mapping[str, int], pieces: Pieces) -> dict[str, Pieces]:
    """Hand the pieces of a concatenation to its letters; empty if one would straddle two letters."""
    made, rest = {}, list(pieces)
    for letter in letters:
        own: list[int] = []
        while rest and sum(own) < known[letter]:
            own.append(rest.pop(0))
        if sum(own) != known[letter]:
            return {}
        made[letter] = tuple(own)
    return made


def _learn(held: set[Pieces], pieces: Pieces, joined: bool) -> bool:
    """Add pieces to what a dim may be cut in, and what they and a concatenation have in common; whether any was new."""
    before = len(held)
    candidates = [pieces, *(_refine(pieces, other) for other in sorted(held) if joined)]
    for candidate in candidates:
        if 1 < len(candidate) <= MAX_PIECES and len(held) < MAX_PATTERNS and math.gcd(*candidate) > 1:
            held.add(candidate)  # (pieces without a common divisor are never split evenly)
    return len(held) > before


def _refine(a: Pieces, b: Pieces) -> Pieces:
    """Pieces whose ends are all the ends of either."""
    ends = sorted({*itertools.accumulate(a), *itertools.accumulate(b)})
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def _by_node(graph: fx.Graph, items: list[_Item], found: dict[Slot, set[Pieces]]) -> GraphPatterns:
    made: GraphPatterns = {}
    for item in items:
        if item.letters:
            made.setdefault(item.node, {}).update(item.letters)
    slots: dict[tuple[fx.Node, int], dict[str, set[Pieces]]] = {}
    for (node, out, dim), pieces in found.items():
        if pieces:
            slots.setdefault((node, out), {})[f"a{dim}"] = pieces
    for node in graph.nodes:
        if sentence_of(node) is None and (mine := slots.get(_source(node))):
            made[node] = mine
    return made
