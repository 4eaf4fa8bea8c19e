"""What the search asks about plans that split sequences over cp: a `Source` of the program of one device along cp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from autopar.cluster import Cluster
from autopar.cost.regions import Prices
from autopar.cost.saving import Selection
from autopar.errors import PlanError
from autopar.ir.context import KINDS, RING
from autopar.ir.program import Program
from autopar.plan.plan import Choice, Context, MeshShape, Plan
from autopar.sharding.context import grows, nature, zigzags
from autopar.sharding.part import part_of
from autopar.solve.assignment import Assignment, from_choices
from autopar.solve.blocks import Profile, total_flops
from autopar.solve.context import assign_context
from autopar.solve.pipeline import Blocks, Candidate, Setting
from autopar.solve.prepare import Made, Source, priced
from autopar.solve.space import divisors
from autopar.spec.job import Job

LEAST = 1024
"""Positions that a device along cp gets at least where cp is not pinned: fewer make operators so small that they wait."""
LONG = 32768
"""Length from which cp > 1 is weighed where it is not pinned. Below it the activations of one sequence fit a device, along
tp or with recompute, and what cp divides replicas divide without its traffic."""


class PartSource(Source):
    """Caches of one job for plans with ``cp`` devices along cp, whose attention is computed as ``kind`` says."""

    def __init__(self, base: Contexts, cp: int, kind: str, chosen: Assignment | None = None) -> None:
        self.base, self.cp, self.kind = base, cp, kind
        whole = base.static(1 if base.resizes else base.least_batch)
        self.zigzag = zigzags(whole, cp)
        key = (priced(base.prices(1, cp)),)
        make = lambda: assign_context(whole, cp, kind, base.prices(1, cp), base.job.search.seconds)  # noqa: E731
        self.fixed = chosen is not None
        self.chosen = chosen or base.remembered("context", (cp, kind, *key), make)
        super().__init__(self.part, base.cluster, base.setting, base.job)

    def part(self, batch: int) -> Program:
        return part_of(self.base.static(batch), self.chosen.strategies, self.cp, self.zigzag)

    def remembered(self, kind: str, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """As the base's, under names of its own; not where the assignment along cp is given from outside."""
        return (
            make()
            if self.fixed
            else self.base.remembered(kind, (self.cp, self.kind, priced(self.prices(1)), *key), make)
        )

    def given(self, tp: int, variant: str, batch: int) -> dict[str, tuple[Selection, ...]] | None:
        """No selections of recompute: what goes over cp is made again with the whole core or the whole block."""
        return {}

    def prices(self, tp: int, cp: int | None = None) -> Prices:
        return self.base.prices(tp, cp or self.cp)

    def profile_of(self, tp: int, variant: str, batch: int) -> Profile:
        made = super().profile_of(tp, variant, batch)
        return replace(made, flops=total_flops(self.base.static(batch)))

    @property
    def attention(self) -> str:
        """How attention is computed: empty where keys and values are gathered, for it is no one operator."""
        kinds = {s.special for s in self.chosen.strategies.values() if s.special}
        return self.kind if self.kind in kinds else next(iter(sorted(kinds)), "")

    def context(self, microbatch: int) -> Context:
        """The plan's record of it."""
        program = self.base.static(microbatch)
        held: dict[str, dict[str, Choice]] = {}
        for (graph, node), s in self.chosen.strategies.items():
            choice = Choice(inputs=tuple(map(str, s.inputs)), outputs=tuple(map(str, s.outputs)), special=s.special)
            held.setdefault(graph, {})[node] = choice
        whole = []
        for name, graph in program.graphs():
            free = nature(name, graph).whole
            for node in graph.nodes:
                s = self.chosen.strategies.get((name, node.name))
                if node.op == "call_function" and s and s.replicated and node not in free and grows(node):
                    whole.append(f"{name}.{node.name} ({node.target})")
        return Context(attention=self.attention, zigzag=self.zigzag, choices=held, whole=tuple(whole))


class Contexts(Source):
    """A job's caches, with those of the plans that split sequences beside them."""

    def __init__(
        self, program: Program | Callable[[int], Program], cluster: Cluster, setting: Setting, job: Job
    ) -> None:
        super().__init__(program, cluster, setting, job)
        self.resizes = not isinstance(program, Program) or bool(program.sizes)
        self.parts: dict[tuple[int, str], PartSource] = {}
        self.known: dict[int, list[str]] = {1: [""]}

    def prices(self, tp: int, cp: int = 1) -> Prices:
        made = super().prices(tp)
        link = self.cluster.axis_link(MeshShape(tp=tp, cp=cp), "cp") if cp > 1 else None
        return replace(made, context=link)

    def degrees(self) -> list[int]:
        """Degrees of cp that are weighed: the pinned one; where lengths are long, or pins leave devices to nothing else,
        those that divide the length and leave a device enough of it."""
        if self.pins.cp:
            return [self.fitting(self.pins.cp)]
        left = self.cluster.devices // ((self.pins.tp or 1) * (self.pins.pp or 1) * (self.pins.dp or 1))
        alone = all((self.pins.tp, self.pins.pp, self.pins.dp)) and left > 1
        if alone:
            return [self.fitting(left)]
        if self.length < LONG:
            return [1]
        most = self.length // LEAST
        return [
            1,
            *(2**k for k in range(1, 12) if left % 2**k == 0 and 2**k <= most and self.length % 2 ** (k + 1) == 0),
        ]

    def fitting(self, cp: int) -> int:
        """``cp`` itself. Raises `PlanError` where it does not divide the length."""
        if self.length % cp:
            near = next(n for n in range(self.length, self.length + cp) if n % cp == 0)
            raise PlanError(
                f"cp={cp} does not divide the batch's length of {self.length} ({self.length} / {cp} = {self.length / cp:g}); "
                f"a length of {near} would be right, or a cp of {[d for d in divisors(self.length) if d <= 64]}"
            )
        return cp

    def kinds(self, cp: int) -> list[str]:
        """How attention may be computed along cp; one where all come out alike. Raises `PlanError` for a pinned cp that
        cannot be."""
        if cp in self.known:
            return self.known[cp]
        found: list[str] = []
        problem: PlanError | None = None
        for kind in [self.pins.context] if self.pins.context else KINDS:
            try:
                part = PartSource(self, cp, kind)
            except PlanError as error:
                problem = error
                continue
            if part.attention not in found:
                self.parts[cp, part.attention] = part
                found.append(part.attention)
        if self.pins.context and found and found[0] != self.pins.context:
            raise PlanError(f"context: {self.pins.context} cannot be with cp={cp}: {WHY[self.pins.context]}")
        if not found and self.pins.cp and problem is not None:
            raise problem
        self.known[cp] = found
        return found

    def along(self, c: Candidate) -> Source:
        """The caches of a candidate's part of the program."""
        return self if c.mesh.cp == 1 else self.at(c.mesh.cp, c.context)

    def at(self, cp: int, kind: str) -> Source:
        if cp == 1:
            return self
        if (cp, kind) not in self.parts:
            self.parts[cp, kind] = PartSource(self, cp, kind)
        return self.parts[cp, kind]

    def adopt(self, plan: Plan) -> str:
        if plan.context is None:
            return super().adopt(plan)
        cp, kind = plan.mesh.cp, plan.context.attention
        part = PartSource(self, cp, kind, from_choices(cp, plan.context.choices))
        self.parts[cp, kind] = part
        return part.adopt(plan)

    # ---------------------------------------------------------------- what is asked of a candidate

    def profile(self, c: Candidate) -> Profile:
        return super().profile(c) if c.mesh.cp == 1 else self.along(c).profile(c)

    def could_fit(self, c: Candidate) -> bool:
        return super().could_fit(c) if c.mesh.cp == 1 else self.along(c).could_fit(c)

    def least(self, c: Candidate) -> float:
        return super().least(c) if c.mesh.cp == 1 else self.along(c).least(c)

    def blocks(self, c: Candidate) -> Blocks:
        return super().blocks(c) if c.mesh.cp == 1 else self.along(c).blocks(c)

    def even(self, c: Candidate) -> tuple[float, list[tuple[int, int]]]:
        return super().even(c) if c.mesh.cp == 1 else self.along(c).even(c)


WHY = {
    RING: "a ring takes attention that is one operator (the pass sdpa_attention or flash_attention makes it one), without "
    "dropout and packed sequences",
    "all_to_all": "heads are split while attention runs, so cp must divide the key heads, and attention be one operator "
    "(the pass sdpa_attention or flash_attention makes it one)",
}
