"""What is decided beside strategies: the candidate, and the arrays over blocks that its stages are cut from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from autopar.cluster import AxisLink, Cluster
from autopar.cluster.layout import Layout
from autopar.cost import collective
from autopar.cost.compute import moving
from autopar.cost.memory import Sharding, handled_bytes, optimizer_bytes
from autopar.cost.precision import Precision
from autopar.cost.regions import Region
from autopar.cost.schedules import SPLIT
from autopar.plan.plan import MeshShape
from autopar.solve.blocks import BEFORE, SHARED, Held, Profile

Array = np.ndarray


@dataclass(frozen=True)
class Candidate:
    """One point of the outer search. ``variant``: which assignment along tp, by name; ``layout``: where the pipeline stands
    on a cluster of unlike hosts; ``context``: how attention goes over cp, where that is more than 1."""

    mesh: MeshShape
    zero: int
    microbatch: int
    microbatches: int
    schedule: str
    virtual: int
    variant: str = ""
    layout: Layout | None = None
    context: str = ""

    @property
    def stages(self) -> int:
        return self.mesh.pp * self.virtual

    @property
    def splits(self) -> bool:
        """Whether the schedule runs the gradients of weights apart."""
        return self.mesh.pp > 1 and self.schedule in SPLIT

    @property
    def evenly(self) -> bool:
        """Whether stages are cut to take equally long, rather than each by its time and memory."""
        return self.virtual > 1 or self.splits


@dataclass(frozen=True)
class Setting:
    """What holds for all candidates of a job. ``limit``: bytes a device may hold; ``moments``: optimizer tensors."""

    cluster: Cluster
    precision: Precision
    limit: float
    moments: int = 2
    clip: bool = False
    recompute: str | None = None


@dataclass
class Blocks:
    """Per block call (index last) the seconds and bytes of a candidate; times include what shows of ZeRO's traffic.

    ``saved``, ``again`` and ``working`` have a row for each of none, selective, full, and the blocks' selections;
    ``waiting``, ``groups`` and ``steps`` are those of a `Region`. ``first``, ``last``, ``every`` are what the first stage, the
    last stage, and every stage have beside their blocks.
    """

    forward: Array
    backward: Array
    talk: Array  # of forward + backward: not computing
    saved: Array
    again: Array
    again_talk: Array
    working: Array
    trained: Array
    frozen: Array
    partial: Array
    first: Region
    last: Region
    every: Region
    shared_bytes: float
    cuts: Array
    loose: tuple[tuple[Held, frozenset[int]], ...]
    weight: Array  # of backward: gradients of weights, which some schedules compute later
    waiting: Array
    groups: Array
    steps: Array


def blocks(profile: Profile, candidate: Candidate, setting: Setting) -> Blocks:
    """The profile's blocks in order, what runs between them added to the block before."""
    n = profile.blocks
    regions = [profile.regions[k] for k in profile.kinds]
    holds = [profile.holds[k] for k in profile.kinds]
    between = {k: r for k, r in profile.outer.items() if 0 <= k < n}
    modes = max((len(r.saved) for r in regions), default=3)
    dp, link = candidate.mesh.copies, setting.cluster.axis_link(candidate.mesh.within, "dp")
    p, zero = setting.precision, candidate.zero

    def row(pick):  # noqa: ANN001, ANN202 - a number of a region
        return np.array([pick(r) + (pick(between[i]) if i in between else 0.0) for i, r in enumerate(regions)], float)

    def level(pick):  # noqa: ANN001, ANN202 - a row for each mode, those between always at "none"
        rows = [
            [pick(r)[mode] + (pick(between[i])[0] if i in between else 0.0) for i, r in enumerate(regions)]
            for mode in range(modes)
        ]  # noqa: E501
        return np.array(rows, float).reshape(modes, n)

    forward = row(lambda r: r.forward + r.forward_talk)
    backward = row(lambda r: r.backward_input + r.backward_weight + r.backward_talk)
    talk = row(lambda r: r.forward_talk + r.backward_talk)
    trained, frozen = np.array([h.trained for h in holds], float), np.array([h.frozen for h in holds], float)
    gather = travel(collective.gather, link, p.compute.itemsize * (trained + frozen))
    reduce = travel(collective.gather, link, p.reduce.itemsize * trained)
    handled = handling(candidate, setting, trained, frozen)
    forward, backward = forward + handled[0], backward + handled[1]
    before, after = zero == 3 and dp > 1, zero >= 2 and dp > 1
    fetched, sent = gather * before, (gather * before + reduce) * after
    delay = collective.contention(link, setting.cluster.device)
    extra_f, extra_b = collective.behind(fetched, forward, delay), collective.behind(sent, backward, delay)
    again = level(lambda r: r.again)
    hidden = extra_b - collective.behind(sent, backward + again, delay)  # more of it behind what is computed again
    working = np.array(
        [
            [max(r.working[m], between[i].working[0] if i in between else 0.0) for i, r in enumerate(regions)]
            for m in range(modes)
        ],
        float,
    ).reshape(modes, n)  # noqa: E501
    last = profile.outer.get(n, Region()) if n else Region()
    return Blocks(
        forward=forward + extra_f,
        backward=backward + extra_b,
        talk=talk + extra_f + extra_b,
        saved=level(lambda r: r.saved),
        again=again - hidden,
        again_talk=level(lambda r: r.again_talk),
        working=working,
        trained=trained,
        frozen=frozen,
        partial=np.array([h.partial for h in holds], float),
        first=profile.outer.get(BEFORE, Region()),
        last=last,
        every=profile.outer.get(SHARED, Region()),
        shared_bytes=profile.shared_bytes,
        cuts=np.array(profile.cuts, float),
        loose=profile.loose,
        weight=row(lambda r: r.backward_weight) + handled[1],
        waiting=row(lambda r: r.waiting),
        groups=row(lambda r: r.groups),
        steps=row(lambda r: r.steps),
    )


def travel(collective: Callable[[float, AxisLink], float], link: AxisLink, sizes: Array | float) -> Array:
    """Seconds of a collective on each of ``sizes`` (bytes); none for no bytes."""
    (rest, slope), (more, less) = lines(collective, link)
    array = np.asarray(sizes, float)
    return np.where(array > 0, np.minimum(rest + slope * array, more + less * array), 0.0)


def handling(candidate: Candidate, setting: Setting, trained: Array, frozen: Array) -> tuple[Array, Array]:
    """Seconds of a micro-batch, forward and backward, for moving parameters and gradients on the device itself."""
    accumulates = candidate.microbatches > 1 or candidate.mesh.pp > 1
    sharding = Sharding(candidate.zero, candidate.mesh.sharing, setting.precision, setting.moments, accumulates)
    made = handled_bytes(sharding, trained, frozen)
    return tuple(along(lambda b: moving(setting.cluster.device, b), bytes) for bytes in made)  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def lines(collective: Callable[[float, AxisLink], float], link: AxisLink) -> tuple[tuple[float, float], ...]:
    """A collective is a latency plus bytes over a bandwidth, or the lesser of two such: those for short and long messages."""
    found = []
    for a, b in ((0.0, 1e3), (1e15, 2e15)):
        slope = (collective(b, link) - collective(a, link)) / (b - a)
        found.append((max(0.0, collective(a, link) - slope * a), slope))
    return tuple(found)


def along(function: Callable[[float], float], values: Array | float) -> Array:
    """Any function for every entry; equal entries are computed once."""
    array = np.asarray(values, float)
    if not array.ndim:
        return np.float64(function(float(array)))  # type: ignore[return-value]
    distinct, back = np.unique(array, return_inverse=True)
    return np.array([function(float(b)) for b in distinct])[back].reshape(array.shape)


def once_a_step(candidate: Candidate, setting: Setting, sharding: Sharding, stage: Any) -> tuple[Array, Array]:
    """Seconds of a stage that do not grow with the number of micro-batches: what shows of communication, the optimizer.

    Gradients are summed while the last backward runs, unit by unit; what is longer than that backward, or the last
    unit, shows. Bare ZeRO 1 inside a pipeline reduces after the schedule: all of it shows. Parameters that ZeRO 1 and 2
    keep divided are gathered in the first forward, behind which all but the first unit hide. Partial gradients are
    summed over tp after the schedule. Hybrid: what is left of gradients after the reduction within is summed over the
    replicas in the last backward. ``stage`` has elements ``trained, all, partial, largest`` and seconds ``forward,
    backward``.
    """
    mesh, p, zero = candidate.mesh, setting.precision, candidate.zero
    dp, tp = setting.cluster.axis_link(mesh.merged, "dp"), setting.cluster.axis_link(mesh, "tp")
    within, across = (setting.cluster.axis_link(m, "dp") for m in (mesh.within, mesh.across))
    exposed = 0.0 * stage.trained
    delay = collective.contention(dp, setting.cluster.device)

    def reduced(elements: Array) -> Array:
        size = p.reduce.itemsize * elements
        if zero == 0:
            return travel(collective.all_reduce, dp, size)
        inside = travel(collective.gather, within, size) if zero == 1 else 0.0
        return inside + travel(collective.all_reduce, across, size / mesh.sharing)

    if mesh.copies > 1 and (zero <= 1 or mesh.dp_replicate > 1):
        whole = reduced(stage.trained)
        hidden = 0.0 if zero == 1 and mesh.pp > 1 else stage.backward
        exposed = exposed + np.maximum(
            np.minimum(whole, reduced(stage.largest)), collective.behind(whole, hidden, delay)
        )
    if mesh.copies > 1 and zero in (1, 2):
        fetch = travel(collective.gather, within, p.compute.itemsize * stage.all)
        first = travel(collective.gather, within, p.compute.itemsize * stage.largest)
        exposed = exposed + np.maximum(np.minimum(fetch, first), collective.behind(fetch, stage.forward, delay))
    if mesh.tp > 1:
        size = p.gradients.itemsize * stage.partial / sharding.split
        exposed = exposed + travel(collective.all_reduce, tp, size)
    return exposed, along(
        lambda b: moving(setting.cluster.device, b), optimizer_bytes(sharding, stage.trained, setting.clip)
    )
