"""What would make a plan faster: more of what the cluster has, other pins, another placement of one node. Each answer is a
plan of its own, made by the search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from autopar.cluster import Cluster
from autopar.cluster.cluster import Group
from autopar.errors import InfeasibleError, PlanError
from autopar.ir.program import Program
from autopar.plan.plan import Plan, PlanDocument
from autopar.solve.assignment import Key
from autopar.solve.formulation import Formulation
from autopar.solve.options import choices
from autopar.solve.search import prepared, solve
from autopar.spec.job import Job, Pins
from autopar.spec.quantity import show_bytes, show_seconds

MORE = 0.05  # of what a device or link has: the step of a shadow price
WORTH = 0.002  # a gain below this share of the step is not told
MESH = ("tp", "pp", "dp", "dp_replicate", "dp_shard", "cp")
CHANGES = 3  # that gain most


@dataclass(frozen=True)
class Gain:
    """A change and the seconds of a step that it leaves."""

    change: str
    seconds: float


# ------------------------------------------------------------------ shadow prices


def shadow_prices(program: Program, cluster: Cluster, job: Job, document: PlanDocument) -> list[str]:
    """What a little more of every resource would save, as text: ``4.0 GiB more per device would save 7.0 % …``."""
    base, found = document.cost.step_seconds, []
    for text, more in enriched(cluster):
        made = tried(program, more, job)
        saved = 1 - made.cost.step_seconds / base if made else 0.0
        if made and saved > WORTH:
            found.append(f"{text} would save {saved:.1%} ({show_seconds(made.cost.step_seconds)}): {shape(made.plan)}")
        else:
            found.append(f"{text} would save nothing worth telling")
    return found


def enriched(cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    """The cluster with more memory, more compute, faster links, one at a time."""
    memory = cluster.device.memory
    yield (
        f"{show_bytes(MORE * memory)} more memory per device",
        every(cluster, lambda g: replace(g, device=replace(g.device, memory=int(g.device.memory * (1 + MORE))))),
    )
    yield (
        "memory without end",
        every(cluster, lambda g: replace(g, device=replace(g.device, memory=1000 * g.device.memory))),
    )
    for span, place in (("host", "inside a host"), ("cluster", "between hosts")):
        if (span == "host" or cluster.hosts > 1) and any(
            k.span == span for k in (*cluster.links, *(k for g in cluster.groups for k in g.links))
        ):
            yield f"{MORE:.0%} more bandwidth {place}", faster(cluster, span)


def every(cluster: Cluster, change) -> Cluster:  # noqa: ANN001 - Group → Group
    return replace(cluster, groups=tuple(change(g) for g in cluster.groups))


def faster(cluster: Cluster, span: str) -> Cluster:
    def more(links):  # noqa: ANN001, ANN202
        return tuple(replace(k, bandwidth=k.bandwidth * (1 + MORE)) if k.span == span else k for k in links)

    def group(g: Group) -> Group:
        return replace(g, links=more(g.links))

    return replace(every(cluster, group), links=more(cluster.links))


def tried(program: Program, cluster: Cluster, job: Job) -> PlanDocument | None:
    """The best plan; None where nothing fits or the pins cannot be."""
    try:
        return solve(program, cluster, job)
    except (InfeasibleError, PlanError):
        return None


def shape(plan: Plan) -> str:
    mesh = plan.mesh
    hybrid = f" ({mesh.dp_replicate} × {mesh.dp_shard})" if mesh.dp_replicate > 1 else ""
    cp = f", cp {mesh.cp}" if mesh.cp > 1 else ""
    degrees = f"tp {mesh.tp}, pp {mesh.pp}, dp {mesh.dp}{hybrid}{cp}"
    return f"{degrees}, ZeRO {plan.zero}, micro-batch {plan.microbatch}, {plan.schedule}"


# ------------------------------------------------------------------ pins


def unpinned(program: Program, cluster: Cluster, job: Job, document: PlanDocument) -> list[str]:
    """How far a pinned plan is from the best one, and the changes of one pin (of two where they share the devices) that
    gain most, each with what it becomes. Empty where nothing is pinned."""
    pinned = {k: v for k, v in job.pins.model_dump().items() if v is not None}
    base = document.cost.step_seconds
    if not pinned:
        return []
    best = tried(program, cluster, job.model_copy(update={"pins": Pins()}))
    if best is None:
        return []
    gap = base / best.cost.step_seconds - 1
    if gap <= WORTH:
        return ["the pins cost nothing: no plan without them is faster"]
    found = [f"the best plan without pins takes {show_seconds(best.cost.step_seconds)}; this one takes {gap:.1%} longer: "
             f"{shape(best.plan)}"]  # fmt: skip
    gains = sorted(changes(program, cluster, job, pinned, base), key=lambda g: g.seconds)
    for gain in gains[:CHANGES]:
        found.append(f"{gain.change}: {show_seconds(gain.seconds)}, {1 - gain.seconds / base:.1%} less")
    return found


def changes(program: Program, cluster: Cluster, job: Job, pinned: dict, base: float) -> Iterator[Gain]:
    """Every pin left out alone; pins of the mesh also in twos, since together they make the number of devices."""
    mesh = [k for k in pinned if k in MESH]
    for left in [(k,) for k in pinned] + list(combinations(mesh, 2)):
        pins = job.pins.model_copy(update=dict.fromkeys(left))
        made = tried(program, cluster, job.model_copy(update={"pins": pins}))
        if made is not None and made.cost.step_seconds < base * (1 - WORTH):
            yield Gain(" and ".join(became(k, pinned[k], made.plan) for k in left), made.cost.step_seconds)


def became(pin: str, value: object, plan: Plan) -> str:
    """``zero 3 → 1``."""
    if pin == "recompute":
        kinds = {r for stage in plan.stages for r in stage.recompute}
        return f"recompute {value} → {' and '.join(sorted(kinds))}"
    new = getattr(plan.mesh, pin) if pin in MESH else getattr(plan, pin)
    return f"{pin} {value} → {new}"


# ------------------------------------------------------------------ one node


def alternatives(program: Program, cluster: Cluster, job: Job, document: PlanDocument, key: Key) -> list[str]:
    """What the other strategies of a node would cost: the whole assignment along tp is solved again with each held fast.

    ``key``: the node's graph and name. Seconds are those of one micro-batch, all instances of a block together.
    """
    plan = document.plan
    if plan.mesh.tp == 1:
        return ["tp is 1: nothing is split"]
    source, _, _ = prepared(program, cluster, job)
    part = source.at(plan.mesh.cp, plan.context.attention) if plan.context is not None else source
    static = part.static(plan.microbatch)
    found = choices(static, plan.mesh.tp, plan.sequence_parallel or None)
    item = found.items.get(key)
    if item is None or len(item.options) < 2:
        return ["this node has no other strategy"]
    problem = Formulation(static, found, plan.mesh.tp, part.prices(plan.mesh.tp))
    taken = plan.choices.get(key[0], {}).get(key[1])
    rows = []
    for option in item.options:
        made = problem.held(key, option, job.search.seconds)
        mine = taken is not None and tuple(map(str, option.inputs)) == taken.inputs
        mine = mine and tuple(map(str, option.outputs)) == taken.outputs
        rows.append((made, option, mine))
    own = [seconds for seconds, _, mine in rows if mine and seconds is not None]
    least = own[0] if own else min(seconds for seconds, _, _ in rows if seconds is not None)
    return [told(option, seconds, least, mine) for seconds, option, mine in sorted(rows, key=lambda r: r[0] or 1e30)]


def told(option, seconds: float | None, least: float, mine: bool) -> str:  # noqa: ANN001 - a Strategy
    inputs, outputs = ", ".join(map(str, option.inputs)), ", ".join(map(str, option.outputs))
    how = f"{inputs} → {outputs}" if inputs else outputs
    if mine:
        return f"{how}: the plan's"
    if seconds is None:
        return f"{how}: does not go with the rest"
    more = seconds - least
    cost = f"{show_seconds(more)} more a micro-batch" if more > 1e-9 else "as fast"
    return f"{how}: {cost}"
