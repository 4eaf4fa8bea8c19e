"""Tokens that stand behind others nobody computes: their positions count those, and attention may look at them."""

from __future__ import annotations

import torch
from torch import fx

from autopar.ir.lengthen import END, created, padded, plus, renewed, sequence_dims, symbols_of
from autopar.ir.ops import Attention, view
from autopar.ir.program import OUTER, Program
from autopar.ir.unread import sweep
from passes.attention.flash_attention import to_torch
from passes.attention.fused import unrepeated
from passes.attention.sdpa_attention import to_sdpa
from passes.peft.parts import Maker, pass_in

aten = torch.ops.aten
SEEN = "attention_mask"


def stand_behind(program: Program, extra: int, who: str) -> None:
    """What positions are made of grows by ``extra`` and is cut where tokens read it: they are the last ones.

    A mask keeps the columns of the ``extra`` keys. Attention that was causal by a flag gets a mask with them in view.
    Only masks and positions that come from lengths, buffers, parameters and the input ``attention_mask`` can follow.
    """
    names = symbols_of(program, "sequence")
    if names:
        tokens = token_nodes(program)
        widen_input(program, extra, who)
        for name, graph in program.graphs():
            for node in list(graph.nodes):
                if node.op != "output" and node not in tokens and not (name == OUTER and node.op == "placeholder"):
                    renewed(node, plus(names, extra))
        for _, graph in program.graphs():
            cut(program, graph, tokens, names, extra)
    unflag(program, extra)


def fuse_attention(program: Program, who: str) -> None:
    """Every attention becomes the fused operator, its keys and values no longer repeated for the queries they serve."""
    to_torch(program, who)
    to_sdpa(program, who)
    for _, graph in program.graphs():
        for node in list(graph.nodes):
            seen = view(node)
            if not isinstance(seen, Attention) or seen.grouped:
                continue
            with graph.inserting_before(node):
                make = Maker(graph, str(node.meta.get("path", "")))
                fewer = [unrepeated(make, side) for side in (seen.key, seen.value)]  # type: ignore[arg-type]
            heads = [str(n.meta["val"].shape[:-2]) for n in fewer]
            if fewer != [seen.key, seen.value] and heads[0] == heads[1]:
                node.args = (node.args[0], *fewer, *node.args[3:])
                node.kwargs = {**node.kwargs, "enable_gqa": True}
    sweep(program)


# ------------------------------------------------------------------ which nodes are positions


def token_nodes(program: Program) -> set[fx.Node]:
    """Every node whose value follows from the tokens: from an input other than the attention mask, or a block's result."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.meta["kind"] == "input" and node.meta["name"] != SEEN:
                found.add(node)
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    for name, graph in program.blocks.items():
        calls = [c for c in program.calls() if c.target == name]
        places = [n for n in graph.nodes if n.op == "placeholder"]
        for i, place in enumerate(places):
            if any(c.args[i] in found for c in calls):
                found.add(place)
        for node in graph.nodes:
            if node.op == "call_function" and any(n in found for n in node.all_input_nodes):
                found.add(node)
    return found


def widen_input(program: Program, extra: int, who: str) -> None:
    place = next((n for n in program.graph.nodes if n.op == "placeholder" and n.meta["name"] == SEEN), None)
    if place is None or not place.users:
        return
    readers = list(place.users)
    longer = padded(program, place, extra, who)
    for reader in readers:
        reader.replace_input_with(place, longer)


# ------------------------------------------------------------------ where tokens read them


def cut(program: Program, graph: fx.Graph, tokens: set[fx.Node], names: set[str], extra: int) -> None:
    """Between a position and a token that reads it, only the last positions pass; all columns of a mask do."""
    made: dict[tuple[fx.Node, bool], fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "call_function" and n in tokens]:
        seen = view(node)
        mask = seen.mask if isinstance(seen, Attention) else None
        for source in node.all_input_nodes:
            if source not in tokens and sequence_dims(source, names):
                key = (source, source is mask)
                if key not in made:
                    made[key] = shortened(graph, source, node, names, extra, is_mask=source is mask)
                node.replace_input_with(source, made[key])
    for call in [n for n in graph.nodes if n.op == "call_module"]:
        for i, place in enumerate(n for n in program.blocks[str(call.target)].nodes if n.op == "placeholder"):
            source = call.args[i]
            if place in tokens and source not in tokens and sequence_dims(source, names):  # type: ignore[arg-type]
                new = shortened(graph, source, call, names, extra, is_mask=False)  # type: ignore[arg-type]
                call.args = (*call.args[:i], new, *call.args[i + 1 :])


def shortened(
    graph: fx.Graph, source: fx.Node, reader: fx.Node, names: set[str], extra: int, *, is_mask: bool
) -> fx.Node:
    dims = sequence_dims(source, names)
    if is_mask:
        dims = [d for d in dims if d != source.meta["val"].dim() - 1]
    with graph.inserting_before(reader if source.op == "placeholder" else source.next):
        make = Maker(graph, str(source.meta.get("path", "")))
        for dim in dims:
            source = make(aten.slice.Tensor, source, dim, extra, END)
    return source


# ------------------------------------------------------------------ causal by a flag


def unflag(program: Program, extra: int) -> None:
    """A mask for attention that was causal by a flag, made once: token i sees the extra keys and those up to its own."""
    masks: dict[str, fx.Node] = {}
    for name, graph in program.graphs():
        for node in [n for n in graph.nodes if isinstance(view(n), Attention)]:
            seen = view(node)
            assert isinstance(seen, Attention)
            if seen.causal:
                key = f"{name}/{seen.query.meta['val'].shape[-2]}"
                if key not in masks:
                    masks[key] = pass_in(program, name, triangle(program, seen, extra), "prefix_mask")
                node.args = (*node.args[:3], masks[key], seen.dropout, False)
                node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}


def triangle(program: Program, seen: Attention, extra: int) -> fx.Node:
    """(length, extra + length): whether a token sees a key."""
    graph, length = program.graph, seen.query.meta["val"].shape[-2]
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        make = Maker(graph, "")
        rows = created(graph, aten.arange.start, extra, length + extra, dtype=torch.int64)
        columns = created(graph, aten.arange.start, 0, length + extra, dtype=torch.int64)
        return make(aten.le.Tensor, make(aten.unsqueeze.default, columns, 0), make(aten.unsqueeze.default, rows, 1))
