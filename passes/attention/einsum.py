"""Einsums of attention as matrix products: ``bhqd,bhkd->bhqk`` and its relatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.ir.attention import after, before
from passes.attention.fused import Maker

aten = torch.ops.aten


def products_of_einsums(graph: fx.Graph) -> None:
    """Every einsum before or after a softmax that is one batched product becomes transposes and a matmul."""
    for softmax in [n for n in graph.nodes if n.op == "call_function" and "softmax" in str(n.target)]:
        for node in (before(softmax), after(softmax)):
            if node is not None and node.target is aten.einsum.default:
                product(graph, node)


def product(graph: fx.Graph, node: fx.Node) -> None:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    found = split(equation)
    if found is None or len(operands) != 2:  # type: ignore[arg-type]
        return
    a, b, out, batch, row, column, depth = found
    with graph.inserting_before(node):
        make = Maker(graph, str(node.meta.get("path", "")))
        left = permuted(make, operands[0], a, [*batch, row, depth])  # type: ignore[index]
        right = permuted(make, operands[1], b, [*batch, column, depth])  # type: ignore[index]
        made = make(aten.matmul.default, left, make(aten.transpose.int, right, -2, -1))
        made = permuted(make, made, "".join([*batch, row, column]), list(out))
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def split(equation: str) -> tuple[str, str, str, list[str], str, str, str] | None:
    """The letters of a batched product: both operands, the result, batch, rows, columns, depth; None where it is none."""
    if equation.count(",") != 1 or "->" not in equation or "." in equation:
        return None
    operands, out = equation.split("->")
    a, b = operands.split(",")
    if any(len(set(x)) != len(x) for x in (a, b, out)):
        return None
    batch = [x for x in out if x in a and x in b]
    rows, columns = [x for x in out if x not in b], [x for x in out if x not in a]
    depth = [x for x in a if x in b and x not in out]
    whole = len(rows) == len(columns) == len(depth) == 1 and len(a) == len(b) == len(out) == len(batch) + 2
    return (a, b, out, batch, rows[0], columns[0], depth[0]) if whole else None


def permuted(make: Maker, node: Any, have: str, wanted: list[str]) -> fx.Node:
    if list(have) == wanted:
        return node
    order = [have.index(x) for x in wanted]
    moved = [i for i, x in enumerate(order) if i != x]
    if len(moved) == 2:
        return make(aten.transpose.int, node, *moved)
    return make(aten.permute.default, node, order)
