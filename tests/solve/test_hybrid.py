"""Hybrid ZeRO: states divided within some devices of dp and repeated over the others, priced, searched and pinned."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.cluster import Cluster
from autopar.errors import PlanError
from autopar.plan.plan import MeshShape, Plan, PlanDocument, Stage
from autopar.solve.search import solve
from autopar.solve.space import shardings
from autopar.spec.job import Job, Pins
from tests.cost.models import cluster, gpt

MIXED = [{"mixed_precision": {"compute": "bfloat16"}}]
ALONE = {"tp": 1, "pp": 1, "dp": 16, "microbatch": 1, "recompute": "none"}


def plan(machine: Cluster, sequences: int = 32, **pins: Any) -> PlanDocument:
    asked = Job(batch={"sequences": sequences, "length": 512}, passes=MIXED, pins=pins)  # type: ignore[arg-type]
    return solve(gpt(layers=6), machine, asked)


def degrees(mesh: MeshShape, per_host: int, **pins: int) -> dict[int, list[int]]:
    """ZeRO stage → among how many devices."""
    found: dict[int, list[int]] = {}
    for shape, zero in shardings(mesh, per_host, Pins(**pins)):  # type: ignore[arg-type]
        found.setdefault(zero, []).append(shape.dp_shard)
    return found


def test_states_may_be_shared_within_a_host_or_by_whole_hosts() -> None:
    assert degrees(MeshShape(dp=64), 8) == {0: [64], **{z: [64, 32, 16, 8, 4, 2] for z in (1, 2, 3)}}
    assert degrees(MeshShape(dp=24), 8)[1] == [24, 8, 4, 2], "12 is neither a part of a host nor whole hosts"
    assert degrees(MeshShape(dp=16, tp=4), 8)[3] == [16, 8, 4, 2]
    assert degrees(MeshShape(dp=8), 8) == {0: [8], 1: [8], 2: [8], 3: [8]}, "within a host there is nothing to gain"
    assert degrees(MeshShape(), 8) == {0: [1]}


def test_a_pinned_degree_is_the_only_one() -> None:
    assert degrees(MeshShape(dp=8), 8, dp_shard=2) == {1: [2], 2: [2], 3: [2]}
    assert degrees(MeshShape(dp=8), 8, dp_replicate=2) == {1: [4], 2: [4], 3: [4]}
    assert degrees(MeshShape(dp=8), 8, dp_shard=1) == {0: [8]}
    assert degrees(MeshShape(dp=8), 8, dp_shard=8) == {1: [8], 2: [8], 3: [8]}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_states_take_what_the_devices_that_share_them_leave(zero: int) -> None:
    machine = cluster(8, hosts=2)
    held = {s: plan(machine, zero=zero, dp_shard=s, **ALONE).cost.bytes for s in (2, 4, 8, 16)}
    for few, many in ((2, 4), (4, 8), (8, 16)):
        assert held[few].optimizer == pytest.approx(2 * held[many].optimizer, rel=1e-6)
        if zero > 1:
            assert held[few].gradients == pytest.approx(2 * held[many].gradients, rel=1e-6)
    whole = plan(machine, zero=0, **ALONE).cost.bytes
    assert held[2].optimizer == pytest.approx(whole.optimizer / 2, rel=1e-6)


def test_gathers_within_a_host_cost_less_than_between_hosts() -> None:
    machine = cluster(8, hosts=2)
    inside, outside = (plan(machine, zero=3, dp_shard=s, **ALONE).cost for s in (8, 16))
    assert inside.exposed_communication_seconds < outside.exposed_communication_seconds
    assert inside.step_seconds < outside.step_seconds


def test_states_are_repeated_where_memory_allows_and_divided_over_all_where_it_does_not() -> None:
    pins = {**ALONE, "zero": 3}
    roomy = plan(cluster(8, hosts=2), **pins)
    assert roomy.plan.mesh.dp_replicate > 1
    few = plan(cluster(8, hosts=2), **pins, dp_shard=16).cost.peak_bytes / 2**30
    tight = plan(cluster(8, hosts=2, memory=f"{few * 1.06} GiB"), **pins)
    assert tight.plan.mesh.dp_replicate == 1
    assert roomy.cost.step_seconds < tight.cost.step_seconds


def test_a_plan_tells_its_replicas_beside_dp_and_reads_them_back() -> None:
    mesh = plan(cluster(8, hosts=2), zero=3, dp_shard=8, **ALONE).plan.mesh
    data = mesh.model_dump()
    assert data == {"pp": 1, "dp": 16, "cp": 1, "tp": 1, "dp_replicate": 2, "dp_shard": 8}
    assert MeshShape.model_validate(data) == mesh
    assert MeshShape.model_validate({"dp": 16, "dp_shard": 8}) == MeshShape(dp=16, dp_replicate=2)
    assert MeshShape(dp=16).model_dump() == {"pp": 1, "dp": 16, "cp": 1, "tp": 1}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"dp": 8, "dp_replicate": 3}, "dp_replicate 3 does not divide dp 8"),
        ({"dp": 8, "dp_replicate": 2, "dp_shard": 2}, "dp_replicate 2 × dp_shard 2 is not dp 8"),
    ],
)
def test_a_mesh_whose_replicas_do_not_multiply_is_refused(mesh: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeshShape.model_validate(mesh)


def test_a_plan_that_divides_nothing_has_no_replicas() -> None:
    with pytest.raises(ValueError, match="divides nothing"):
        Plan(mesh=MeshShape(dp=4, dp_replicate=2), zero=0, stages=(Stage(blocks=(0, 3)),))


def test_two_of_dp_its_replicas_and_its_shards_say_the_third() -> None:
    assert Pins(dp_replicate=2, dp_shard=4).dp == 8  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"dp": 8, "dp_shard": 3}, "dp_shard 3 does not divide dp 8"),
        ({"dp": 8, "dp_replicate": 2, "dp_shard": 2}, "dp_replicate 2 × dp_shard 2 is 4, not dp 8"),
        ({"zero": 0, "dp_shard": 2}, "zero 0 divides nothing"),
        ({"zero": 2, "dp": 4, "dp_shard": 1}, "dp_shard 1 divides nothing, which is zero 0"),
    ],
)
def test_pins_of_replicas_that_contradict_each_other_are_refused(pins: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pins(**pins)


def test_shards_that_no_mesh_can_have_are_refused_with_the_numbers() -> None:
    with pytest.raises(PlanError, match=r"16 devices and 32 sequences.*3 \(dp_shard\) divide the replicas"):
        plan(cluster(8, hosts=2), dp_shard=3)
