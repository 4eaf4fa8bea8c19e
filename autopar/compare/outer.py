"""What stands around the blocks: positions, the mask, the objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.compare.attention import Heads
from autopar.compare.walk import before, source
from autopar.cost.values import op_name, tensors
from autopar.ir.causal import ancestors, computed
from autopar.ir.ops import Embedding, view
from autopar.ir.program import Program


def positions(program: Program, heads: Heads) -> str:
    """How the model learns of positions."""
    found = []
    if heads.rotary:
        dims = " in two dimensions" if heads.tables > 2 else ""
        found.append(f"rotary ({heads.rotary}){dims}, {heads.rotated} of {heads.head_dim}")
    if heads.biased:
        found.append("ALiBi")
    for node in program.graph.nodes:
        seen = view(node)
        if isinstance(seen, Embedding) and not _reads_inputs(seen.ids, ("input_ids", "decoder_input_ids")):
            found.append(f"learned, {tensors(seen.weight)[0].shape[0]}")
    if not found and any(op_name(n) == "sin" for n in program.graph.nodes if n.op == "call_function"):
        found.append("sinusoidal")
    return ", ".join(dict.fromkeys(found)) or "none"


def _reads_inputs(node: fx.Node, names: tuple[str, ...]) -> bool:
    return any(n.op == "placeholder" and n.meta.get("name") in names for n in before([node]))


def objective(program: Program, heads: Heads, graph: fx.Graph) -> str:
    """What is learned, and who sees whom."""
    return f"{seen(program, heads, graph)}, {learned(program)}"


def seen(program: Program, heads: Heads, graph: fx.Graph) -> str:
    if heads.causal is True:
        return "causal"
    if heads.causal is None:
        return "bidirectional"
    mask: Any = heads.causal
    if mask.op == "placeholder" and graph is not program.graph:
        name = next(n for n, g in program.blocks.items() if g is graph)
        call = next(c for c in program.calls() if c.target == name)
        index = [n for n in graph.nodes if n.op == "placeholder"].index(mask)
        mask = call.args[index]
    lower = band(source(mask))
    if lower is None:
        return "a mask of the batch"
    return "causal" if lower else "bidirectional"


def band(mask: fx.Node) -> bool | None:
    """Whether a mask made of sizes alone hides the future; None where it depends on the batch."""
    nodes = ancestors(mask)
    if any(n.op in ("placeholder", "call_module") and n.op != "get_attr" for n in nodes):
        return None
    value = computed(nodes, {})[mask].to("cpu")
    hidden = ~value if value.dtype == torch.bool else value <= torch.finfo(value.dtype).min / 2
    rows = hidden.shape[-1]
    return bool(hidden[..., torch.ones(rows, rows, dtype=torch.bool).triu(1)].all()) if rows > 1 else False


def learned(program: Program) -> str:
    """By how the loss reads its labels."""
    losses = [n for n in program.graph.nodes if op_name(n) in ("cross_entropy_loss", "nll_loss")]
    if not losses:
        return "a loss of its own"
    shifted = any(op_name(n) in ("pad", "constant_pad_nd") for n in before(losses))
    return "next token" if shifted else "labels in place"
