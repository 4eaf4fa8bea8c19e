"""flex_attention: attention by torch's flex_attention, its masks and biases in words where they are known, else as a tensor."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from autopar import kernels  # noqa: F401 (registers the operator)
from autopar.ir.hoist import placeholder
from autopar.ir.ops import Attention
from autopar.ir.program import OUTER, Program
from autopar.ir.rewrite import Numerics, Pass
from autopar.ir.unread import sweep
from passes.attention.flash_attention import described, sources, words
from passes.attention.fused import Maker
from passes.attention.masks import Mask
from passes.attention.rows import Rows, of_batch
from passes.attention.sdpa_attention import each_attention, to_sdpa
from passes.attention.written import UnlikeError

aten = torch.ops.aten


class FlexAttention(Pass):
    """Attention, in every spelling that `flash_attention` finds, becomes `autopar.kernels.flex_attention`: torch's
    flex_attention on GPUs (`torch.nn.attention.flex_attention`), torch's fused operator on CPUs, for which flex_attention has
    no backward.

    Causal masks, windows, ALiBi and soft caps become words of a score_mod and a block mask, and so do packed documents and
    prefixes of the batch; any other mask without a gradient (padding) is read as the tensor it is. Attention with
    dropout, with a learned bias, or of other dims stays torch's operator, with a line in the history.
    """

    name: ClassVar[str] = "flex_attention"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, program: Program) -> None:
        to_sdpa(program, self.name, capped=lambda _name, mask, _heads: readable(mask))
        each_attention(program, replace, self.name, "stays torch's operator")
        sweep(program)


def readable(mask: fx.Node | None) -> None:
    """Raise `UnlikeError` for a mask that wants a gradient, which a score_mod on CPUs and blocks of a mask do not give."""
    if mask is not None and mask.meta["requires_grad"]:
        raise UnlikeError("its bias is learned")


def replace(program: Program, name: str, graph: fx.Graph, seen: Attention) -> None:
    """Put the operator in the place of torch's. Raises `UnlikeError`."""
    query, key = seen.query.meta["val"], seen.key.meta["val"]
    if query.dim() != 4 or str(query.shape[0]) != str(key.shape[0]):
        raise UnlikeError(f"its queries have {query.dim()} dims, not (batch, heads, length, width), or another batch")
    if seen.dropout:
        raise UnlikeError("its weights are dropped out")
    readable(seen.mask)
    given = options(program, name, graph, seen)
    with graph.inserting_before(seen.node):
        make = Maker(graph, str(seen.node.meta.get("path", "")))
        if (mask := given.get("mask")) is not None:
            given["mask"] = four_dims(make, mask)
        new = graph.call_function(torch.ops.autopar.flex_attention.default, (seen.query, seen.key, seen.value), given)
    new.meta = {k: v for k, v in seen.node.meta.items() if k != "softcap"}
    seen.node.replace_all_uses_with(new)
    graph.erase_node(seen.node)


def options(program: Program, name: str, graph: fx.Graph, seen: Attention) -> dict[str, Any]:
    """What the operator is told of a call: a mask by sizes alone, one of documents and prefixes, or the mask itself."""
    if seen.mask is None:
        return words(program, name, graph, seen, Mask(causal=seen.causal))
    try:
        mask = described(program, name, seen.mask, int(seen.query.meta["val"].shape[1]))
        return words(program, name, graph, seen, mask)
    except UnlikeError:
        pass
    rows = rows_of(program, name, seen)
    if rows is None:
        return {**words(program, name, graph, seen, Mask(causal=False)), "mask": seen.mask}
    given = words(program, name, graph, seen, rows.mask)
    for called in ("documents", "prefix"):
        if (node := getattr(rows, called)) is not None:
            given[called] = here(program, name, graph, node, called)
    return given


def rows_of(program: Program, name: str, seen: Attention) -> Rows | None:
    """What the mask of all instances is made of, where that is one and queries are as many as keys."""
    if str(seen.query.meta["val"].shape[2]) != str(seen.key.meta["val"].shape[2]):
        return None
    try:
        given = dict.fromkeys(sources(program, name, seen.mask))  # type: ignore[arg-type]
    except UnlikeError:
        return None
    found = {of_batch(program, m) for m in given}
    return found.pop() if len(found) == 1 else None


def here(program: Program, name: str, graph: fx.Graph, node: fx.Node, called: str) -> fx.Node:
    """An entry of the batch inside a graph: an argument of a block."""
    if name == OUTER:
        return node
    for call in program.calls():
        if call.target == name:
            call.args = (*call.args, node)
    return placeholder(graph, node, called)


def four_dims(make: Maker, mask: fx.Node) -> fx.Node:
    for _ in range(4 - mask.meta["val"].dim()):
        mask = make(aten.unsqueeze.default, mask, 0)
    return mask
