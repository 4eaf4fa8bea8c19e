"""What must hold of a program before and after every pass. A violation is a fault of ours, never of the user."""

from __future__ import annotations

import operator

import torch
from torch import fx

from autopar.ir.program import OUTER, Program

KINDS = {"input", "parameter", "buffer", "constant", "plain"}


class MalformedError(AssertionError):
    """A program that breaks an invariant: which, and where."""


def verify(program: Program) -> None:
    """Raise `MalformedError` unless every invariant of docs/interfaces.md holds."""
    for name, graph in program.graphs():
        graph.lint()
        check_graph(program, name, graph)
    for call in program.calls():
        check_call(program, call)
    called = {str(c.target) for c in program.calls()}
    check(called == set(program.blocks), f"blocks {sorted(program.blocks)} but calls of {sorted(called)}")
    outputs = program.graph.output_node().args[0]
    check(
        isinstance(outputs, (tuple, list)) and len(outputs) == 2,
        f"the program returns {outputs}, not (loss_sum, count)",
    )


def check(holds: bool, message: str) -> None:
    if not holds:
        raise MalformedError(message)


def check_graph(program: Program, name: str, graph: fx.Graph) -> None:
    names = set()
    for node in graph.nodes:
        where = f"{name}.{node.name}"
        check(node.name not in names, f"{where}: two nodes of one name")
        names.add(node.name)
        if node.op == "placeholder":
            check(node.meta.get("kind") in KINDS, f"{where}: a placeholder of kind {node.meta.get('kind')}")
            check("name" in node.meta, f"{where}: a placeholder without its original name")
            if name == OUTER and node.meta["kind"] == "parameter":
                check(node.meta["name"] in program.parameters, f"{where}: no parameter {node.meta['name']}")
        elif node.op == "call_function":
            known = isinstance(node.target, torch._ops.OpOverload) or callable(node.target)
            check(known, f"{where}: {node.target} is no operator")
        else:
            allowed = ("call_module", "output") if name == OUTER else ("output",)
            check(node.op in allowed, f"{where}: a {node.op}")
        if node.op != "output":
            check(node.meta.get("val") is not None, f"{where}: no value")


def check_call(program: Program, call: fx.Node) -> None:
    graph = program.blocks.get(str(call.target))
    if graph is None:
        raise MalformedError(f"{call.name}: no block {call.target}")
    places = [n for n in graph.nodes if n.op == "placeholder"]
    check(len(places) == len(call.args), f"{call.name}: {len(call.args)} arguments for {len(places)} placeholders")
    for place, given in zip(places, call.args, strict=True):
        check(isinstance(given, fx.Node), f"{call.name}: {place.name} is given {given}")
        a, b = place.meta["val"], given.meta["val"]  # type: ignore[union-attr]
        same = [str(s) for s in a.shape] == [str(s) for s in b.shape] and a.dtype == b.dtype
        check(same, f"{call.name}: {place.name} is {tuple(a.shape)} {a.dtype}, given {tuple(b.shape)} {b.dtype}")
    for user in call.users:
        check(user.target is operator.getitem, f"{call.name} is read by {user.name} without getitem")
