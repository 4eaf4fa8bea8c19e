"""Ways through one graph: what a value is made of, what is made of it, through operators that leave values as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from autopar.cost.values import is_view, op_name, tensors

PASSING = frozenset(
    ["to", "to_copy", "clone", "contiguous", "reshape", "dropout", "repeat_interleave", "flatten", "type_as"]
)
"""Operators that change no value, or in training only."""
SCALING = frozenset(["mul", "div"])


def before(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All that ``nodes`` depend on, themselves included."""
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def passes(node: fx.Node) -> bool:
    """Whether a call's result is its first operand's values: in another shape, dtype or place."""
    return node.op == "call_function" and (is_view(node) or op_name(node) in PASSING)


def scales(node: fx.Node) -> bool:
    """Whether a call multiplies one tensor by a number."""
    return node.op == "call_function" and op_name(node) in SCALING and len(node.all_input_nodes) == 1


def source(node: fx.Node) -> fx.Node:
    """What a value is, behind what passes it on."""
    while (passes(node) or scales(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def narrowest(node: fx.Node) -> int:
    """Elements of the smallest form in which a value exists on the way that passes it on: before it was repeated."""
    least = elements(node)
    while passes(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        least = min(least, elements(node))
    return least


def elements(node: fx.Node) -> int:
    return tensors(node)[0].numel()


def reaches(node: fx.Node, wanted: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool]) -> bool:
    """Whether a reader of ``node`` is wanted, or one of a reader that lets the value through."""
    seen, stack = set(), [node]
    while stack:
        for user in stack.pop().users:
            if wanted(user):
                return True
            if user not in seen and through(user):
                seen.add(user)
                stack.append(user)
    return False
