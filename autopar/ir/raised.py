"""A program in float64 throughout: the casts of precision passes stay where they are and change nothing any more.

A proof compares this one with the unmodified model, so it holds the graph that a pass left, every cast and every choice
of where it stands included, to the model's mathematics; what rounding costs is another question.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from autopar.ir.program import OUTER, Program
from autopar.ir.promote import LOWER
from autopar.ir.shapes import retype, retype_call


def raised(program: Program, before: Program) -> Program:
    """``program`` with float64 wherever a narrower floating dtype stands; values of tensors are those of ``before``,
    the program without the passes, where it has them."""
    new = program.clone()
    for table in (new.parameters, new.buffers):
        for name, entry in table.items():
            if entry.dtype in LOWER:
                table[name] = replace(entry, dtype=torch.float64)
    for name, tensor in new.tensors.items():
        new.tensors[name] = wide(before.tensors.get(name, tensor))
    for name in [*new.blocks, OUTER]:
        graph = new.graph if name == OUTER else new.blocks[name]
        for node in graph.nodes:
            raise_node(new, node)
    new.precision = None
    if program.respecialize is not None:
        again, first = program.respecialize, before.respecialize or (lambda _p, _sizes: before)
        new.respecialize = lambda _static, sizes: raised(again(program, sizes), first(before, sizes))
    return new


def lowered(program: Program) -> bool:
    """Whether something is stored or computed in less than float64, at a pass's word: a cast, a product in 8 bits."""
    stored = [entry.dtype for table in (program.parameters, program.buffers) for entry in table.values()]
    nodes = [n for _, graph in program.graphs() for n in graph.nodes if n.op == "call_function"]
    said = (a for n in nodes for a in tree_leaves((n.args, n.kwargs)) if isinstance(a, torch.dtype))
    return any(d in LOWER for d in stored) or any(d in LOWER for d in said)


def raise_node(program: Program, node: fx.Node) -> None:
    if node.op == "placeholder":
        node.meta["val"] = wide(node.meta["val"])
        return
    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), wide)  # type: ignore[assignment]
    if node.op == "call_module":
        retype_call(program, node)
    elif node.op == "call_function" and any(isinstance(v, torch.Tensor) for v in values(node.meta["val"])):
        retype(program, node)


def values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def wide(value: Any) -> Any:
    """A dtype or tensor below float64 made float64 (tied tensors stay tied: a parameter already wide is itself)."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value in LOWER else value
    if isinstance(value, torch.Tensor) and value.dtype in LOWER:
        made = value.detach().to(torch.float64)
        return torch.nn.Parameter(made, value.requires_grad) if isinstance(value, torch.nn.Parameter) else made
    return value
