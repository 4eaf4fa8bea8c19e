"""The repeated blocks of a program, found by structure: one graph for all instances that are equal."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.ir.capture import Capture, MismatchError, UnfoldableError
from autopar.ir.importer import is_impure
from autopar.ir.markers import BLOCK, ENTER, LEAVE
from autopar.ir.text import graph_text


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


@dataclass
class Folding:
    """All that is known while a graph is folded."""

    capture: Capture
    aliases: dict[str, list[str]]  # the name of a tensor's placeholder → all its names
    segments: list[Segment]
    bodies: dict[str, Body] = field(default_factory=dict)  # call → what was made of it
    block_of: dict[str, str] = field(default_factory=dict)  # a body's text → the block's name
    first: dict[str, Body] = field(default_factory=dict)  # call key → the body that stands for its opaque calls

    @property
    def paths(self) -> dict[str, str]:
        return dict(self.capture.calls)


def fold(graph: fx.Graph, capture: Capture, alias_of: dict[str, str | None]) -> tuple[fx.Graph, dict[str, fx.Graph]]:
    """The outer graph, with one `call_module` per instance, and the distinct blocks.

    Raises `MismatchError` or `UnfoldableError` where folding would be wrong.
    """
    folding = Folding(capture, aliases(graph, alias_of), segments(graph, capture))
    blocks: dict[str, fx.Graph] = {}
    for segment in folding.segments:
        made = folding.bodies[segment.call] = body(segment, folding)
        if made.text not in folding.block_of:
            folding.block_of[made.text] = f"block_{len(blocks)}"
            blocks[folding.block_of[made.text]] = made.graph
        folding.first.setdefault(segment.key, made)
    check_alike(graph, folding)
    return outer_graph(graph, folding), blocks


def aliases(graph: fx.Graph, alias_of: dict[str, str | None]) -> dict[str, list[str]]:
    """Every name of the tensor behind a placeholder, by the name the placeholder has."""
    kept = {n.meta["name"] for n in graph.nodes if n.op == "placeholder"}
    groups: dict[str, list[str]] = defaultdict(list)
    for name, first in alias_of.items():
        groups[first or name].append(name)
    return {name: names for names in groups.values() for name in names if name in kept}


def check_alike(graph: fx.Graph, folding: Folding) -> None:
    """What stands for opaque calls must be what every inline instance of the same key came to."""
    opaque = {str(n.args[1]).split("#")[0] for n in graph.nodes if n.target is BLOCK}
    for key in opaque:
        inline = [folding.bodies[s.call] for s in folding.segments if s.key == key]
        outer = {tuple(s for s in made.sources if s[0] == "outer") for made in inline}
        if len({made.text for made in inline}) > 1 or len(outer) > 1:
            path = next(s.path for s in folding.segments if s.key == key)
            raise MismatchError(f"{path} differs from a block of the same structure")


def body(segment: Segment, folding: Folding) -> Body:
    """A segment as a graph of its own."""
    if segment.leave is None:
        raise UnfoldableError(f"{segment.path} never returned")
    inside = set(segment.nodes)
    new, env = fx.Graph(), {}
    sources: list[tuple[str, Any]] = []
    for node in arguments_first(segment, inside):
        if node not in env:
            label, name, source = taken_in(node, segment, folding)
            kind = node.meta["kind"] if node.op == "placeholder" else "input"
            env[node] = placeholder(new, label, node, kind, name)
            sources.append(source)
    for node in segment.nodes:
        if node.target is operator.getitem and node.args[0] is segment.enter:
            continue
        escaped = [u for u in node.users if u not in inside and u is not segment.leave]
        if escaped:
            raise UnfoldableError(f"{segment.path}: {node.name} is read outside the block by {escaped[0].name}")
        env[node] = new.node_copy(node, lambda n: env[n])
        env[node].meta = relative_meta(node, segment.path)
    rename(new)
    new.output(tuple(env[n] for n in segment.leave.args[0]))  # type: ignore[union-attr]
    new.eliminate_dead_code(is_impure)
    return Body(new, sources, graph_text(new))


def taken_in(node: fx.Node, segment: Segment, folding: Folding) -> tuple[str, str, tuple[str, Any]]:
    """What a block reads from outside: its label and name in the block, and where each instance's comes from."""
    if node.target is operator.getitem and node.args[0] is segment.enter:
        index = int(node.args[1])  # type: ignore[arg-type]
        called = folding.capture.names[segment.key][index]
        return called, called, ("argument", index)
    if node.op != "placeholder":
        return node.name, node.name, ("outer", node)
    name = node.meta["name"]
    own = [n for n in folding.aliases.get(name, [name]) if n.startswith(segment.path + ".")]
    if not own:
        return name, name, ("constant" if node.meta["kind"] == "constant" else "outer", node)
    relative = own[0].removeprefix(segment.path + ".")
    return relative, relative, ("relative", relative)


def arguments_first(segment: Segment, inside: set[fx.Node]) -> list[fx.Node]:
    """What the segment reads from outside, in a stable order: arguments, other values, parameters as used."""
    entered = sorted(
        (u for u in segment.enter.users if u.users and u.target is operator.getitem),
        key=lambda n: int(n.args[1]),  # type: ignore
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


def outer_graph(graph: fx.Graph, folding: Folding) -> fx.Graph:
    """The graph with every instance replaced by a call of its block."""
    holders = {n.meta["name"]: n for n in graph.nodes if n.op == "placeholder"}
    holders |= {name: holders[kept] for kept, names in folding.aliases.items() for name in names}
    inside = {n for s in folding.segments for n in s.nodes}
    leaves = {s.leave: s for s in folding.segments}
    enters = {s.enter for s in folding.segments}
    new, env = fx.Graph(), {}

    def call(made: Body, given: Any, path: str, node: fx.Node) -> None:
        def source(kind: str, value: Any) -> fx.Node:
            if kind == "argument":
                return env[given[value]]
            return env[holders[f"{path}.{value}"] if kind == "relative" else value]

        args = tuple(source(*s) for s in made.sources)
        env[node] = new.call_module(folding.block_of[made.text], args)
        env[node].meta.update(val=node.meta["val"], path=path)

    for node in graph.nodes:
        if node in inside or node in enters:
            continue
        if node in leaves:
            segment = leaves[node]
            call(folding.bodies[segment.call], segment.enter.args[0], segment.path, node)  # type: ignore
        elif node.target is BLOCK:
            name = str(node.args[1])
            call(folding.first[name.split("#")[0]], node.args[0], folding.paths[name], node)
        else:
            env[node] = new.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
    new.eliminate_dead_code(lambda n: is_impure(n) and n.op != "placeholder" or n.meta.get("kind") == "input")
    rename(new)
    for i, node in enumerate(n for n in new.nodes if n.op == "call_module"):
        node.name = f"call_{i}"
    return new
