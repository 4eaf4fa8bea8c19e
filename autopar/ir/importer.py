"""An exported program as one flat graph: regions inlined, symbolic sizes folded into arguments, assertions dropped."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from autopar.errors import TraceError

aten = torch.ops.aten
ASSERTIONS = {
    "_assert_scalar",
    "_assert_tensor_metadata",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}
SYMBOLIC = (torch.SymInt, torch.SymBool, torch.SymFloat)


def flatten(source: fx.GraphModule) -> fx.Graph:
    """A copy of an exported graph without higher-order regions, symbolic arithmetic and assertions."""
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in source.graph.nodes:
        if node.op == "placeholder":
            new = graph.placeholder(node.name)
            new.meta["val"] = node.meta.get("val")
            env[node] = new
        elif node.op == "output":
            graph.output(map_arg(node.args[0], lambda n: env[n]))
        else:
            env[node] = imported(graph, source, node, env, detached=False)
    graph.eliminate_dead_code(is_impure)
    return graph


def is_impure(node: fx.Node) -> bool:
    """What must stay though nobody reads it: placeholders, outputs and in-place changes."""
    if node.op in ("placeholder", "output"):
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def imported(graph: fx.Graph, owner: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any], *, detached: bool) -> Any:
    """The value of one node in the new graph: a node, a plain or symbolic number, or a tuple of them."""
    value = node.meta.get("val")
    if node.op == "get_attr":
        found: Any = owner
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found
    if isinstance(value, (*SYMBOLIC, int, float, bool)) and node.op == "call_function":
        if free_unbacked_symbols(value):
            raise TraceError(
                f"{where(node)} cannot be traced: a number or a size depends on a tensor's values (.item(), nonzero, a mask as "
                "an index); use torch.where or fixed sizes"
            )
        return value
    if getattr(node.target, "_opname", "") in ASSERTIONS or namespace(node) in ASSERTIONS:
        return None
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return region(graph, node, env)
    if node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple):  # type: ignore
        return env[node.args[0]][node.args[1]]  # type: ignore
    if node.op != "call_function":
        raise TraceError(f"{where(node)}: a {node.op} of {node.target} cannot be compiled")
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
    new = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
    new.meta["val"] = value
    new.meta["path"] = path(node)
    return new


def namespace(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else ""


def region(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> tuple[Any, ...]:
    """Inline a `no_grad` or autocast region; what leaves a `no_grad` region is detached, as it was."""
    name = str(node.target)
    if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        raise TraceError(
            f"{where(node)}: the higher-order operator {name} cannot be compiled (data-dependent control flow?)"
        )
    args = list(node.args)
    at = next(i for i, a in enumerate(args) if isinstance(a, fx.Node) and a.op == "get_attr")
    body: fx.GraphModule = env[args[at]]  # type: ignore
    no_grad = name == "wrap_with_set_grad_enabled" and args[0] is False
    if name == "wrap_with_autocast" and args[2]:
        raise TraceError(
            f"{where(node)}: torch.autocast inside the model is not traced; leave it out and use the pass mixed_precision"
        )
    inner: dict[fx.Node, Any] = {}
    given = iter(args[at + 1 :])
    for n in body.graph.nodes:
        if n.op == "placeholder":
            inner[n] = map_arg(next(given), lambda m: env[m])
        elif n.op == "output":
            values = map_arg(n.args[0], lambda m: inner[m])
            return tuple(detach(graph, v) if no_grad else v for v in values)
        else:
            inner[n] = imported(graph, body, n, inner, detached=no_grad)
    raise AssertionError(f"a region without output: {node}")


def detach(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    new = graph.call_function(aten.detach.default, (value,))
    new.meta.update(val=value.meta["val"], path=value.meta.get("path", ""))
    return new


def path(node: fx.Node) -> str:
    """The module path that made a node, in the traced module's names."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def where(node: fx.Node) -> str:
    return path(node).removeprefix("model.") or node.name
