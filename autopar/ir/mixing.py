"""Which operators mix the sequences of a batch: their model's result changes when a batch is split over replicas or steps.

Values are followed from the inputs on. A value is *free* (of the batch's data), or has *rows*: a dim, batch-major, whose
every entry comes from one sequence; or it is a *total* or an *average* over the batch, of which only linear functions may
reach the objective. An operator that fits nothing of this is named. What is not known counts as mixing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.node import map_aggregate, map_arg

from autopar.errors import TraceError
from autopar.ir.program import Program
from autopar.ir.text import target_text

PROBE = 13
"""Sequences at which a program is looked at: a prime, so that no other size is taken for the batch's."""


@dataclass(frozen=True)
class Value:
    """``kind``: free, rows, total, average or mixed. ``dim``: where the rows are. ``exact``: makes a free value's tensor.
    ``counted``: a free value that is proportional to the batch's size. ``outer``: other places that the rows' dim has before
    the batch (a length, when (length, batch) was merged)."""

    kind: str
    dim: int = -1
    counted: bool = False
    exact: Callable[[], Any] | None = None
    outer: int = 1


FREE, MIXED = Value("free"), Value("mixed")


class Mixing(Exception):
    """What an operator does to the batch."""


def mixes_batch(program: Program) -> list[str]:
    """The operators of a program whose result for one sequence depends on others, as ``path: operator (why)``; empty if none.

    Data parallelism and micro-batches leave the loss and its gradients what they are exactly where this is empty.
    """
    try:
        static = program.at(batch=PROBE)
    except TraceError:
        static = program
    found: list[str] = []
    batch = next(int(v.shape[0]) for v in tensors(static.inputs))
    values = followed(static, static.graph, None, batch, found, "")
    loss, count = values
    pair = (loss.kind, "counted" if count.counted else count.kind)
    if not found and pair not in {("total", "total"), ("total", "counted"), ("average", "free")}:
        found.append(f"objective: the loss is {described(loss)} and the count is {described(count)} over the batch")
    return list(dict.fromkeys(found))


def tensors(value: Any) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor) and v.dim() > 0]


def described(value: Value) -> str:
    return {"total": "a sum", "average": "a mean", "free": "the same"}.get(value.kind, "no sum")


def followed(
    program: Program, graph: fx.Graph, given: list[Value] | None, batch: int, found: list[str], prefix: str
) -> list[Value]:
    """The values a graph returns; mixing operators are added to ``found``."""
    env: dict[fx.Node, Any] = {}
    places = iter(given or ())
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = next(places) if given is not None else entering(node, batch)
        elif node.op == "output":
            return [env[n] if isinstance(n, fx.Node) else FREE for n in node.args[0]]  # type: ignore[union-attr]
        elif node.op == "call_module":
            body = program.blocks[str(node.target)]
            path = f"{node.meta['path']}."
            env[node] = tuple(followed(program, body, [env[a] for a in node.args], batch, found, path))  # type: ignore
        else:
            env[node] = after(node, env, batch, found, prefix)
    raise AssertionError("a graph without output")


def entering(node: fx.Node, batch: int) -> Value:
    value = node.meta["val"]
    rows = node.meta["kind"] == "input" and value.dim() > 0 and value.shape[0] == batch
    return Value("rows", 0) if rows else FREE


def after(node: fx.Node, env: dict[fx.Node, Any], batch: int, found: list[str], prefix: str) -> Any:
    """The value of one call."""
    from autopar.ir.batchrules import rule_of

    if node.target is operator.getitem:
        source = env[node.args[0]]  # type: ignore[index]
        return source[node.args[1]] if isinstance(source, tuple) else source  # type: ignore[index]
    values = [env[n] for n in node.all_input_nodes]
    if any(v.kind == "mixed" for v in values):
        return spread(node, MIXED)
    if all(v.kind == "free" for v in values):
        counted = counts(node, batch) or len(values) == 1 and values[0].counted
        return spread(node, Value("free", counted=counted, exact=cache(lambda: evaluated(node, env))))
    try:
        made = spread(node, rule_of(node)(Call(node, env, batch)))
        if changes_free(node, env):
            written(node, env, made)
        return made
    except Mixing as why:
        where = f"{prefix}{node.meta.get('path') or ''}".rstrip(".")
        found.append(f"{where or 'program'}: {target_text(node).removeprefix('aten.')} ({why})")
        return spread(node, MIXED)


def written(node: fx.Node, env: dict[fx.Node, Any], made: Value) -> None:
    """Rows are written into a value that was free: what it is a slice of has rows from now on, if it was made for it."""
    changed: Any = node.args[0]
    while changed.target is torch.ops.aten.slice.Tensor:
        env[changed] = made
        changed = changed.args[0]
    others = [
        u for u in changed.users if u in env and env[u].kind == "free" and u.target is not torch.ops.aten.copy_.default
    ]
    if changed.op != "call_function" or others or made.dim < 0:
        raise Mixing("changes what is kept by values of the batch")
    env[changed] = made


def counts(node: fx.Node, batch: int) -> bool:
    """Whether a free value is a number of sequences or tokens: a sum over a dim of the batch's size, or that number itself."""
    aten = torch.ops.aten
    if node.target in (aten.full.default, aten.scalar_tensor.default):
        value = node.args[-1] if node.target is aten.full.default else node.args[0]
        return isinstance(value, (int, float)) and node.meta["val"].dim() == 0 and value != 0 and value % batch == 0
    total = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name == "aten::sum"
    return total and node.meta["val"].dim() == 0 and node.args[0].meta["val"].numel() % batch == 0  # type: ignore[union-attr]


def changes_free(node: fx.Node, env: dict[fx.Node, Any]) -> bool:
    target = node.target
    mutable = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return mutable and isinstance(node.args[0], fx.Node) and env[node.args[0]].kind == "free"


def spread(node: fx.Node, value: Any) -> Any:
    """One value for each result of a call with several."""
    if isinstance(value, Value) and isinstance(node.meta["val"], (tuple, list)):
        return tuple(value for _ in node.meta["val"])
    return value


def evaluated(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """A free value's tensor, on the CPU; an error where it is not made of sizes alone."""

    def given(n: fx.Node) -> Any:
        value = env[n]
        if not isinstance(value, Value) or value.exact is None:
            raise Mixing(f"an index that depends on {n.name}")
        return value.exact()

    args, kwargs = map_arg((node.args, node.kwargs), given)
    args, kwargs = map_aggregate((args, kwargs), lambda a: torch.device("cpu") if isinstance(a, torch.device) else a)
    return node.target(*args, **kwargs)  # type: ignore[operator]


class Call:
    """One call as its rule sees it."""

    def __init__(self, node: fx.Node, env: dict[fx.Node, Any], batch: int) -> None:
        self.node, self.env, self.batch = node, env, batch
        self.out = node.meta["val"]

    def argument(self, index: int, default: Any = None) -> Any:
        from autopar.ir.ops import argument

        arguments = self.node.target._schema.arguments  # type: ignore[union-attr]
        return argument(self.node, index) if index < len(arguments) else default

    def named(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        names = [a.name for a in self.node.target._schema.arguments]  # type: ignore[union-attr]
        return self.argument(names.index(name)) if name in names else default

    def value(self, node: Any) -> Value:
        return self.env[node] if isinstance(node, fx.Node) else FREE

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    def rows(self, *, merged: bool = False) -> list[tuple[fx.Node, Value]]:
        """The operands that have rows; `Mixing` where a total or an average is among all operands, or where rows are not
        batch-major in their dim and the rule does not say that it may be ``merged`` so."""
        values = [(n, self.value(n)) for n in self.node.all_input_nodes]
        for n, v in values:
            if v.kind in ("total", "average"):
                raise Mixing(f"reads {n.name}, {described(v)} over the batch")
            if v.outer != 1 and not merged:
                raise Mixing("the batch is merged behind another dim")
        return [(n, v) for n, v in values if v.kind == "rows"]

    def kept(self, dim: int, outer: int = 1) -> Value:
        """Rows at ``dim`` of the result, if that dim can hold them."""
        out = self.out[0] if isinstance(self.out, (tuple, list)) else self.out
        if dim >= out.dim() or out.shape[dim] % (self.batch * outer) or out.shape[dim] == 0:
            raise Mixing("its result has no dim for the sequences")
        return Value("rows", dim, outer=outer)


def leading(shape: tuple[int, ...], dim: int) -> int:
    return math.prod(shape[:dim])
