"""Attention masks that are the causal mask: recognized by evaluation, replaced by ``is_causal=True``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from autopar.ir.program import Program
from autopar.ir.specialize import evaluate, meaning

SDPA = torch.ops.aten.scaled_dot_product_attention.default
SIZES = ((2, 7), (3, 12))
"""Two (batch, sequence) at which a mask made of nothing but sizes must be the lower triangle to be taken for causal."""


def causal_masks(program: Program) -> None:
    """Rewrite every attention whose mask depends on sizes alone and is exactly causal.

    Exporting makes transformers build a dense mask that its eager run leaves out; no kernel can use it, and it takes
    (sequence)² bytes. A mask that depends on the batch, or has another form, stays.
    """
    known: dict[fx.Node, bool] = {}

    def is_causal(node: fx.Node) -> bool:
        if node not in known:
            known[node] = causal(program, node)
        return known[node]

    for name, graph in program.graphs():
        calls = [c for c in program.calls() if c.target == name]
        for node in graph.nodes:
            if node.target is not SDPA:
                continue
            mask = argument(node, 3, "attn_mask")
            if not isinstance(mask, fx.Node) or argument(node, 5, "is_causal"):
                continue
            sources = [mask]
            if mask.op == "placeholder" and calls:
                index = [n for n in graph.nodes if n.op == "placeholder"].index(mask)
                sources = [c.args[index] for c in calls]  # type: ignore[misc]
            elif calls and not free_of_placeholders(mask):
                continue
            if all(is_causal(s) for s in sources) and square(node):  # type: ignore
                set_argument(node, 3, "attn_mask", None)
                set_argument(node, 5, "is_causal", True)


def square(node: fx.Node) -> bool:
    q, k = node.args[0].meta["val"], node.args[1].meta["val"]  # type: ignore[union-attr]
    return str(q.shape[-2]) == str(k.shape[-2])


def free_of_placeholders(node: fx.Node) -> bool:
    return all(n.op != "placeholder" for n in ancestors(node))


def argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def set_argument(node: fx.Node, index: int, name: str, value: Any) -> None:
    if len(node.args) > index:
        node.args = (*node.args[:index], value, *node.args[index + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}


def ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and all it depends on, operands first."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(n: fx.Node) -> None:
        if n not in seen:
            seen.add(n)
            for source in n.all_input_nodes:
                visit(source)
            order.append(n)

    visit(node)
    return order


def causal(program: Program, mask: fx.Node) -> bool:
    """Whether ``mask`` depends on sizes only and is, at two of them, True exactly on and below the diagonal; also where a
    number it compares positions with is smaller than they are."""
    nodes = ancestors(mask)
    if any(n.op in ("placeholder", "call_module") for n in nodes):
        return False
    if not program.sizes:
        rows, columns = mask.meta["val"].shape[-2:]
        return rows == columns <= 2048 and is_triangle(computed(nodes, {})[mask])
    names = {s: meaning(program, s) for s in program.sizes}
    wide = {abs(c): 4 for n in nodes for c in numbers(n)}
    for batch, sequence in SIZES:
        values = {s: batch if what == "batch" else sequence for s, what in names.items()}
        if not is_triangle(computed(nodes, values)[mask]):
            return False
        if wide and not is_triangle(computed(nodes, values, wide)[mask]):
            return False  # a window wider than these sizes
    return True


def computed(
    nodes: list[fx.Node],
    values: dict[str, int],
    small: dict[int, int] | None = None,
    held: dict[fx.Node, torch.Tensor] | None = None,
) -> dict[fx.Node, Any]:
    """The value of every node at some sizes. ``small``: numbers that positions are compared with, replaced; ``held``: values
    of placeholders."""
    env: dict[fx.Node, Any] = dict(held or {})
    small = small or {}
    for node in (n for n in nodes if n not in env):
        wide = set(numbers(node)) if small else set()

        def given(a: Any, wide: set[int] = wide) -> Any:
            if isinstance(a, fx.Node):
                return env[a]
            if type(a) is int and a in wide and abs(a) in small:
                return small[abs(a)] if a > 0 else -small[abs(a)]
            return evaluate(a, values)

        args, kwargs = map_aggregate((node.args, node.kwargs), given)
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return env


COMPARING = frozenset(["add", "sub", "rsub", "le", "lt", "ge", "gt", "tril", "triu"])
"""Operators whose numbers say how far positions lie apart."""


def numbers(node: fx.Node) -> list[int]:
    """Numbers that a node compares positions with and that no mask at `SIZES` could show: a window as wide."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    if node.target._schema.name.split("::")[-1].strip("_") not in COMPARING:
        return []
    return [a for a in node.args[1:] if type(a) is int and SIZES[0][1] <= abs(a) < 2**31]


def is_triangle(mask: torch.Tensor) -> bool:
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    lower = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        return bool((mask == lower).all())
    if not mask.is_floating_point():
        return False
    never = mask <= torch.finfo(mask.dtype).min
    return bool(((mask == 0) == lower).all() and (never == ~lower).all())
