"""The edges of a plan in words: what an operand goes through before a node reads it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from autopar.plan.plan import Choice, Read
from autopar.spec.quantity import show_seconds


@dataclass(frozen=True)
class Edge:
    """Operand number ``position`` of a node: made as ``made``, wanted as ``wanted``, both placements as text."""

    read: Read
    position: int
    made: str
    wanted: str

    @property
    def moves(self) -> bool:
        return self.made != self.wanted or self.read.forward != "none" or self.read.backward != "none"

    @property
    def key(self) -> Hashable:
        """Readers with the same key share one move."""
        return (self.read.node, self.wanted, self.read.backward)

    def how(self) -> str:
        """``all-gather, back reduce-scatter · 1.62 ms``; empty where only placements are known."""
        forward, backward = (name.replace("_", "-") for name in (self.read.forward, self.read.backward))
        words = [forward] if forward != "none" else []
        if backward != "none":
            words.append(f"back {backward}" if words else f"gradient {backward}")
        seconds = self.read.forward_seconds + self.read.backward_seconds
        return ", ".join(words) + (f" · {show_seconds(seconds)}" if seconds else "")


def edges(choice: Choice | None, reads: tuple[Read, ...], choices: Mapping[str, Choice]) -> list[Edge]:
    """The edges into a node whose two placements are known. ``choices``: those of the node's graph."""
    if choice is None or len(choice.inputs) != len(reads):
        return []
    found = []
    for i, (read, wanted) in enumerate(zip(reads, choice.inputs, strict=True)):
        source = choices.get(read.node)
        if source is not None and source.outputs:
            found.append(Edge(read, i, source.outputs[0], wanted))
    return found
