"""The repeated blocks of a program, found by structure: one graph for all instances that are equal."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.ir.capture import Capture
from autopar.ir.importer import is_impure
from autopar.ir.markers import BLOCK, ENTER, LEAVE
from autopar.ir.text import graph_text


class MismatchError(Exception):
    """Instances that should be equal are not, or a block leaks: trace in full, or without folding."""


@dataclass
class Segment:
    """One inline instance: the nodes between its markers."""

    call: str
    path: str
    enter: fx.Node
    leave: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.call.split("#")[0]


@dataclass
class Body:
    """The graph made from a segment, and where each of its placeholders comes from."""

    graph: fx.Graph
    sources: list[tuple[str, Any]]  # ("argument", i) | ("relative", name) | ("outer", node) for each placeholder
    text: str


def segments(graph: fx.Graph, capture: Capture) -> list[Segment]:
    paths = dict(capture.calls)
    found: list[Segment] = []
    open_: Segment | None = None
    for node in graph.nodes:
        if node.target is ENTER:
            open_ = Segment(node.args[1], paths[node.args[1]], node)
            found.append(open_)
        elif node.target is LEAVE:
            assert open_ is not None and open_.call == node.args[1], node
            open_.leave = node
            open_ = None
        elif open_ is not None and node.op == "call_function":
            open_.nodes.append(node)
    return found


def fold(graph: fx.Graph, capture: Capture, name_of: Callable[[fx.Node], str]) -> tuple[fx.Graph, dict[str, fx.Graph]]:
    """The outer graph, with one `call_module` per instance, and the distinct blocks.

    ``name_of`` gives a placeholder's original name. Raises `MismatchError` where folding would be wrong.
    """
    found = segments(graph, capture)
    names = capture.names
    bodies = {s.call: body(s, names[s.key], name_of) for s in found}
    blocks: dict[str, fx.Graph] = {}
    by_text: dict[str, str] = {}
    by_key: dict[str, list[str]] = {}
    for segment in found:
        made = bodies[segment.call]
        if made.text not in by_text:
            by_text[made.text] = f"block_{len(blocks)}"
            blocks[by_text[made.text]] = made.graph
        by_key.setdefault(segment.key, []).append(segment.call)
    opaque = {n.args[1].split("#")[0] for n in graph.nodes if n.target is BLOCK}
    for key in opaque:
        texts = {bodies[c].text for c in by_key[key]}
        outer = {tuple(s for s in bodies[c].sources if s[0] == "outer") for c in by_key[key]}
        if len(texts) > 1 or len(outer) > 1:
            raise MismatchError(f"instances of {dict(capture.calls)[by_key[key][0]]} differ")
    return outer_graph(graph, found, bodies, by_text, by_key, capture, name_of), blocks


def body(segment: Segment, names: list[str], name_of: Callable[[fx.Node], str]) -> Body:
    """A segment as a graph of its own."""
    if segment.leave is None:
        raise MismatchError(f"{segment.path} never returned")
    inside = set(segment.nodes)
    new, env = fx.Graph(), {}
    sources: list[tuple[str, Any]] = []
    for node in arguments_first(segment, inside):
        if node in env:
            continue
        if node.target is operator.getitem and node.args[0] is segment.enter:
            index = node.args[1]
            env[node] = placeholder(new, names[index], node, "input", names[index])
            sources.append(("argument", index))
        elif node.op == "placeholder":
            name = name_of(node)
            relative = name.removeprefix(segment.path + ".") if name.startswith(segment.path + ".") else None
            env[node] = placeholder(new, relative or name, node, node.meta["kind"], relative or name)
            kind = node.meta["kind"]
            shared = ("outer", node) if relative is None and kind != "constant" else ("relative", relative)
            sources.append(("constant", node) if kind == "constant" else shared)
        else:
            env[node] = placeholder(new, node.name, node, "input", node.name)
            sources.append(("outer", node))
    for node in segment.nodes:
        if node.target is operator.getitem and node.args[0] is segment.enter:
            continue
        escaped = [u for u in node.users if u not in inside and u is not segment.leave]
        if escaped:
            raise MismatchError(f"{segment.path}: {node.name} is read outside the block by {escaped[0].name}")
        env[node] = new.node_copy(node, lambda n: env[n])
        env[node].meta = relative_meta(node, segment.path)
    rename(new)
    new.output(tuple(env[n] for n in segment.leave.args[0]))
    new.eliminate_dead_code(is_impure)
    return Body(new, sources, graph_text(new))


def arguments_first(segment: Segment, inside: set[fx.Node]) -> list[fx.Node]:
    """What the segment reads from outside, in a stable order: arguments, other values, parameters as used."""
    entered = sorted(
        (u for u in segment.enter.users if u.users and u.target is operator.getitem), key=lambda n: int(n.args[1])
    )
    outside: list[fx.Node] = []
    assert segment.leave is not None
    for node in [*segment.nodes, segment.leave]:
        if node in entered:
            continue
        for source in node.all_input_nodes:
            if source not in inside and source is not segment.enter and source not in outside:
                outside.append(source)
    values = [n for n in outside if n.op != "placeholder"]
    return [*entered, *values, *[n for n in outside if n.op == "placeholder"]]


def placeholder(graph: fx.Graph, label: str, node: fx.Node, kind: str, name: str) -> fx.Node:
    label = label.replace(".", "_")
    new = graph.placeholder(label if label.isidentifier() else f"p_{label}")
    new.meta.update(val=node.meta["val"], kind=kind, name=name, path="")
    if "constant" in node.meta:
        new.meta["constant"] = node.meta["constant"]
    return new


def relative_meta(node: fx.Node, path: str) -> dict[str, Any]:
    where = str(node.meta.get("path", ""))
    inner = where.removeprefix(path).lstrip(".") if where.startswith(path) else where
    return {**node.meta, "path": inner}


def rename(graph: fx.Graph) -> None:
    """Name nodes by operator and order, so that equal blocks have equal text."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            target = node.target
            base = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else target.__name__
            base = base.strip("_")
            counts[base] = counts.get(base, -1) + 1
            node.name = base if counts[base] == 0 else f"{base}_{counts[base]}"


def outer_graph(
    graph: fx.Graph,
    found: list[Segment],
    bodies: dict[str, Body],
    by_text: dict[str, str],
    by_key: dict[str, list[str]],
    capture: Capture,
    name_of: Callable[[fx.Node], str],
) -> fx.Graph:
    """The graph with every instance replaced by a call of its block."""
    placeholders = {name_of(n): n for n in graph.nodes if n.op == "placeholder"}
    inside = {n for s in found for n in s.nodes}
    enters = {s.enter: s for s in found}
    leaves = {s.leave: s for s in found}
    paths = dict(capture.calls)
    new, env, arguments = fx.Graph(), {}, {}

    def call(made: Body, xs: list[fx.Node], path: str, node: fx.Node) -> None:
        args = []
        for kind, value in made.sources:
            if kind == "argument":
                args.append(env[xs[value]])
            elif kind == "relative":
                args.append(env[placeholders[f"{path}.{value}"]])
            else:
                args.append(env[value])
        made_call = new.call_module(by_text[made.text], tuple(args))
        made_call.meta.update(val=node.meta["val"], path=path)
        env[node] = made_call

    for node in graph.nodes:
        if node in inside:
            continue
        if node in enters:
            arguments[enters[node].call] = node.args[0]
        elif node in leaves:
            segment = leaves[node]
            call(bodies[segment.call], arguments[segment.call], segment.path, node)
        elif node.target is BLOCK:
            representative = bodies[by_key[node.args[1].split("#")[0]][0]]
            call(representative, node.args[0], paths[node.args[1]], node)
        else:
            env[node] = new.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
    new.eliminate_dead_code(lambda n: is_impure(n) and n.op != "placeholder" or n.meta.get("kind") == "input")
    rename(new)
    rename_calls(new)
    return new


def rename_calls(graph: fx.Graph) -> None:
    for i, node in enumerate(n for n in graph.nodes if n.op == "call_module"):
        node.name = f"call_{i}"
