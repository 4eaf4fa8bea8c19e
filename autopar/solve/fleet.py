"""What the search asks of a cluster of unlike hosts: for every layout its times, bounds, cuts and limits, device by device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from autopar.cluster import AxisLink, Cluster, Device
from autopar.cluster.layout import Layout, Layouts, Share
from autopar.cost.memory import states
from autopar.cost.regions import Prices
from autopar.cost.saving import Selection
from autopar.cost.schedules import device_of, stages_of
from autopar.ir.program import Program
from autopar.plan.plan import MeshShape
from autopar.solve.assignment import Assignment
from autopar.solve.blocks import Profile
from autopar.solve.outcome import Outcome, Refusal
from autopar.solve.pipeline import Blocks, Candidate, Setting, blocks
from autopar.solve.prepare import Source, Totals, priced
from autopar.solve.space import candidates, divisors
from autopar.solve.stages import Cutter, sharding_of
from autopar.solve.unlike import Mixed, Spans, Times, improved, spread
from autopar.spec.job import Job

LEAST = 0.7
"""What share of equation (1) of `stages` a 1F1B schedule takes at least where stages' times differ by any factor: a search for
the least ratio of `simulate` to it, over up to 12 stages whose forward is 0.2 to 0.5 of their time, ends at 0.72 (all but one
stage at about half of the longest's time). GPipe takes all of it."""


class Kind(Source):
    """Profiles under the prices of one kind of device, with the strategies that those of another led to."""

    def __init__(
        self, program: Program | Callable[[int], Program], cluster: Cluster, setting: Setting, job: Job, lead: Source
    ) -> None:
        super().__init__(program, cluster, setting, job)
        self.lead = lead

    def assignment(self, tp: int, variant: str) -> Assignment:
        return self.lead.assignment(tp, variant)

    @property
    def adopted(self) -> bool:
        return self.lead.adopted

    def given(self, tp: int, variant: str, batch: int) -> dict[str, tuple[Selection, ...]] | None:
        """What of a block runs again is one choice for all devices, too."""
        return self.lead.profile_of(tp, variant, batch).selections

    def decisive(self, tp: int) -> tuple[Any, ...]:
        return (*self.lead.decisive(tp), priced(self.prices(tp)))


@dataclass(frozen=True, eq=False)
class Grid:
    """A mesh on a layout, and a lower bound on the seconds of a step of every candidate there."""

    floor: float
    mesh: MeshShape
    layout: Layout


class Fleet:
    """Plays the part of `Source` where hosts are unlike. Strategies along tp are those that the group with the most
    FLOP/s leads to, for all: the program is one."""

    promise = LEAST

    def __init__(
        self, program: Program | Callable[[int], Program], cluster: Cluster, setting: Setting, job: Job
    ) -> None:
        assert job.batch is not None
        self.program, self.cluster, self.setting, self.job = program, cluster, setting, job
        self.batch, self.pins = job.batch, job.pins
        self.layouts = Layouts(cluster)
        self.leads: dict[int, Source] = {}
        self.kinds: dict[tuple[Share, int], Kind] = {}
        self.alike: dict[tuple[int, Device, AxisLink], Kind] = {}
        self.ranks: dict[tuple[Layout, int], list[tuple[Share, Kind]]] = {}
        self.settings: dict[Share, Setting] = {}
        self.ready: dict[tuple, Blocks] = {}
        self.most: dict[tuple[int, str], int] = {}
        self.held: dict[tuple, Times] = {}
        self.cuts: dict[tuple, tuple[float, Spans]] = {}
        self.calls = self.lead(1).calls

    # ---------------------------------------------------------------- kinds of devices

    def setting_of(self, cluster: Cluster) -> Setting:
        limit = cluster.device.memory * (1 - self.job.search.memory_margin)
        return replace(self.setting, cluster=cluster, limit=limit)

    def lead(self, tp: int) -> Source:
        """The group with the most FLOP/s of those whose hosts have ``tp`` devices."""
        if tp not in self.leads:
            fit = [
                (self.power(g), -g) for g in range(len(self.cluster.groups)) if max(self.cluster.groups[g].live) >= tp
            ]
            share = self.layouts.share((-max(fit)[1],), 1, tp, tp)
            assert share is not None
            self.leads[tp] = Source(self.program, share.cluster, self.setting_of(share.cluster), self.job)
        return self.leads[tp]

    def power(self, group: int) -> float:
        held = self.cluster.groups[group]
        return held.devices * held.device.peak(str(self.setting.precision.compute))

    def kind(self, share: Share, tp: int) -> Kind:
        if (share, tp) not in self.kinds:
            link = share.cluster.axis_link(MeshShape(tp=tp), "tp")
            key = (tp, share.cluster.device, link)
            if key not in self.alike:
                own = self.setting_of(share.cluster)
                self.alike[key] = Kind(self.program, share.cluster, own, self.job, self.lead(tp))
            self.kinds[share, tp] = self.alike[key]
        return self.kinds[share, tp]

    def static(self, batch: int) -> Program:
        return self.lead(1).static(batch)

    def prices(self, tp: int) -> Prices:
        return self.lead(tp).prices(tp)

    def carried(self, c: Candidate) -> float:
        """No bound of unlike devices beside that of `even` is known."""
        return 0.0

    def hopeless(self, c: Candidate, limit: float) -> bool:
        return False

    def variants(self, tp: int) -> list[str]:
        return self.lead(tp).variants(tp)

    def assignment(self, tp: int, variant: str) -> Assignment:
        return self.lead(tp).assignment(tp, variant)

    def profile(self, c: Candidate) -> Profile:
        assert c.layout is not None
        return self.kind(c.layout.shares[0], c.mesh.tp).profile(c)

    def of(self, c: Candidate) -> list[tuple[Share, Kind]]:
        """Share and kind of every pipeline rank."""
        assert c.layout is not None
        key = (c.layout, c.mesh.tp)
        if key not in self.ranks:
            each = [(share, self.kind(share, c.mesh.tp)) for share in c.layout.shares]
            self.ranks[key] = [each[i] for i in c.layout.of]
        return self.ranks[key]

    def totals(self, c: Candidate, batch: int) -> list[Totals]:
        return [kind.totals(c.mesh.tp, c.variant, batch) for _, kind in self.of(c)]

    def peak(self, c: Candidate, dtype: str) -> float:
        """Dense FLOP/s of all devices of a plan together."""
        assert c.layout is not None
        used = [u for share in c.layout.shares for u in share.hosts]
        return sum(u.devices * self.cluster.groups[u.group].device.peak(dtype) for u in used)

    def place(self, c: Candidate, rank: int) -> tuple[str, str]:
        """Device and group of a pipeline rank."""
        share = self.of(c)[rank][0]
        return share.cluster.device.name, share.cluster.groups[0].name

    # ---------------------------------------------------------------- meshes on layouts

    def degrees(self) -> Iterator[tuple[int, int]]:
        """tp and dp: tp divides the devices of some host, dp the sequences."""
        pins, sequences = self.pins, self.batch.sequences
        most = max(n for g in self.cluster.groups for n in g.live)
        nominal = {d for g in self.cluster.groups for d in divisors(g.devices_per_host) if d <= most}
        split = any(text != "R" for text in (pins.placements or {}).values())
        for tp in [pins.tp] if pins.tp else sorted(nominal):
            for dp in [pins.dp] if pins.dp else divisors(sequences):
                parts = (pins.dp_shard or 1, pins.dp_replicate or 1)
                if tp > most or tp * dp > self.cluster.devices or sequences % dp or any(dp % p for p in parts):
                    continue
                if tp > 1 or not split:
                    yield tp, dp

    def grids(self) -> list[Grid]:
        """All meshes on all layouts, the least lower bound first."""
        found = []
        for tp, dp in self.degrees():
            for layout in self.layouts.all(tp, tp * dp, max(1, self.calls), self.pins.pp):
                mesh = MeshShape(pp=len(layout.of), dp=dp, tp=tp)
                found.append(Grid(self.floor(mesh, layout), mesh, layout))
        return sorted(found, key=lambda g: (g.floor, g.layout.devices, g.mesh.pp, g.mesh.tp))

    def floor(self, mesh: MeshShape, layout: Layout) -> float:
        """Seconds that a step takes at least there: micro-batches of one sequence, in the time that the largest ones take
        for one."""
        found = []
        for variant in self.variants(mesh.tp):
            batch = self.largest(mesh.tp, variant)
            each = [self.kind(s, mesh.tp).totals(mesh.tp, variant, batch).seconds / batch for s in layout.shares]
            found.append(fastest([each[i] for i in layout.of], self.batch.sequences // mesh.dp))
        return min(found)

    def expanded(self, grid: Grid) -> list[tuple[float, Candidate]]:
        """The candidates of a grid whose parameters alone do not exceed the memory, with their bounds, least first."""
        from autopar.solve.search import order

        found = [(self.least(c), c) for c in self.legal(grid) if self.could_fit(c)]
        return sorted(found, key=lambda f: (f[0], order(f[1])))

    def legal(self, grid: Grid) -> Iterator[Candidate]:
        sizes = {u.devices for share in grid.layout.shares for u in share.hosts}
        for variant in self.variants(grid.mesh.tp):
            for c in candidates(
                grid.mesh, self.batch.sequences, self.calls, reduce(math.gcd, sizes), self.pins, variant
            ):
                yield replace(c, layout=grid.layout)

    # ---------------------------------------------------------------- bounds

    def could_fit(self, c: Candidate) -> bool:
        """Whether all devices together could hold a plan with everything recomputed, and some its hungriest part."""
        ranks, least = self.of(c), self.lead(1).least_batch
        made = ranks[0][1].totals(c.mesh.tp, c.variant, least)
        limits = [self.own(share).limit for share, _ in ranks]
        pp, scale = c.mesh.pp, c.microbatch / least
        if made.alone * scale > max(limits):
            return False
        held = states(sharding_of(c, self.setting), made.held.trained / pp, made.held.frozen / pp, 0.0, 0.0)
        return held.parameters + held.gradients + held.optimizer + made.saved * scale / pp <= sum(limits) / pp

    def largest(self, tp: int, variant: str) -> int:
        """The largest micro-batch that any device could hold with everything recomputed."""
        if self.pins.microbatch:
            return self.pins.microbatch
        if (tp, variant) not in self.most:
            made = self.lead(tp).totals(tp, variant, 1)
            limit = max(self.setting_of(self.layouts.share((g,), 1, 1, 1).cluster).limit  # type: ignore[union-attr]
                        for g in range(len(self.cluster.groups)))  # fmt: skip
            need = max(made.saved / max(1, min(self.cluster.devices // tp, self.calls)), made.alone)
            self.most[tp, variant] = max((b for b in divisors(self.batch.sequences) if need * b <= limit), default=1)
        return self.most[tp, variant]

    def least(self, c: Candidate) -> float:
        """Seconds that a step of this candidate takes at least."""
        most = max(self.largest(c.mesh.tp, c.variant), c.microbatch)
        each = [made.seconds * c.microbatch / most for made in self.totals(c, most)]
        if c.evenly:
            return c.microbatches / sum(1 / t for t in each)
        return fastest(each, c.microbatches)

    def even(self, c: Candidate) -> tuple[float, Spans]:
        """The cuts that make the longest stage as short as can be, and what a step takes at least with any cuts (with
        several stages to a device: with these)."""
        ranks, pp, m = self.of(c), c.mesh.pp, c.microbatches
        if c.evenly:
            times = [ranks[device_of(c.schedule, pp, s)][1].times(c) for s in range(c.stages)]
            spans = self.spread((c.layout, c.variant, c.microbatch, c.stages), times)[1]
            if not spans:
                return float("inf"), []
            taken = [sum(t[0][i:j]) for t, (i, j) in zip(times, spans, strict=True)]
            taken[0] += times[0][1]
            taken[-1] += times[-1][2]
            ahead = [0.0] * pp if c.splits else [sum(taken[:d]) for d in range(pp)]
            where = [stages_of(c.schedule, pp, c.stages, d) for d in range(pp)]
            return max(ahead[d] + m * sum(taken[s] for s in on) for d, on in enumerate(where)), spans
        times = [self.rows(c, share, kind) for share, kind in ranks]
        longest, spans = self.spread((c.layout, c.variant, c.microbatch, c.mesh.dp_replicate, c.zero), times)
        if not spans:
            return float("inf"), []
        once = float(np.min([t[0] for t in times], axis=0).sum()) if self.calls else 0.0
        once += times[0][1] + times[-1][2]
        share = 1.0 if c.schedule == "gpipe" or pp == 1 else self.promise
        return max(share * (once + (m - 1) * longest), m * longest, self.least(c)), spans

    def spread(self, key: tuple, times: list[Times]) -> tuple[float, Spans]:
        if key not in self.cuts:
            self.cuts[key] = spread(times)
        return self.cuts[key]

    def rows(self, c: Candidate, share: Share, kind: Kind) -> Times:
        """As `Source.times`, with what shows of ZeRO's traffic."""
        key = (share, c.mesh, c.variant, c.microbatch, c.zero)
        if key not in self.held:
            made = self.blocks(c, share, kind)
            _, first, last = kind.times(c)
            self.held[key] = (made.forward + made.backward).tolist(), first, last
        return self.held[key]

    # ---------------------------------------------------------------- cuts and outcomes

    def blocks(self, c: Candidate, share: Share, kind: Kind) -> Blocks:
        key = (share, c.mesh, c.variant, c.microbatch, c.zero)
        if key not in self.ready:
            self.ready[key] = blocks(kind.profile(c), c, self.own(share))
        return self.ready[key]

    def own(self, share: Share) -> Setting:
        if share not in self.settings:
            self.settings[share] = self.setting_of(share.cluster)
        return self.settings[share]

    def cutter(self, c: Candidate) -> Mixed:
        assert c.layout is not None
        parts = [
            Cutter(self.blocks(c, share, self.kind(share, c.mesh.tp)), c, self.own(share)) for share in c.layout.shares
        ]
        return Mixed(c, c.layout, parts)

    def settle(self, cutter: Mixed, spans: Spans, limit: float = float("inf")) -> Outcome | Refusal:
        return improved(cutter, spans, limit)


def fastest(each: list[float], microbatches: int) -> float:
    """The least X with which stages in this order can do a whole micro-batch's work, ``microbatches`` times: stage s, which
    would take ``each[s]`` for all of it, does the share t[s] / each[s] of it in t[s] seconds, and X is at least
    Σ t[r] over r < s, plus m · t[s], for every s.

    From the last stage on: of X, stage s and those after it can do at most v[s] · X, and a second that s does not take is
    left to those after it: v[s] = max(v[s+1], v[s+1] · (1 - 1/m) + 1 / (m · each[s])).
    """
    done = 0.0
    for t in reversed(each):
        done = max(done, done * (1 - 1 / microbatches) + 1 / (microbatches * t)) if t > 0 else float("inf")
    return 1 / done if done else float("inf")
