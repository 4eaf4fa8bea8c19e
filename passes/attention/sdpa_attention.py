"""sdpa_attention: written-out attention becomes torch's fused operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from autopar.ir.causal import causal_masks
from autopar.ir.ops import Attention, view
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from autopar.ir.unread import sweep
from passes.attention.einsum import products_of_einsums
from passes.attention.fused import fuse
from passes.attention.written import SOFTMAX, UnlikeError, read

aten = torch.ops.aten


class SdpaAttention(Pass):
    """``softmax(scale · q @ k.T + mask) @ v`` → `aten.scaled_dot_product_attention`.

    Finds matmul, bmm and baddbmm, scale anywhere, additive and filled-in masks, ALiBi, repeated key heads, dropout. A
    mask that is exactly causal becomes a flag, any other is computed once for all blocks that share it. What the operator cannot
    express (a soft cap, attention weights that are read elsewhere) stays, with a line in the program's history.
    """

    name: ClassVar[str] = "sdpa_attention"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, program: Program) -> None:
        to_sdpa(program, self.name)


Capped = Callable[[str, Any, int], Any]
"""Asked of (graph, mask, heads) of scores with a soft cap, which torch's operator has no words for; raises `UnlikeError`."""


def to_sdpa(program: Program, who: str, capped: Capped | None = None) -> None:
    """Replace every core that the operator can express; say which are left, and why.

    With ``capped``, so is one whose scores have a soft cap, if that raises nothing: the caller finds the cap in the node's
    ``meta["softcap"]`` and must put a kernel there that knows it.
    """
    for _, graph in program.graphs():
        products_of_einsums(graph)
    sweep(program)  # attention weights that nobody reads must not count as read
    for name, graph in list(program.graphs()):
        for node in [n for n in graph.nodes if n.op == "call_function" and n.target in SOFTMAX]:
            replace(program, name, graph, node, who, capped)
        for node in reversed(list(graph.nodes)):
            if node.op == "call_function" and not node.users:
                graph.erase_node(node)
    causal_masks(program)
    sweep(program)


def replace(
    program: Program, name: str, graph: fx.Graph, softmax: fx.Node, who: str, capped: Capped | None = None
) -> None:
    try:
        core = read(softmax)
        if core is not None:
            fuse(program, name, graph, core, capped)
    except UnlikeError as why:
        place = ".".join(filter(None, (name, softmax.meta.get("path", ""))))
        program.history.append(f"{who}: attention in {place} is left as written: {why}")


def each_attention(
    program: Program, replace: Callable[[Program, str, fx.Graph, Attention], None], who: str, stays: str
) -> None:
    """Put something in the place of every attention operator; where ``replace`` raises `UnlikeError`, the history of pass
    ``who`` says what ``stays`` there, and why."""
    for name, graph in program.graphs():
        for node in list(graph.nodes):
            seen = view(node)
            if isinstance(seen, Attention) and node.target is aten.scaled_dot_product_attention.default:
                try:
                    replace(program, name, graph, seen)
                except UnlikeError as why:
                    place = ".".join(filter(None, (name, node.meta.get("path", ""))))
                    program.history.append(f"{who}: attention in {place} {stays}: {why}")
