"""Putting sizes in: the static program for a batch size and a length."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from autopar.errors import TraceError
from autopar.ir.importer import SYMBOLIC
from autopar.ir.program import OUTER, Program


def specialize(program: Program, *, batch: int | None = None, length: int | None = None) -> Program:
    """``program`` with plain integers for all sizes; metadata (val, dims, requires_grad) made anew."""
    example = example_sizes(program)
    wanted = {"batch": batch or example["batch"]}
    if "sequence" in example:
        wanted["sequence"] = length or example["sequence"]
    if not program.sizes:
        if wanted == example:
            return program
        if program.respecialize is None:
            raise TraceError(f"this program is fixed to {example}; trace it again for {wanted}")
        return program.respecialize(program, wanted)
    new = program.clone()
    values = {s: wanted[meaning(program, s)] for s in program.sizes}
    for _, graph in new.graphs():
        for node in graph.nodes:
            node.args = substituted(node.args, values)
            node.kwargs = substituted(node.kwargs, values)
            node.meta["val"] = None if node.op != "placeholder" else meta_of(node.meta["val"], values)
    new.inputs = {k: resized_input(program, k, v, values) for k, v in program.inputs.items()}
    new.sizes = {}
    new.respecialize = lambda _static, sizes: specialize(program, batch=sizes["batch"], length=sizes.get("sequence"))
    propagate(new)
    return new


def example_sizes(program: Program) -> dict[str, int]:
    from autopar.ir.inputs import sizes_of

    return sizes_of(program.inputs)


def meaning(program: Program, symbol: str) -> str:
    """``batch`` or ``sequence``: what a symbol stands for, by where the inputs have it."""
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "input":
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and str(size.node.expr) == symbol:
                    return "batch" if dim == 0 else "sequence"
    raise TraceError(f"the symbol {symbol} is the size of no input")


def evaluate(value: Any, values: dict[str, int]) -> Any:
    """A symbolic number as a plain one."""
    if not isinstance(value, SYMBOLIC):
        return value
    expr = value.node.expr
    done = expr.xreplace({s: sympy.Integer(values[str(s)]) for s in expr.free_symbols})
    if isinstance(value, torch.SymBool):
        return bool(done)
    return int(done) if isinstance(value, torch.SymInt) else float(done)


def substituted(value: Any, values: dict[str, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(substituted(v, values) for v in value)
    if isinstance(value, dict):
        return {k: substituted(v, values) for k, v in value.items()}
    return evaluate(value, values)


def meta_of(value: Any, values: dict[str, int]) -> Any:
    """A plain meta tensor of the evaluated shape; contiguous."""
    if isinstance(value, (list, tuple)):
        return tuple(meta_of(v, values) for v in value)
    if not isinstance(value, torch.Tensor):
        return evaluate(value, values)
    return torch.empty([evaluate(s, values) for s in value.shape], dtype=value.dtype, device="meta")


def resized_input(program: Program, name: str, value: Any, values: dict[str, int]) -> Any:
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "input" and node.meta["name"] == name:
            return meta_of(node.meta["val"], values)
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta")
    return value


# ------------------------------------------------------------------ metadata of a static program


def propagate(program: Program) -> None:
    """Run every node on meta tensors: shapes and dtypes of the static program."""
    with torch.no_grad():
        for name, graph in program.graphs():
            for node in graph.nodes:
                if node.op == "call_function":
                    node.meta["val"] = run_meta(node, name)
        for call in program.calls():
            body = program.blocks[str(call.target)]
            call.meta["val"] = tuple(n.meta["val"] for n in body.output_node().args[0])  # type: ignore
        for node in program.graph.nodes:
            if node.op == "call_function":
                node.meta["val"] = run_meta(node, OUTER)


def run_meta(node: fx.Node, name: str) -> Any:
    if any(n.meta["val"] is None for n in node.all_input_nodes):
        return None  # reads a block call, known in the second round
    if node.target is operator.getitem:
        return node.args[0].meta["val"][node.args[1]]  # type: ignore
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        return node.target(*args, **{k: torch.device("meta") if k == "device" else v for k, v in kwargs.items()})  # type: ignore
    except Exception as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise TraceError(
            f"{node.meta.get('path') or name}: {node.target} does not work at these sizes: {first}"
        ) from problem


def annotate(program: Program, sizes: dict[str, int]) -> None:
    """`meta["dims"]` (which of batch and sequence each dim depends on) and `meta["requires_grad"]` of every node."""
    names = {s: meaning(program, s) for s in program.sizes}
    for body in program.blocks.values():
        for place in (n for n in body.nodes if n.op == "placeholder"):
            place.meta["requires_grad"] = (
                False  # what calls say is added up below; a pass may have frozen weights since
            )
    for node in program.graph.nodes:
        annotate_node(node, names, sizes, program)
        if node.op == "call_module":
            body = program.blocks[str(node.target)]
            places = [n for n in body.nodes if n.op == "placeholder"]
            for place, given in zip(places, node.args, strict=True):
                flag = bool(given.meta["requires_grad"])
                place.meta["requires_grad"] = flag or bool(place.meta.get("requires_grad"))
            for inner in body.nodes:
                annotate_node(inner, names, sizes, program)
            out = body.output_node().args[0]
            node.meta["requires_grad"] = tuple(bool(n.meta["requires_grad"]) for n in out)  # type: ignore
            node.meta["dims"] = tuple(n.meta["dims"] for n in out)  # type: ignore


def annotate_node(node: fx.Node, names: dict[str, str], sizes: dict[str, int], program: Program) -> None:
    value = node.meta.get("val")
    if program.sizes or "dims" not in node.meta:
        node.meta["dims"] = dims_of(value, names, sizes, bool(program.sizes))
    if node.op == "placeholder":
        own = program.parameters.get(node.meta["name"]) if node.meta["kind"] == "parameter" else None
        if own is not None:
            node.meta["requires_grad"] = own.trainable
        node.meta.setdefault("requires_grad", False)
        return
    if node.op == "call_function":
        node.meta["requires_grad"] = flows(node)


def flows(node: fx.Node) -> Any:
    """Whether gradients flow through a node's value: it is floating, some operand's do, and nothing detaches it."""
    value = node.meta.get("val")
    given = [n.meta["requires_grad"] for n in node.all_input_nodes]
    if node.target is operator.getitem:
        flags = node.args[0].meta["requires_grad"]  # type: ignore
        return flags[node.args[1]] if isinstance(flags, tuple) else flags  # type: ignore
    any_ = any(any(g) if isinstance(g, tuple) else g for g in given) and "detach" not in str(node.target)
    if isinstance(value, (tuple, list)):
        return tuple(any_ and isinstance(v, torch.Tensor) and v.is_floating_point() for v in value)
    return any_ and isinstance(value, torch.Tensor) and value.is_floating_point()


@lru_cache(maxsize=4096)
def spelled(expr: sympy.Expr) -> tuple[str, ...]:
    """The symbols of an expression, by name; sympy takes long to spell one."""
    return tuple(str(s) for s in expr.free_symbols)


def dims_of(value: Any, names: dict[str, str], sizes: dict[str, int], symbolic: bool) -> Any:
    """For each dim the set of symbols its size depends on; for a fixed program, dims that have the sizes' values."""
    if isinstance(value, (tuple, list)):
        return tuple(dims_of(v, names, sizes, symbolic) for v in value)
    if not isinstance(value, torch.Tensor):
        return ()
    if symbolic:
        return tuple(
            frozenset(names[s] for s in spelled(d.node.expr)) if isinstance(d, torch.SymInt) else frozenset()
            for d in value.shape
        )
    found = []
    for i, d in enumerate(value.shape):
        same = {n for n, size in sizes.items() if size == d and (n != "batch" or i == 0)}
        found.append(frozenset(same))
    return tuple(found)
