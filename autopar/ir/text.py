"""A Program as stable text, for people and for golden tests."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from autopar.ir.program import Program

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def type_text(value: Any) -> str:
    """``f32[2, 16, 64]`` for a tensor, a tuple of these for several."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(v) for v in value)})"
    if not isinstance(value, torch.Tensor):
        return "?"
    return f"{DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{', '.join(map(str, value.shape))}]"


def target_text(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default") if name.endswith(".default") else name
    if target is operator.getitem:
        return "getitem"
    return str(target) if isinstance(target, str) else getattr(target, "__name__", str(target))


def value_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(value_text(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, torch.dtype):
        return DTYPES.get(value, str(value))
    return str(value)


def node_text(node: fx.Node) -> str:
    """One line: ``%linear: f32[2, 16, 64] = aten.linear(%x, %weight)``."""
    kind = type_text(node.meta.get("val"))
    if node.op == "placeholder":
        constant = node.meta.get("constant", "")
        return f"%{node.name}: {kind} = {node.meta.get('kind', 'input')} {node.meta.get('name', node.target)}{constant}"
    if node.op == "output":
        return f"return {value_text(node.args[0])}"
    arguments = [value_text(a) for a in node.args] + [f"{k}={value_text(v)}" for k, v in node.kwargs.items()]
    return f"%{node.name}: {kind} = {target_text(node)}({', '.join(arguments)})"


def graph_text(graph: fx.Graph) -> str:
    return "\n".join(f"  {node_text(n)}" for n in graph.nodes)


def text(program: Program) -> str:
    """Outer graph first, then every distinct block with the number of its instances."""
    counts: dict[str, int] = {}
    for call in program.calls():
        counts[str(call.target)] = counts.get(str(call.target), 0) + 1
    parts = [f"program {{\n{graph_text(program.graph)}\n}}"]
    for name, graph in program.blocks.items():
        parts.append(f"{name} × {counts.get(name, 0)} {{\n{graph_text(graph)}\n}}")
    return "\n".join(parts) + "\n"
