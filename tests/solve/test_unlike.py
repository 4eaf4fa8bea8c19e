"""Plans for unlike hosts: against trying everything, and what anyone would expect of them."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from autopar.cluster import Cluster
from autopar.cost.timeline import simulate
from autopar.errors import InfeasibleError, PlanError
from autopar.plan.explain import explain
from autopar.plan.plan import PlanDocument
from autopar.solve.fleet import LEAST, fastest
from autopar.solve.groups import fleet_of
from autopar.solve.outcome import outcome
from autopar.solve.search import evaluate, solve
from autopar.spec.job import Job
from tests.cost.models import gpt

MIXED = [{"mixed_precision": {"compute": "bfloat16"}}]
SLOW = {"name": "slow", "memory": "80 GiB", "bandwidth": "2 TB/s", "kernel_latency": "4 us",
        "flops_per_second": {"bfloat16": 3e14, "float32": 2e13}}  # fmt: skip
FAST = {"name": "fast", "memory": "80 GiB", "bandwidth": "5 TB/s", "kernel_latency": "2 us",
        "flops_per_second": {"bfloat16": 9e14, "float32": 6e13}}  # fmt: skip
LINKS = [{"span": "host", "bandwidth": "300 GB/s", "latency": "3 us"},
         {"span": "cluster", "bandwidth": "25 GB/s", "latency": "8 us"}]  # fmt: skip


def group(device: dict, per_host: int = 2, hosts: int = 1, gib: float = 80, name: str = "", **more: Any) -> dict:
    return {"name": name or f"{device['name']}-hosts", "device": {**device, "memory": f"{gib} GiB"},
            "devices_per_host": per_host, "hosts": hosts, "links": LINKS, **more}  # fmt: skip


def unlike(*groups: dict, bandwidth: str = "25 GB/s") -> Cluster:
    return Cluster.load({"name": "mix", "groups": list(groups), "links": [{**LINKS[1], "bandwidth": bandwidth}]})


def job(sequences: int = 32, **more: Any) -> Job:
    return Job(batch={"sequences": sequences, "length": 512}, passes=MIXED, **more)  # type: ignore[arg-type]


def counts(document: PlanDocument) -> dict[str, int]:
    """Group → blocks."""
    found: dict[str, int] = {}
    for s in document.plan.stages:
        found[s.group] = found.get(s.group, 0) + s.blocks[1] - s.blocks[0] + 1
    return found


SMALL = {
    "two and two": [group(SLOW), group(FAST)],
    "one and two": [group(SLOW, 1), group(FAST, 2)],
    "little memory on the fast": [group(SLOW, 1), group(FAST, 1, gib=0.8)],
    "little memory on the slow": [group(SLOW, 2, gib=0.7), group(FAST, 1)],
    "three groups": [group(SLOW, 1), group(FAST, 1), group(SLOW, 1, gib=0.9, name="small")],
    "little memory everywhere": [group(SLOW, 1, gib=0.9), group(FAST, 1, gib=0.8)],
    "a dead device": [group(FAST, 2, 2, dead=1)],
}


@pytest.mark.parametrize("name", list(SMALL))
def test_the_search_finds_what_trying_everything_finds(name: str) -> None:
    """Every mesh on every layout, ZeRO stage, micro-batch, schedule, cut, and recompute of every block."""
    program, machine, asked = gpt(layers=3), unlike(*SMALL[name]), job(sequences=4)
    fleet = fleet_of(program, machine, asked)
    best = float("inf")
    for grid in fleet.grids():
        for c in fleet.legal(grid):
            cutter = fleet.cutter(c)
            for cut in itertools.combinations(range(1, 3), c.stages - 1):
                spans = list(itertools.pairwise((0, *cut, 3)))
                kinds = range(
                    len(cutter.at(0).blocks.saved)
                )  # of blocks that are alike, only how many are of each counts
                each = [itertools.combinations_with_replacement(kinds, j - i) for i, j in spans]
                for modes in itertools.product(*each):
                    tried = outcome(cutter, spans, list(modes))  # type: ignore[arg-type]
                    if all(h.total <= limit for h, limit in zip(tried.held, tried.limits, strict=True)):
                        best = min(best, tried.seconds)
                        assert fleet.least(c) <= tried.seconds * (1 + 1e-9), "a lower bound is one"
                        assert fleet.even(c)[0] <= tried.seconds * (1 + 1e-9) or c.virtual > 1
                        assert grid.floor <= tried.seconds * (1 + 1e-9)
    found = solve(program, machine, asked)
    assert found.cost.step_seconds == pytest.approx(best, rel=2e-3)
    assert found.cost.step_seconds >= best * (1 - 1e-9)
    assert found.search.bound <= found.search.objective


def test_no_share_of_the_work_beats_the_bound_on_unlike_stages() -> None:
    """`fastest` against random shares of random work: no choice is below it, and the best of many comes near."""
    draw = random.Random(3)
    for _ in range(20):
        each, m = [draw.uniform(1, 4) for _ in range(draw.randint(1, 4))], draw.randint(1, 12)
        least = fastest(each, m)
        best = float("inf")
        for _ in range(4000):
            parts = [draw.random() ** 2 for _ in each]
            t = [p / sum(parts) * e for p, e in zip(parts, each, strict=True)]
            best = min(best, max(sum(t[:s]) + m * t[s] for s in range(len(t))))
        assert least <= best * (1 + 1e-9) and best < least * 1.25
    assert fastest([2.0] * 3, 4) == pytest.approx(2.0 / (1 - (1 - 1 / 4) ** 3))


def test_a_schedule_of_unlike_stages_takes_at_least_what_the_search_counts_on() -> None:
    draw = random.Random(5)
    for _ in range(300):
        p = draw.randint(2, 8)
        m, share = draw.choice([p, p + 1, 2 * p]), draw.uniform(0.2, 0.5)
        t = [draw.uniform(0.05, 1) for _ in range(p)]
        f, b = [x * share for x in t], [x * (1 - share) for x in t]
        equation = sum(t) + (m - 1) * max(t)
        assert simulate("1f1b", f, b, [0.0] * (p - 1), p, m).seconds >= LEAST * equation
        assert simulate("gpipe", f, b, [0.0] * (p - 1), p, m).seconds >= equation * (1 - 1e-9)


def test_fast_devices_get_as_many_more_blocks_as_they_are_faster() -> None:
    asked = job(64, pins={"pp": 2, "tp": 1, "dp": 2, "schedule": "1f1b", "microbatch": 2})
    made = solve(gpt(layers=12, hidden=2048), unlike(group(SLOW), group(FAST)), asked)
    blocks = counts(made)
    assert 2 <= blocks["fast-hosts"] / blocks["slow-hosts"] <= 3.01
    times = [s.seconds.forward + s.seconds.backward for s in made.plan.stages]
    assert max(times) < 1.35 * min(times)
    assert made.unused_devices == 0 and made.unused == ()


def test_a_mix_is_faster_than_either_part_and_than_counting_all_as_the_weakest() -> None:
    program, asked = gpt(layers=12), job(sequences=64)
    mixed = solve(program, unlike(group(SLOW), group(FAST)), asked).cost.step_seconds
    alone = [
        solve(program, Cluster.load({**g, "name": "c"}), asked).cost.step_seconds for g in (group(SLOW), group(FAST))
    ]
    weakest = solve(program, Cluster.load({**group(SLOW, 4), "name": "c"}), asked).cost.step_seconds
    assert mixed < min(alone) and mixed < weakest


def test_a_slow_group_behind_a_slow_link_is_left_out_and_the_plan_says_so_with_numbers() -> None:
    program, asked = gpt(layers=8), job(sequences=8)
    made = solve(program, unlike(group(SLOW, 1), group(FAST, 4), bandwidth="20 MB/s"), asked)
    assert counts(made) == {"fast-hosts": 8} and made.unused_devices == 1
    assert len(made.unused) == 1 and made.unused[0].startswith(
        "slow-hosts: 1 of 1 devices (slow) are not used: the best plan"
    )
    assert "more than this" in made.unused[0]
    assert made.unused[0] in explain(made)
    alone = solve(program, Cluster.load({**group(FAST, 4), "name": "c"}), asked)
    assert made.cost.step_seconds == pytest.approx(alone.cost.step_seconds, rel=1e-6)
    near = solve(program, unlike(group(SLOW, 1), group(FAST, 1)), job(sequences=64))
    assert near.unused_devices == 0, "over a fast link it pays"


def test_one_dead_device_costs_no_more_than_its_host() -> None:
    program, asked = gpt(layers=8), job(sequences=56 * 9)
    seven, broken = (
        solve(program, Cluster.load({**group(FAST, 8, hosts), "name": "c", **more}), asked)
        for hosts, more in ((7, {}), (8, {"dead": {3: [5]}}))
    )
    assert broken.cost.step_seconds <= seven.cost.step_seconds * (1 + 1e-4)
    mesh = broken.plan.mesh
    assert mesh.devices in (56, 63) and broken.unused_devices == 63 - mesh.devices
    assert sum(len(h.devices) for h in broken.plan.hosts) == mesh.devices
    assert all(5 not in h.devices for h in broken.plan.hosts if h.host == 3)


def test_three_hosts_and_five_are_all_used() -> None:
    asked = job(64, pins={"tp": 2, "dp": 1, "microbatch": 1, "schedule": "1f1b"})
    made = solve(gpt(layers=16, hidden=4096), unlike(group(SLOW, 2, 3), group(FAST, 2, 5)), asked)
    assert made.plan.mesh.pp == 8 and made.unused_devices == 0
    assert [s.group for s in made.plan.stages].count("slow-hosts") == 3
    assert counts(made)["fast-hosts"] / 5 > 2 * counts(made)["slow-hosts"] / 3


@pytest.mark.parametrize("pins", [{}, {"pp": 4}, {"pp": 2, "tp": 1, "dp": 2, "zero": 3}, {"tp": 2, "pp": 2}])
def test_the_ledger_adds_up_and_bytes_are_of_the_fullest_beside_its_limit(pins: dict) -> None:
    program, machine, asked = gpt(layers=8), unlike(group(SLOW, gib=0.9), group(FAST, gib=2)), job(pins=pins)
    made = solve(program, machine, asked)
    cost, plan = made.cost, made.plan
    parts = cost.compute_seconds + cost.exposed_communication_seconds + cost.bubble_seconds + cost.optimizer_seconds
    assert parts == pytest.approx(cost.step_seconds, rel=1e-6)
    fullest = max(plan.stages, key=lambda s: s.peak_bytes / s.memory_limit)
    assert (cost.peak_bytes, made.memory_limit) == (fullest.peak_bytes, fullest.memory_limit)
    for s in plan.stages:
        assert s.peak_bytes <= s.memory_limit == round((0.9 if s.device == "slow" else 2) * 2**30 * 0.95)
    assert len(plan.hosts) == len({(h.group, h.host) for h in plan.hosts})
    assert evaluate(program, machine, asked, plan).cost == cost
    assert PlanDocument.model_validate_json(made.model_dump_json()) == made
    assert "unlike hosts" in explain(made)


def test_groups_of_like_hosts_plan_as_one_cluster_of_them() -> None:
    """As many stages as groups: a stage stays in its group, so replicas over both are not offered."""
    program, asked = gpt(layers=8), job(pins={"pp": 2})
    one = solve(program, Cluster.load({**group(FAST, 2, 2), "name": "c"}), asked)
    two = solve(program, unlike(group(FAST, 2, name="a"), group(FAST, 2, name="b")), asked)
    assert two.cost.step_seconds == pytest.approx(one.cost.step_seconds, rel=1e-2)
    assert two.unused_devices == 0


def test_a_group_that_is_too_small_for_its_share_holds_what_fits() -> None:
    program, asked = gpt(layers=8), job(pins={"pp": 2, "tp": 1, "dp": 1, "schedule": "1f1b", "microbatch": 4})
    roomy = solve(program, unlike(group(SLOW, 1), group(FAST, 1)), asked)
    need = next(s.peak_bytes for s in roomy.plan.stages if s.device == "fast") / 2**30
    tight = solve(program, unlike(group(SLOW, 1), group(FAST, 1, gib=0.7 * need)), asked)
    assert tight.cost.step_seconds > roomy.cost.step_seconds
    fast = [s for s in tight.plan.stages if s.device == "fast"]
    assert fast[0].peak_bytes <= fast[0].memory_limit
    again = {s.device: sum(r != "none" for r in s.recompute) for s in tight.plan.stages}
    assert again["slow"] == 0 and (again["fast"] > 0 or counts(tight)["fast-hosts"] < counts(roomy)["fast-hosts"])


def test_what_fits_nowhere_names_the_stage_and_its_group() -> None:
    with pytest.raises(InfeasibleError, match=r"per device needed at best.*(slow|fast)-hosts.*there") as caught:
        solve(gpt(layers=8, vocab=32000), unlike(group(SLOW, 1, gib=0.3), group(FAST, 1, gib=0.3)), job())
    assert "of memory per device" in str(caught.value)


@pytest.mark.parametrize(
    ("pins", "sequences", "message"),
    [
        ({"dp": 3}, 32, "no mesh of 4 devices at most goes with the pins dp=3: dp must divide the 32 sequences"),
        ({"tp": 4}, 32, "tp groups lie within a host"),
        ({"pp": 9}, 32, "pp=9 needs at least 9 blocks; the model has 8"),
        ({"microbatch": 3}, 32, "microbatch=3 does not divide"),
        ({"cp": 2}, 32, "context parallelism"),
    ],
    ids=str,
)
def test_pins_that_no_layout_has_are_refused_with_the_arithmetic(pins: dict, sequences: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        solve(gpt(layers=8), unlike(group(SLOW), group(FAST)), job(sequences, pins=pins))


def test_the_same_job_gives_the_same_plan() -> None:
    made = [solve(gpt(layers=8), unlike(group(SLOW), group(FAST)), job()) for _ in range(2)]
    assert (made[0].plan, made[0].cost, made[0].unused) == (made[1].plan, made[1].cost, made[1].unused)
