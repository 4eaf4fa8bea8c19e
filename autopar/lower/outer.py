"""Runs of equal block calls in a stage, so that emitted code loops over them."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

Carry = dict[int, int]
"""Argument position → output index of the call before that feeds it."""


@dataclass(frozen=True)
class Run:
    """Consecutive calls of one block: ``carried`` arguments come from the call before, the others are the same."""

    calls: tuple[fx.Node, ...]
    carried: tuple[tuple[int, int], ...]

    @property
    def inner(self) -> set[fx.Node]:
        """What the loop hides: all calls but the last, with their getitems."""
        return {n for c in self.calls[:-1] for n in (c, *c.users)}


def outputs(call: fx.Node) -> dict[int, fx.Node]:
    return {int(u.args[1]): u for u in call.users if u.target is operator.getitem}  # type: ignore[arg-type]


def runs(nodes: list[fx.Node], owned: dict[str, set[int]]) -> list[Run]:
    """Maximal runs of at least two calls among localized nodes. ``owned``: arguments that live inside the block."""
    order = [n for n in nodes if n.op == "call_module" or (n.op == "call_function" and not of_call(n))]
    found: list[Run] = []
    current: list[fx.Node] = []
    carry: Carry | None = None

    def close() -> None:
        nonlocal carry
        if len(current) > 1 and carry is not None:
            found.append(Run(tuple(current), tuple(sorted(carry.items()))))
        current.clear()
        carry = None

    for node in order:
        if node.op != "call_module":
            close()
            continue
        step = link(current[-1], node, owned[str(node.target)]) if current else None
        if current and (step is None or (carry is not None and step != carry) or not hidden(current[-1], node)):
            close()
            step = None
        if step is not None:
            carry = step
        current.append(node)
    close()
    return found


def of_call(node: fx.Node) -> bool:
    return node.target is operator.getitem and node.args[0].op == "call_module"  # type: ignore[union-attr]


def link(before: fx.Node, after: fx.Node, owned: set[int]) -> Carry | None:
    """Which arguments of ``after`` are outputs of ``before``, if all others are its arguments, too."""
    if before.target != after.target:
        return None
    carry: Carry = {}
    for i, (a, b) in enumerate(zip(before.args, after.args, strict=True)):
        if i in owned or a is b:
            continue
        if not (isinstance(b, fx.Node) and b.target is operator.getitem and b.args[0] is before):
            return None
        carry[i] = int(b.args[1])  # type: ignore[arg-type]
    return carry


def hidden(before: fx.Node, after: fx.Node) -> bool:
    """Whether nobody but ``after`` reads what ``before`` returns."""
    return all(set(u.users) <= {after} for u in before.users)
