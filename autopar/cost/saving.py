"""What a block may keep for its backward pass or make again there, as a problem of choice: tensors, steps, what needs what.

A *tensor* is one storage: views of it are the same tensor. A *step* is an operator (or a collective) that makes tensors. Who
keeps a tensor pays its bytes; who makes it again pays its step's seconds once, and needs what the step reads:

    kept[t] or again[step of t]              for every tensor t that the backward pass reads
    kept[t] or again[step of t] ≥ again[s]   for every tensor t that step s reads
    bytes = Σ bytes[t] · kept[t] + Σ inner[s] · (1 - again[s]),   seconds = Σ seconds[s] · again[s]

``inner``: what autograd keeps of a step beside its operands and results (masks, statistics of norms).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from torch import fx

from autopar.cost.operators import kept_by
from autopar.cost.regions import Measure
from autopar.cost.values import Value, is_view, local_numel, reads, stored, tensors
from autopar.ir.groups import allowed
from autopar.sharding.placement import P, Placement
from autopar.sharding.redistribute import collective as collective_of

Key = tuple[Value, Placement]


@dataclass(frozen=True)
class Tensor:
    """``step``: the one that makes it, None for what the block is given. ``wanted``: the backward pass reads it."""

    name: str
    bytes: float
    step: int | None = None
    wanted: bool = False
    keepable: bool = True


@dataclass(frozen=True)
class Step:
    """``reads``: tensors. ``may``: whether it may run again at all. ``made``: bytes of its results, while it runs again."""

    name: str
    seconds: float
    reads: tuple[int, ...] = ()
    inner: float = 0.0
    may: bool = True
    made: float = 0.0


@dataclass(frozen=True)
class Selection:
    """What runs again, and what that comes to. ``kept``: names of the tensors kept; ``interior``: bytes of what is made
    again; ``talk``: the part of ``seconds`` that is collectives."""

    again: frozenset[str]
    kept: tuple[str, ...]
    bytes: float
    seconds: float
    talk: float = 0.0
    interior: float = 0.0


@dataclass
class Saving:
    """The problem of one block. Steps whose name has a ``>`` are collectives (``x>R``: x brought to R)."""

    tensors: list[Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def selection(self, again: Set[str]) -> Selection | None:
        """What comes of running ``again`` once more, everything else kept that is needed; None where that is impossible."""
        runs = {i for i, s in enumerate(self.steps) if s.name in again}
        needed = {t for i in runs for t in self.steps[i].reads} | {t for t, x in enumerate(self.tensors) if x.wanted}
        kept = [t for t in sorted(needed) if self.tensors[t].step not in runs]
        if any(not self.tensors[t].keepable for t in kept) or any(not self.steps[i].may for i in runs):
            return None
        inner = sum(s.inner for i, s in enumerate(self.steps) if i not in runs)
        return Selection(
            again=frozenset(self.steps[i].name for i in runs),
            kept=tuple(self.tensors[t].name for t in kept),
            bytes=sum(self.tensors[t].bytes for t in kept) + inner,
            seconds=sum(self.steps[i].seconds for i in runs),
            talk=sum(self.steps[i].seconds for i in runs if ">" in self.steps[i].name),
            interior=sum(self.steps[i].made + self.steps[i].inner for i in runs),
        )


def saving(measure: Measure) -> Saving:
    """The problem of what ``measure`` walks over."""
    return Reader(measure).saving()


class Reader:
    """Reads tensors and steps off a measured block."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        graph = measure.nodes[0].graph if measure.nodes else fx.Graph()
        self.may = allowed(measure.program, measure.name, graph)
        self.found = Saving()
        self.index: dict[Key, int] = {}
        self.pending: dict[str, int] = {}
        self.wanted = set(measure.held(measure.nodes)[0])
        self.moves = {(v, q): f for (v, q, _), (f, _, _) in measure.talks().items()}
        self.changed = any(mutable(n) for n in measure.nodes)

    def saving(self) -> Saving:
        for node in self.measure.nodes:
            if not is_view(node):
                self.step(node)
        for key in self.wanted:
            self.tensor(key)
        return self.found

    def step(self, node: fx.Node) -> int | None:
        """The step of an operator; parameters and what is made of them alone is always there."""
        if node.name in self.pending:
            return self.pending[node.name]
        if node not in self.measure.inside or all(stored((node, i)) for i in range(len(tensors(node)))):
            return None
        m, s = self.measure, self.measure.placed.of(self.measure.name, node)
        roots = [m.root(v, q) for v, q in zip(reads(node), s.inputs, strict=True) if not stored(v)]
        operands = [k for k in roots if not self.always(k[0])]
        kept = kept_by(node)
        inner = sum(m.bytes(reads(node)[i], s.inputs[i]) for i in kept.like)
        if kept.extra:
            inner += kept.extra * local_numel((node, 0), s.outputs[0], m.degree) / max(1, tensors(node)[0].numel())
        made = sum(m.bytes((node, i), s.outputs[i]) for i in range(len(tensors(node))))
        known = tuple(dict.fromkeys(self.tensor(k) for k in operands))
        return self.add(
            Step(node.name, m.times[node].forward, known, inner, self.repeats(node), made),
        )

    def repeats(self, node: fx.Node) -> bool:
        return node.name in self.may and not self.changed

    def add(self, step: Step) -> int:
        self.found.steps.append(step)
        self.pending[step.name] = len(self.found.steps) - 1
        return self.pending[step.name]

    def always(self, v: Value) -> bool:
        return stored(v) or self.measure.is_shared(v)

    def tensor(self, key: Key) -> int:
        if key in self.index:
            return self.index[key]
        m, (v, q) = self.measure, key
        here = m.at(v)
        if collective_of(here, q) not in ("none", "slice"):
            name, maker = f"{v[0].name}>{q}", self.move(v, q)
        else:
            name, maker = v[0].name, None if is_view(v[0]) else self.step(v[0])
        size = m.bytes(v, q)
        self.found.tensors.append(Tensor(name, size, maker, key in self.wanted, q != P or key in self.wanted))
        self.index[key] = len(self.found.tensors) - 1
        return self.index[key]

    def move(self, v: Value, q: Placement) -> int:
        """The step of a collective; what it brings together is made of the value as it lies."""
        name, m = f"{v[0].name}>{q}", self.measure
        if name in self.pending:
            return self.pending[name]
        root = m.root(v, m.at(v))
        operands = () if self.always(root[0]) else (self.tensor(root),)
        may = "communication" in self.may and not self.changed
        return self.add(Step(name, self.moves.get((v, q), 0.0), operands, may=may, made=m.bytes(v, q)))


def mutable(node: fx.Node) -> bool:
    """Whether an operator changes its operand: what runs again would find it changed."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
