"""What every part of a program costs under one assignment and micro-batch: the profile that stages are cut from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from autopar.cost import collective
from autopar.cost.compute import model_flops
from autopar.cost.regions import Measure, Prices, Region, needs_reduction
from autopar.cost.saving import Selection
from autopar.cost.values import Value, flows, is_view, local_numel, parameter, reads, stored, tensor, tensors, value
from autopar.ir.program import OUTER, Program
from autopar.sharding.redistribute import grad_placement, moves
from autopar.solve.assignment import Assignment, placeholders
from autopar.solve.saving import recomputing

SHARED = -2
BEFORE = -1
"""Positions of outer nodes: computed in every stage, before the first block; k is with block k, n after the last."""


@dataclass(frozen=True)
class Held:
    """Parameters on one device along tp: elements trained and frozen, and elements of partial gradients."""

    trained: int = 0
    frozen: int = 0
    partial: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(self.trained + other.trained, self.frozen + other.frozen, self.partial + other.partial)

    @property
    def all(self) -> int:
        return self.trained + self.frozen


@dataclass(frozen=True)
class Profile:
    """One program under one assignment and micro-batch.

    ``kinds[i]`` is the block of call i; ``regions`` and ``holds`` are of each distinct block; ``outer[k]`` is what runs at a
    position of the outer graph, ``loose`` the parameters read there with the positions that read them; ``cuts[i]`` is
    the bytes sent from call i to call i + 1; ``shared_bytes`` what every stage keeps of masks and tables. ``selections``: of
    each distinct block, what may be made again beside the attention core and all; its region has their bytes and seconds
    behind those of none, selective and full.
    """

    kinds: tuple[str, ...]
    regions: dict[str, Region]
    holds: dict[str, Held]
    outer: dict[int, Region]
    loose: tuple[tuple[Held, frozenset[int]], ...]
    cuts: tuple[float, ...]
    shared_bytes: float
    flops: float
    selections: dict[str, tuple[Selection, ...]] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(self.kinds)


def profile(
    program: Program, assignment: Assignment, prices: Prices, given: Mapping[str, tuple[Selection, ...]] | None = None
) -> Profile:
    """Measure every distinct block once, and the outer graph in its parts. ``given``: the selections of recompute to
    price, instead of the best ones."""
    calls = program.calls()
    where = positions(program)
    shared, measured = common(program), {}
    for name, graph in program.blocks.items():
        measured[name] = Measure(program, name, list(graph.nodes), assignment, prices, shared.get(name, frozenset()))
    regions, selections = recomputing(measured, given)
    outer = {}
    for k in sorted({p for p in where.values()}):
        nodes = [n for n in program.graph.nodes if where.get(n) == k]
        outer[k] = Measure(program, OUTER, nodes, assignment, prices).region(last=k == len(calls))
    kinds = tuple(str(c.target) for c in calls)
    talks = [entering(program, c, assignment, prices) for c in calls]
    for k, (forward, backward) in enumerate(talks):
        if forward or backward:
            outer[k - 1 if k else BEFORE] = added(outer.get(k - 1 if k else BEFORE, Region()), forward, backward)
    return Profile(
        kinds=kinds,
        regions=regions,
        holds={name: block_parameters(program, name, assignment) for name in program.blocks},
        outer=outer,
        loose=loose(program, assignment, where),
        cuts=cuts(program, assignment, where, prices),
        shared_bytes=shared_bytes(program, assignment, where, prices),
        flops=total_flops(program),
        selections=selections,
    )


def added(region: Region, forward: float, backward: float) -> Region:
    """The region with more seconds of talking."""
    values = dict(vars(region))
    values["forward_talk"] += forward
    values["backward_talk"] += backward
    return Region(**values)


# ------------------------------------------------------------------ where outer nodes run


def positions(program: Program) -> dict[fx.Node, int]:
    """The position of every operator of the outer graph."""
    found: dict[fx.Node, int] = {}
    free: set[fx.Node] = set()  # depends on batch inputs, buffers and constants alone
    calls = 0
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.meta["kind"] != "parameter":
                free.add(node)
        elif node.op == "call_module":
            calls += 1
        elif node.op == "call_function":
            if all(n in free for n in node.all_input_nodes):
                free.add(node)
                found[node] = SHARED
            elif value(node)[0] is node:
                found[node] = calls - 1 if calls else BEFORE
    last = calls - 1
    if not calls:
        return {n: BEFORE if k == SHARED else k for n, k in found.items()}
    return {n: calls if k == last else k for n, k in found.items()}


def common(program: Program) -> dict[str, frozenset[str]]:
    """Placeholders of each block that get the same value in all its calls: masks, rotary tables."""
    seen: dict[tuple[str, str], set[Value]] = {}
    counts: dict[str, int] = {}
    for call in program.calls():
        counts[str(call.target)] = counts.get(str(call.target), 0) + 1
        for place, v in zip(placeholders(program.blocks[str(call.target)]), reads(call), strict=True):
            seen.setdefault((str(call.target), place.name), set()).add(v)
    found: dict[str, set[str]] = {}
    for (name, place), values in seen.items():
        if len(values) == 1 and counts[name] > 1:
            found.setdefault(name, set()).add(place)
    return {k: frozenset(v) for k, v in found.items()}


def entering(program: Program, call: fx.Node, assignment: Assignment, prices: Prices) -> tuple[float, float]:
    """Seconds, forward and backward, of bringing a call's arguments to where its block wants them."""
    forward = backward = 0.0
    body = str(call.target)
    for place, v in zip(placeholders(program.blocks[body]), reads(call), strict=True):
        if stored(v) or place.meta["kind"] != "input":
            continue
        here = assignment.placement(program, OUTER, v)
        wanted = assignment.of(body, place).outputs[0]
        gradient = grad_placement(wanted, True) if flows(v) and flows((place, 0)) else None
        done = moves(here, wanted, gradient)
        if done is None:
            raise AssertionError(f"{v[0].name} cannot go from {here} to {wanted}")
        size = tensor(v).numel() * prices.precision.itemsize(tensor(v).dtype)
        forward += collective.seconds(done.forward, size, prices.link)
        backward += collective.seconds(done.backward, size, prices.link)
    return forward, backward


# ------------------------------------------------------------------ parameters


def block_parameters(program: Program, name: str, assignment: Assignment) -> Held:
    """What one instance of a block owns: the parameters that no other call reads."""
    calls = [c for c in program.calls() if str(c.target) == name]
    if not calls:
        return Held()
    total = Held()
    for place, argument in zip(placeholders(program.blocks[name]), calls[0].args, strict=True):
        if place.meta["kind"] == "parameter" and isinstance(argument, fx.Node) and len(argument.users) == 1:
            total = total + held(program, name, place, assignment)
    return total


def held(program: Program, name: str, node: fx.Node, assignment: Assignment) -> Held:
    count = local_numel((node, 0), assignment.placement(program, name, (node, 0)), assignment.degree)
    if not node.meta.get("requires_grad"):
        return Held(frozen=count)
    partial = count if needs_reduction(program, name, node, assignment) else 0
    return Held(trained=count, partial=partial)


def loose(
    program: Program, assignment: Assignment, where: dict[fx.Node, int]
) -> tuple[tuple[Held, frozenset[int]], ...]:
    """Parameters outside of blocks, or of several calls, and the positions that read them."""
    index = {call: i for i, call in enumerate(program.calls())}
    found = []
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.meta["kind"] != "parameter":
            continue
        if len(node.users) == 1 and next(iter(node.users)) in index:
            continue
        readers = frozenset(index.get(u, where.get(u, BEFORE)) for u in through_views(node))
        found.append((held(program, OUTER, node, assignment), readers or frozenset({BEFORE})))
    return tuple(found)


def through_views(node: fx.Node) -> list[fx.Node]:
    """Who reads a parameter, itself or a view or cast of it."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.op == "call_function" and parameter((user, 0)) is not None:
            found += through_views(user)
        elif user.op != "output":
            found.append(user)
    return found


# ------------------------------------------------------------------ what crosses


def cuts(program: Program, assignment: Assignment, where: dict[fx.Node, int], prices: Prices) -> tuple[float, ...]:
    """Bytes that are alive between call i and call i + 1, as they are placed along tp."""
    calls = program.calls()
    index = {call: i for i, call in enumerate(calls)}
    totals = [0.0] * max(0, len(calls) - 1)
    last: dict[Value, int] = {}
    for node in program.graph.nodes:
        at = index.get(node, where.get(node))
        if node.op == "output" or at is None or at == SHARED:
            continue
        for v in reads(node):
            last[v] = max(last.get(v, BEFORE), at)
    for v, end in last.items():
        node = v[0]
        start = index.get(node, where.get(node, SHARED))
        if node.op == "placeholder" or start == SHARED or parameter(v) is not None:
            continue  # every stage has what is made of its own parameters
        count = local_numel(v, assignment.placement(program, OUTER, v), assignment.degree)
        size = count * prices.precision.itemsize(tensor(v).dtype)
        for i in range(max(start, 0), min(end, len(totals))):
            totals[i] += size
    return tuple(totals)


def shared_bytes(program: Program, assignment: Assignment, where: dict[fx.Node, int], prices: Prices) -> float:
    """Bytes of masks and tables that blocks read: held for as long as a micro-batch is."""
    total = 0.0
    seen: set[fx.Node] = set()
    for call in program.calls():
        for v in reads(call):
            node = v[0]
            while is_view(node) and reads(node):
                node = reads(node)[0][0]
            if where.get(node) == SHARED and node not in seen:
                seen.add(node)
                for i in range(len(tensors(node))):
                    placed = assignment.placement(program, OUTER, (node, i))
                    count = local_numel((node, i), placed, assignment.degree)
                    total += count * prices.precision.itemsize(tensor((node, i)).dtype)
    return total


def total_flops(program: Program) -> float:
    """The model's own FLOPs of one micro-batch, forward and backward, on one device holding everything."""
    counts: dict[str, int] = {}
    for call in program.calls():
        counts[str(call.target)] = counts.get(str(call.target), 0) + 1
    return sum(
        (1 if name == OUTER else counts.get(name, 0)) * sum(model_flops(n) for n in graph.nodes)
        for name, graph in program.graphs()
    )
