"""The parts a program runs in (a block, what comes before, between and after blocks): their seconds and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from autopar.cluster import AxisLink, Device
from autopar.cost import apart, collective, compute, context
from autopar.cost.mixture import is_mixture, scratch
from autopar.cost.operators import kept_by, local_shapes
from autopar.cost.precision import Precision
from autopar.cost.values import (
    Value,
    flows,
    is_view,
    local_numel,
    parameter,
    reads,
    stored,
    tensor,
    tensors,
    value,
)
from autopar.ir.attention import cores
from autopar.ir.program import OUTER, Program
from autopar.sharding.placement import Placement, R
from autopar.sharding.redistribute import collective as collective_of
from autopar.sharding.redistribute import grad_placement, moves
from autopar.sharding.strategy import Strategy

RECOMPUTE = ("none", "selective", "full")
CUSTOM = "custom_"
"""What names of selections begin with: ``custom_1`` keeps most."""


class Placed(Protocol):
    """Which strategy every node has."""

    @property
    def degree(self) -> int: ...
    def of(self, graph: str, node: fx.Node) -> Strategy: ...
    def placement(self, program: Program, graph: str, v: Value) -> Placement: ...


@dataclass(frozen=True)
class Prices:
    """What times are computed from: one device, the links of the tensor axis and of cp (None: nothing is split over it),
    and the step's dtypes."""

    device: Device
    link: AxisLink
    precision: Precision
    context: AxisLink | None = None


@dataclass(frozen=True)
class Region:
    """One part, once forward and backward for one micro-batch on one device.

    Seconds: ``forward``, ``backward_input``, ``backward_weight`` of compute; ``forward_talk`` and ``backward_talk`` of
    collectives over tp. By recompute (none, selective, full, and selections of a block): ``saved``, bytes held from
    forward to backward; ``again`` and ``again_talk``, seconds of computing and of collectives once more; ``working``,
    bytes at the peak while the part runs, beside what is saved. Of a backward in two parts (`autopar.cost.apart`):
    ``waiting``, bytes held between them beside what is saved; ``freed``, bytes of what is saved that are not; ``groups`` of
    weights and ``steps`` of autograd's graph.
    """

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    forward_talk: float = 0.0
    backward_talk: float = 0.0
    saved: tuple[float, ...] = (0.0, 0.0, 0.0)
    again: tuple[float, ...] = (0.0, 0.0, 0.0)
    again_talk: tuple[float, ...] = (0.0, 0.0, 0.0)
    working: tuple[float, ...] = (0.0, 0.0, 0.0)
    waiting: float = 0.0
    freed: float = 0.0
    groups: int = 0
    steps: int = 0


class Measure:
    """Walks over some nodes of one graph and adds up. ``shared``: placeholders whose value all instances share."""

    def __init__(
        self, program: Program, name: str, nodes: Sequence[fx.Node], placed: Placed, prices: Prices,
        shared: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.program, self.name, self.placed, self.prices, self.shared = program, name, placed, prices, shared
        self.nodes = [n for n in nodes if n.op == "call_function" and value(n)[0] is n]
        self.inside = set(self.nodes)
        self.degree = placed.degree
        self.size = prices.precision.itemsize
        self.where: dict[Value, Placement] = {}
        self.roots: dict[tuple[Value, Placement], tuple[Value, Placement]] = {}
        self.moved: dict[tuple, tuple[float, float, set[fx.Node]]] | None = None
        self.times = {n: self.seconds(n) for n in self.nodes}
        self.over_cp = {n: self.exchanged(n) for n in self.nodes if context.over_cp(n)}

    # ---------------------------------------------------------------- basics

    def seconds(self, node: fx.Node) -> compute.Seconds:
        s, p = self.placed.of(self.name, node), self.prices
        return compute.node_seconds(node, s.inputs, s.outputs, self.degree, p.precision, p.device)

    def local_bytes(self, node: fx.Node) -> tuple[list[float], float]:
        """Bytes of a node's operands and of its first result on one device."""
        s = self.placed.of(self.name, node)
        sizes = [self.bytes(v, p) for v, p in zip(reads(node), s.inputs, strict=True)]
        return sizes, self.bytes((node, 0), s.outputs[0])

    def exchanged(self, node: fx.Node) -> tuple[float, float]:
        """Seconds, forward and backward, that a node's exchanges over cp show."""
        took = self.times[node]
        both, p = (took.forward, took.backward), self.prices
        return context.talk(node, *self.local_bytes(node), p.context, both, p.device)

    def at(self, v: Value) -> Placement:
        if v not in self.where:
            self.where[v] = self.placed.placement(self.program, self.name, v)
        return self.where[v]

    def bytes(self, v: Value, placement: Placement) -> float:
        return float(local_numel(v, placement, self.degree) * self.size(tensor(v).dtype))

    # ---------------------------------------------------------------- collectives

    def talks(self) -> dict[tuple, tuple[float, float, set[fx.Node]]]:
        """Every move of the region: (value, wanted, gradient) → seconds forward, backward, and its readers."""
        if self.moved is not None:
            return self.moved
        found: dict[tuple, tuple[float, float, set[fx.Node]]] = {}
        for node in self.nodes:
            s = self.placed.of(self.name, node)
            back = any(flows((node, i)) for i in range(len(tensors(node))))
            for v, q in zip(reads(node), s.inputs, strict=True):
                g = grad_placement(q, s.replicated) if back and flows(v) else None
                at = (v, q, g)
                if at not in found:
                    found[at] = (*self.move(v, q, g), set())
                found[at][2].add(node)
        self.moved = found
        return found

    def move(self, v: Value, q: Placement, g: Placement | None) -> tuple[float, float]:
        done = moves(self.at(v), q, g)
        if done is None:
            raise AssertionError(f"{v[0].name} cannot go from {self.at(v)} to {q}")
        size, link = tensor(v).numel() * self.size(tensor(v).dtype), self.prices.link
        once = done.forward == "none" and v[0].op == "placeholder" and v[0].meta["kind"] == "parameter"
        backward = 0.0 if once else collective.seconds(done.backward, size, link)
        return collective.seconds(done.forward, size, link), backward

    # ---------------------------------------------------------------- what is held

    def root(self, v: Value, q: Placement) -> tuple[Value, Placement]:
        """The tensor whose memory a reader keeps: a moved copy, or what the value is a view of."""
        if (v, q) not in self.roots:
            self.roots[v, q] = self.find_root(v, q)
        return self.roots[v, q]

    def find_root(self, v: Value, q: Placement) -> tuple[Value, Placement]:
        if collective_of(self.at(v), q) not in ("none", "slice"):
            return v, q
        while is_view(v[0]) and v[0] in self.inside:
            source = reads(v[0])[0]
            s = self.placed.of(self.name, v[0])
            if collective_of(self.at(source), s.inputs[0]) not in ("none", "slice"):
                return source, s.inputs[0]
            v = source
        return v, self.at(v)

    def held(self, nodes: Iterable[fx.Node]) -> tuple[dict[tuple[Value, Placement], float], float]:
        """What these nodes keep: distinct tensors with their bytes, and the bytes of masks and statistics."""
        found: dict[tuple[Value, Placement], float] = {}
        extra = 0.0
        for node in nodes:
            kept, s, given = kept_by(node), self.placed.of(self.name, node), reads(node)
            keys = [self.root(given[i], s.inputs[i]) for i in kept.operands]
            keys += [self.root((node, i), s.outputs[i]) for i in kept.outputs]
            for v, p in keys:
                if not stored(v) and not self.is_shared(v):
                    found[v, p] = self.bytes(v, p)
            extra += kept.ratio * sum(self.bytes(given[i], s.inputs[i]) for i in kept.like)
            if kept.extra:
                extra += (
                    kept.extra * local_numel((node, 0), s.outputs[0], self.degree) / max(1, tensors(node)[0].numel())
                )
        return found, extra

    def is_shared(self, v: Value) -> bool:
        return v[0].op == "placeholder" and (v[0].name in self.shared or self.name == "program")

    def given(self) -> dict[tuple[Value, Placement], float]:
        """The activations handed in: what a wholly recomputed block keeps."""
        found = {}
        for node in self.nodes:
            for v in reads(node):
                if v[0] not in self.inside and not stored(v) and not self.is_shared(v):
                    found[v, self.at(v)] = self.bytes(v, self.at(v))
        return found

    # ---------------------------------------------------------------- recompute

    def core(self) -> set[fx.Node]:
        """The attention cores (Korthikanti et al. 2022, section 5): what selective recompute runs again."""
        if not self.nodes or self.name == OUTER:
            return set()
        return {n for found in cores(self.nodes[0].graph) for n in found.nodes} & self.inside

    def needed(self, region: set[fx.Node], wanted: Iterable[Value]) -> set[fx.Node]:
        """The nodes of a recomputed region that run again: those that what is kept depends on (torch's checkpoint stops
        as soon as it has everything)."""
        found: set[fx.Node] = set()
        stack = [v[0] for v in wanted if v[0] in region]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += [u for u, _ in reads(node) if u in region and u not in found]
        return found

    def selective(self) -> tuple[float, float, float, float]:
        """(bytes kept, seconds computing again, seconds talking again, bytes kept by the core while it runs again)."""
        core = self.core()
        whole, extra = self.held(self.nodes)
        if not core:
            return sum(whole.values()) + extra, 0.0, 0.0, 0.0
        outside, rest = self.held([n for n in self.nodes if n not in core])
        inside, mask = self.held(core)
        for node in core:
            for v, q in zip(reads(node), self.placed.of(self.name, node).inputs, strict=True):
                if v[0] not in core and not stored(v) and not self.is_shared(v):
                    key = self.root(v, q)
                    if key[0][0] not in core:
                        outside[key] = self.bytes(*key)
        run = self.needed(core, [v for v, _ in inside])
        again = sum(self.times[n].forward for n in run)
        talk = sum(f for f, _, readers in self.talks().values() if readers & run)
        talk += sum(self.over_cp[n][0] for n in run if n in self.over_cp)
        interior = sum(b for k, b in inside.items() if k not in outside) + mask
        return sum(outside.values()) + rest, again, talk, interior

    def region(self, last: bool = False) -> Region:
        """All of it. ``last``: a pipeline ends with it."""
        talks = self.talks()
        whole, extra = self.held(self.nodes)
        none = sum(whole.values()) + extra
        selective, s_again, s_talk, interior = self.selective()
        run = self.needed(self.inside, [v for v, _ in whole])
        full = sum(self.given().values())
        working = self.working(set(whole))
        times = self.times.values()
        f_again = sum(self.times[n].forward for n in run)
        f_talk = sum(f for f, _, readers in talks.values() if readers & run)
        f_talk += sum(self.over_cp[n][0] for n in run if n in self.over_cp)
        return Region(
            forward=sum(t.forward for t in times),
            backward_input=sum(t.backward_input for t in times) + self.accumulation(),
            backward_weight=sum(t.backward_weight for t in times),
            forward_talk=sum(f for f, _, _ in talks.values()) + sum(f for f, _ in self.over_cp.values()),
            backward_talk=sum(b for _, b, _ in talks.values()) + sum(b for _, b in self.over_cp.values()),
            saved=(none, min(selective, none), min(full, selective, none)),
            again=(0.0, s_again, f_again),
            again_talk=(0.0, s_talk, f_talk),
            working=(working, working + interior, working + none),
            waiting=apart.waiting(self),
            freed=apart.freed(self) if last else 0.0,
            groups=apart.groups(self),
            steps=apart.steps(self),
        )

    def accumulation(self) -> float:
        """Seconds of adding up the gradients of values that several nodes read."""
        total = 0.0
        for v, count in self.gradients().items():
            if count > 1 and parameter(v) is None:
                total += (count - 1) * compute.moving(self.prices.device, 3 * self.bytes(v, self.at(v)))
        return total

    def gradients(self) -> dict[Value, int]:
        counts: dict[Value, int] = {}
        for node in self.nodes:
            if any(flows((node, i)) for i in range(len(tensors(node)))):
                for v in reads(node):
                    if flows(v):
                        counts[v] = counts.get(v, 0) + 1
        return counts

    # ---------------------------------------------------------------- the peak while running

    def working(self, kept: set[tuple[Value, Placement]]) -> float:
        """Bytes at the peak of the forward and of the backward beside what is saved, by liveness."""
        return max(self.forward_peak({v for v, _ in kept}), self.backward_peak())

    def forward_peak(self, kept: set[Value]) -> float:
        last: dict[Value, int] = {}
        for i, node in enumerate(self.nodes):
            for v, q in zip(reads(node), self.placed.of(self.name, node).inputs, strict=True):
                root = self.root(v, q)[0]
                if root[0] in self.inside:
                    last[root] = i
        return self.peak(self.nodes, last, lambda v: v not in kept and not is_view(v[0]))

    def peak(self, order: Sequence[fx.Node], last: dict[Value, int], counts: Callable[[Value], bool]) -> float:
        live, top, ends = 0.0, 0.0, {}
        for i, node in enumerate(order):
            for k in range(len(tensors(node))):
                v = (node, k)
                if counts(v):
                    size = self.bytes(v, self.at(v))
                    live += size
                    ends.setdefault(last.get(v, i), []).append(size)
            top = max(top, live + self.scratch(node)[0])
            live -= sum(ends.pop(i, []))
        return top

    def scratch(self, node: fx.Node) -> tuple[float, float]:
        """Bytes of a node's own while it runs, forward and backward."""
        if node in self.over_cp:
            return context.buffers(node, *self.local_bytes(node))
        if not is_mixture(node):
            return 0.0, 0.0
        shapes, _ = local_shapes(node, self.placed.of(self.name, node).inputs, (), self.degree)
        return scratch(node, shapes, self.size(tensors(node)[0].dtype))

    def backward_peak(self) -> float:
        """Gradients live from the first reader (in backward order) until their maker has used them."""
        live, top, alive = 0.0, 0.0, {}
        for node in reversed(self.nodes):
            if not any(flows((node, i)) for i in range(len(tensors(node)))):
                continue
            for v in [*((node, i) for i in range(len(tensors(node)))), *reads(node)]:
                if flows(v) and parameter(v) is None and v not in alive:
                    alive[v] = self.bytes(v, self.at(v))
                    live += alive[v]
            top = max(top, live + self.scratch(node)[1])
            if not is_view(node):
                live -= sum(alive.pop((node, i), 0.0) for i in range(len(tensors(node))))
            else:
                live -= alive.pop((node, 0), 0.0)
        return top


def needs_reduction(program: Program, name: str, node: fx.Node, placed: Placed) -> bool:
    """Whether a whole parameter's gradient comes out as a partial sum along tp: reduced once a step."""
    if not flows((node, 0)) or placed.placement(program, name, (node, 0)) != R:
        return False
    for user in node.users:
        if user.op == "call_function":
            s = placed.of(name, user)
            for v, q in zip(reads(user), s.inputs, strict=True):
                if v == (node, 0) and q == R and not s.replicated:
                    return True
    return False
