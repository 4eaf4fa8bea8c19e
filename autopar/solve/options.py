"""What the ILP chooses between: the options of every node, and the edges on which values move from one to another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import fx

from autopar.cost.values import Value, dims, flows, is_view, reads, stored, tensor, tensors, value
from autopar.errors import PlanError, suggestion
from autopar.ir.program import OUTER, Program
from autopar.sharding.patterns import collect_patterns
from autopar.sharding.placement import P, Placement, R, parse
from autopar.sharding.redistribute import grad_placement
from autopar.sharding.rule import is_unsplit, strategies
from autopar.sharding.strategy import Strategy
from autopar.solve.assignment import Key, placeholders, results

Want = tuple[Placement, Placement | None]
"""How a reader wants a value, and how the gradient comes out of it (None: there is none)."""


@dataclass
class Item:
    """A node with options. ``weight``: how often it runs in one micro-batch."""

    key: Key
    node: fx.Node
    options: list[Strategy]
    weight: int


@dataclass(frozen=True)
class Reader:
    """Operand ``position`` of an item; for a block's placeholder (its options are where it lives) position -1."""

    item: Key
    position: int


@dataclass
class Edge:
    """A value, everything that reads it in one place, and in how many places that is the case."""

    producer: Key
    output: int
    value: Value
    readers: list[Reader]
    weight: int = 1
    gradient: bool = False
    once: bool = False  # a parameter stored whole: its partial gradients are reduced once a step, not per micro-batch


@dataclass
class Choices:
    """All items and edges of a program for one degree."""

    items: dict[Key, Item] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    unsplit: list[str] = field(default_factory=list)


def choices(
    program: Program, degree: int, sequence: bool | None = None, pinned: Mapping[str, str] | None = None
) -> Choices:
    """Items and edges of a static program on ``degree`` devices.

    ``sequence`` True: what flows from block to block must be split over the sequence; False: nothing may be split over it.
    ``pinned``: globs of parameters and where they must live. Raises `PlanError` where that is impossible.
    """
    found = Choices()
    counts: dict[str, int] = {}
    for call in program.calls():
        counts[str(call.target)] = counts.get(str(call.target), 0) + 1
    for name, graph in program.graphs():
        weight = 1 if name == OUTER else counts.get(name, 0)
        add_items(found, name, graph, degree, weight, sequence)
    add_edges(program, found, counts)
    add_placeholders(program, found, degree, sequence)
    if sequence:
        split_stream(program, found, degree)
    for glob, text in (pinned or {}).items():
        pin(program, found, degree, glob, parse(text))
    return found


def add_items(found: Choices, name: str, graph: fx.Graph, degree: int, weight: int, sequence: bool | None) -> None:
    """Operators with their strategies (placeholders follow, when their readers are known)."""
    patterns = collect_patterns(graph)
    whole = free(graph) if name == OUTER else set()
    for node in graph.nodes:
        if node.op == "call_function" and value(node)[0] is node and tensors(node):
            options = strategies(node, degree, patterns)
            options = options[:1] if node in whole else [s for s in options if allowed(node, s, sequence)]
            found.items[name, node.name] = Item((name, node.name), node, options, weight)
            if is_unsplit(node) and reads(node) and not is_view(node):
                found.unsplit.append(f"{name}.{node.name} ({node.target})")
        elif node.op == "placeholder" and not (name == OUTER and owned(node)):
            found.items[name, node.name] = Item((name, node.name), node, [], weight)
    if name == OUTER:
        out = graph.output_node()
        found.items[name, out.name] = Item((name, out.name), out, [Strategy((R,) * len(reads(out)), ())], 1)


def free(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on batch inputs, buffers and constants alone (masks, tables): every device makes them whole, and a
    shard is cut from them where it is wanted."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        held = node.op == "placeholder" and node.meta["kind"] != "parameter"
        if held or node.op == "call_function" and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def allowed(node: fx.Node, strategy: Strategy, sequence: bool | None) -> bool:
    """Whether no dim that depends on the batch is split (replicas and micro-batches do that), nor the sequence if not wanted."""
    outputs = [(node, i) for i in range(len(tensors(node)))]
    pairs = [*zip(reads(node), strategy.inputs, strict=False), *zip(outputs, strategy.outputs, strict=False)]
    return all(placeable(v, p, sequence) for v, p in pairs)


def placeable(v: Value, placement: Placement, sequence: bool | None) -> bool:
    if not placement.sharded:
        return True
    found = dims(v)
    depends = found[placement.dim] if placement.dim < len(found) else frozenset()
    return "batch" not in depends and not (sequence is False and "sequence" in depends)


# ------------------------------------------------------------------ edges


def producer(program: Program, graph: str, v: Value) -> tuple[Key, int, Value]:
    """The item that makes a value: for a block call's output, the node inside the block."""
    node, i = v
    if node.op == "call_module":
        body = str(node.target)
        return producer(program, body, results(program.blocks[body])[i])
    return (graph, node.name), i, v


def add_edges(program: Program, found: Choices, counts: dict[str, int]) -> None:
    """Group readers by the value they read; equal groups of different block instances are one edge with a weight."""
    grouped: dict[tuple, Edge] = {}
    for name, graph in program.graphs():
        weight = 1 if name == OUTER else counts.get(name, 0)
        for v, readers in readings(program, name, graph).items():
            if v[0].op == "placeholder" and name == OUTER and owned(v[0]):
                continue
            key, output, made = producer(program, name, v)
            if key not in found.items:
                continue
            at = (key, output, tuple((r.item, r.position) for r in readers), name == OUTER)
            if at in grouped:
                grouped[at].weight += weight
            else:
                grouped[at] = Edge(key, output, v, readers, weight, flows(v) or flows(made))
    found.edges = list(grouped.values())
    for edge in found.edges:
        node = found.items[edge.producer].node
        edge.once = node.op == "placeholder" and node.meta.get("kind") == "parameter"


def readings(program: Program, name: str, graph: fx.Graph) -> dict[Value, list[Reader]]:
    """Every value of a graph with its readers, in order."""
    found: dict[Value, list[Reader]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            body = str(node.target)
            for place, v in zip(placeholders(program.blocks[body]), reads(node), strict=True):
                found.setdefault(v, []).append(Reader((body, place.name), -1))
        elif node.op == "output" and name != OUTER or value(node)[0] is not node:
            continue
        elif node.op in ("call_function", "output"):
            for i, v in enumerate(reads(node)):
                found.setdefault(v, []).append(Reader((name, node.name), i))
    return found


def owned(node: fx.Node) -> bool:
    """Whether an outer placeholder belongs to one block call alone: it lives as the block wants it."""
    users = list(node.users)
    return node.meta["kind"] != "input" and len(users) == 1 and users[0].op == "call_module"


# ------------------------------------------------------------------ placeholders


def add_placeholders(program: Program, found: Choices, degree: int, sequence: bool | None) -> None:
    """Where placeholders may live: as one of their readers wants them; batch inputs, buffers and constants whole."""
    inner: dict[Key, list[Reader]] = {}
    for edge in found.edges:
        inner.setdefault(edge.producer, []).extend(edge.readers)
    pending = [i for i in found.items.values() if i.node.op == "placeholder"]
    for item in sorted(pending, key=lambda i: i.key[0] == OUTER):  # a block's own first: outer ones are read by them
        kind, graph = item.node.meta["kind"], item.key[0]
        options = {R: None}
        if kind == "parameter" or (kind == "input" and graph != OUTER):
            for reader in inner.get(item.key, []):
                for p in wants(found, reader):
                    options[p] = None
        if kind == "parameter":
            options.pop(P, None)
        item.options = [
            Strategy((), (p,)) for p in options if placeable((item.node, 0), p, sequence) and fits(item.node, p)
        ]


def pin(program: Program, found: Choices, degree: int, glob: str, placement: Placement) -> None:
    """Keep of the parameters that ``glob`` names only one option. Instances of a block share it: naming one pins all."""
    named = [(n, home(program, n)) for n in placeholders(program.graph) if fnmatchcase(str(n.meta["name"]), glob)]
    named = [(n, key) for n, key in named if n.meta["kind"] == "parameter" and key in found.items]
    if not named:
        raise PlanError(f"placements: no parameter is called '{glob}'{suggestion(glob, program.parameters)}")
    for node, key in named:
        item = found.items[key]
        kept = [s for s in item.options if s.outputs[0] == placement]
        if not kept:
            shape, known = list(tensor((node, 0)).shape), ", ".join(str(s.outputs[0]) for s in item.options)
            raise PlanError(
                f"placements: {node.meta['name']} of shape {shape} cannot be {placement} on tp={degree}; "
                f"it can be one of {known}"
            )
        item.options = kept


def home(program: Program, node: fx.Node) -> Key:
    """The item that says where an outer placeholder lives."""
    if not owned(node):
        return OUTER, node.name
    call = next(iter(node.users))
    body = str(call.target)
    return body, placeholders(program.blocks[body])[call.args.index(node)].name


def fits(node: fx.Node, placement: Placement) -> bool:
    return placement != P or tensor((node, 0)).is_floating_point()


def wants(found: Choices, reader: Reader) -> Iterator[Placement]:
    item = found.items[reader.item]
    for s in item.options:
        yield s.outputs[0] if reader.position < 0 else s.inputs[reader.position]


def wanted(item: Item, option: Strategy, position: int, gradient: bool) -> Want:
    """What an option asks of an edge. A block's placeholder hands gradients back as it stands: whole, or split alike."""
    q = option.outputs[0] if position < 0 else option.inputs[position]
    back = gradient and (position < 0 or gives_gradient(item.node))
    return q, grad_placement(q, position < 0 or option.replicated or item.node.op == "output") if back else None


def gives_gradient(node: fx.Node) -> bool:
    return node.op == "output" or any(flows((node, i)) for i in range(len(tensors(node))))


def split_stream(program: Program, found: Choices, degree: int) -> None:
    """Keep only options in which what flows from block to block is split over the sequence."""
    for call in program.calls():
        body = str(call.target)
        for place, v in zip(placeholders(program.blocks[body]), reads(call), strict=True):
            if v[0].op != "call_module" or not tensor((place, 0)).is_floating_point() or not flows(v):
                continue
            key, output, _ = producer(program, OUTER, v)
            if stored(v):
                continue
            keep_split(found.items[body, place.name], 0, degree)
            keep_split(found.items[key], output, degree)


def keep_split(item: Item, output: int, degree: int) -> None:
    def split(s: Strategy) -> bool:
        p = s.outputs[output]
        return p.sharded and "sequence" in dims((item.node, output))[p.dim]

    kept = [s for s in item.options if split(s)]
    if not kept:
        shape = tuple(tensor((item.node, output)).shape)
        raise PlanError(
            f"sequence_parallel: true is impossible with tp={degree}: {item.key[1]} of shape {list(shape)} cannot be "
            f"split over the sequence; leave the pin out, or take a length that {degree} divides"
        )
    item.options = kept
