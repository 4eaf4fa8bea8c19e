"""Sequences made longer inside a program: virtual tokens before the ones of the batch, and all that follows for lengths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate

from autopar.errors import PassError
from autopar.ir.importer import SYMBOLIC
from autopar.ir.objective import IGNORED
from autopar.ir.program import Program
from autopar.ir.shapes import infer
from autopar.ir.specialize import meaning

aten = torch.ops.aten
Change = Callable[[Any], Any]
"""From one symbolic size (a sympy expression) to another."""
FILL = {"attention_mask": 1, "labels": IGNORED}
"""What inputs hold for virtual tokens: they are seen, and nothing is to be predicted there."""
END = 9223372036854775807


def symbols_of(program: Program, what: str) -> set[str]:
    """The names of the symbols that stand for the batch or the sequence; every input may have one of its own."""
    return {s for s in program.sizes if meaning(program, s) == what}


def need_symbols(program: Program, who: str) -> None:
    if not program.sizes:
        raise PassError(
            f"{who}: this program has fixed sizes; apply the pass before `.at()`, where the length is a symbol"
        )
    if not symbols_of(program, "sequence"):
        raise PassError(f"{who}: the batch has no sequence of tokens (a second dim that inputs share)")


def with_sizes(value: Any, change: Change) -> Any:
    """A value, a list of arguments or a fake tensor, its symbolic sizes changed."""
    if isinstance(value, torch.Tensor):
        mode = value.fake_mode  # type: ignore[attr-defined]
        with mode:
            return value.new_empty([with_sizes(s, change) for s in value.shape])
    if isinstance(value, (list, tuple)):
        return type(value)(with_sizes(v, change) for v in value)
    if not isinstance(value, SYMBOLIC):
        return value
    old = value.node.expr
    new = change(old)
    if new == old:
        return value
    if not isinstance(value, torch.SymInt):
        raise PassError(f"a {type(value).__name__} that depends on the length ({old}) cannot be changed")
    if new.is_Integer:
        return int(new)
    env = value.node.shape_env
    known = {s: sympy.Integer(int(env.backed_var_to_val[s])) for s in new.free_symbols}
    return env.create_symintnode(new, hint=int(new.xreplace(known)))


def renewed(node: fx.Node, change: Change) -> None:
    """Change the sizes in a node's arguments and in its value."""
    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), lambda a: with_sizes(a, change))
    node.meta["val"] = with_sizes(node.meta["val"], change)


def plus(names: Iterable[str], extra: int) -> Change:
    """Every symbol of these grows by ``extra``."""
    wanted = set(names)
    return lambda e: e.xreplace({s: s + extra for s in e.free_symbols if str(s) in wanted})


def set_to(sizes: Mapping[str, int]) -> Change:
    return lambda e: e.xreplace({s: sympy.Integer(sizes[str(s)]) for s in e.free_symbols if str(s) in sizes})


def sequence_dims(node: fx.Node, names: set[str]) -> list[int]:
    """The dims of a value whose size depends on these symbols."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return []
    sizes = [s.node.expr.free_symbols if isinstance(s, torch.SymInt) else () for s in value.shape]
    return [d for d, found in enumerate(sizes) if any(str(s) in names for s in found)]


def padded(program: Program, place: fx.Node, extra: int, who: str) -> fx.Node:
    """An input with values for ``extra`` virtual tokens before its own, right behind the placeholders."""
    name = place.meta["name"]
    if name not in FILL:
        raise PassError(
            f"{who}: the model reads {name!r} for every token, and virtual tokens have none; known are {', '.join(FILL)}"
        )
    value, graph = place.meta["val"], program.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_before(last.next):
        fill = created(
            graph, aten.full.default, [value.shape[0], extra, *value.shape[2:]], FILL[name], dtype=value.dtype
        )
        whole = graph.call_function(aten.cat.default, ([fill, place], 1))
    whole.meta = {"path": "", "requires_grad": False}
    return infer(whole)


def created(graph: fx.Graph, target: Any, *args: Any, dtype: torch.dtype) -> fx.Node:
    """A call that makes a tensor of nothing but sizes, where ``graph`` inserts."""
    options = {"dtype": dtype, "device": torch.device("meta"), "pin_memory": False}
    node = graph.call_function(target, args, options)
    node.meta = {"path": "", "requires_grad": False}
    values = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
    mode = next((m for v in values if (m := getattr(v, "fake_mode", None)) is not None), contextlib.nullcontext())
    with mode, torch.no_grad():
        node.meta["val"] = target(*args, **options)
    return node
