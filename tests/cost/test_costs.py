"""Compute, collectives and states against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from autopar.cluster import AxisLink
from autopar.cost import collective
from autopar.cost.compute import ATTENTION, kernel, model_flops, share
from autopar.cost.memory import Sharding, optimizer_bytes, states
from autopar.cost.precision import Precision
from autopar.cost.work import FORWARD, INPUTS, Call
from autopar.plan.plan import MeshShape
from autopar.solve.blocks import total_flops
from tests.cost.models import cluster, gpt

MIXED = Precision(compute=torch.bfloat16)
N = 7.5e9


@pytest.mark.parametrize(
    ("zero", "gigabytes"),
    [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)],
)
def test_states_are_those_of_the_zero_paper(zero: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2019, ZeRO, figure 1: 7.5 G parameters, 64 devices, mixed-precision Adam, K = 12."""
    half = torch.float16
    precision = Precision(half, half, half, half, half, torch.float32, half)
    sharding = Sharding(zero, 64, precision, moments=3)  # the master copy is one of the three
    made = states(sharding, N, 0.0, 0.0, 0.0)
    held = made.parameters + made.gradients + made.optimizer
    beside = {1: 1, 2: 1}.get(zero, 0) * 2 * N / 64  # FSDP keeps its shards of the parameters beside what is whole
    assert (held - beside) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_zero_1_holds_whole_gradients_while_they_add_up_and_zero_2_does_not() -> None:
    one, two = (states(Sharding(z, 8, MIXED), N, 0.0, 0.0, 0.0) for z in (1, 2))
    assert one.gradients == pytest.approx(4 * N)
    assert two.gradients == pytest.approx(4 * N / 8)


def test_frozen_parameters_have_neither_gradients_nor_state() -> None:
    made = states(Sharding(0, 1, MIXED), 0.0, N, 0.0, 0.0)
    assert (made.gradients, made.optimizer) == (0.0, 0.0)
    assert made.parameters == pytest.approx(6 * N)


def test_each_zero_stage_holds_no_more_than_the_one_before() -> None:
    held = []
    for zero in range(4):
        made = states(Sharding(zero, 8, MIXED), N, 0.0, 1e9, 5e8)
        held.append(made.parameters + made.gradients + made.optimizer + made.transient)
    assert held == sorted(held, reverse=True)


def test_adamw_moves_28_bytes_a_parameter_in_float32() -> None:
    assert optimizer_bytes(Sharding(0, 1, Precision()), 1.0, clip=False) == 28
    assert optimizer_bytes(Sharding(0, 1, Precision()), 1.0, clip=True) == 40


def test_a_ring_moves_n_minus_1_of_n_of_the_bytes() -> None:
    link = AxisLink("host", 100e9, 0.0, 0.5, 8, 8)
    assert collective.gather(1e9, link) == pytest.approx(1e9 * 7 / 8 / 50e9)
    assert collective.seconds("all_reduce", 1e9, link) == pytest.approx(2 * 1e9 * 7 / 8 / 50e9)
    assert collective.seconds("all_to_all", 1e9, link) == pytest.approx(1e9 / 8 * 7 / 8 / 50e9)
    assert collective.seconds("slice", 1e9, link) == 0.0


def test_hosts_exchange_over_every_rail_at_once() -> None:
    """A ring leaves each host once per rail: eight of 25 GB/s are slower than NVLink's 300 GB/s."""
    machine = cluster(8, hosts=4)
    link = machine.axis_link(MeshShape(dp=32), "dp")
    assert link.spans_hosts
    assert collective.gather(1e9, link) == pytest.approx(1e9 * 31 / 32 / (8 * 25e9) + 28 * 3e-6 + 3 * 8e-6)


def test_a_ring_waits_once_for_every_step_and_a_tree_once_for_every_level() -> None:
    machine = cluster(8, hosts=64)
    link = machine.axis_link(MeshShape(dp=512), "dp")
    ring, tree = collective.ring_wait(link), collective.tree_wait(link)
    assert ring == pytest.approx(448 * 3e-6 + 63 * 8e-6)
    assert tree == pytest.approx(6 * 8e-6 + 7 * 3e-6)
    assert collective.all_reduce(1e3, link) == pytest.approx(2 * tree, rel=1e-2)
    large = collective.all_reduce(1e12, link)
    assert large == pytest.approx(2 * collective.gather(1e12, link))  # a ring's bandwidth is the larger


def test_one_device_talks_to_nobody() -> None:
    link = cluster().axis_link(MeshShape(), "tp")
    assert collective.seconds("all_reduce", 1e9, link) == 0.0
    assert collective.send(1e9, link) == 0.0


def product(flops: float, bytes: float = 0.0, kind: str = "matmul", side: int = FORWARD) -> Call:
    return Call(side, kind, flops, bytes)


def test_a_kernel_takes_the_longer_of_computing_and_moving() -> None:
    device = cluster().device
    flops = kernel(device, product(1e12, 1e6), "bfloat16")
    assert flops == pytest.approx(1e12 / (3e14 * share(device, "matmul", 1e12)) + 4e-6)
    moved = kernel(device, product(0.0, 1e9, "vector"), "bfloat16")
    assert moved == pytest.approx(1e9 / (2e12 * share(device, "memory", 1e9)) + 4e-6)


@pytest.mark.parametrize(("side", "part"), [(FORWARD, ATTENTION[0]), (INPUTS, ATTENTION[1])])
def test_fused_attention_reaches_a_part_of_a_products_rate(side: int, part: float) -> None:
    device = cluster().device
    flops = kernel(device, product(1e12), "bfloat16")
    fused = kernel(device, product(1e12, kind="attention", side=side), "bfloat16")
    assert fused == pytest.approx((flops - 4e-6) / part + 4e-6)


def test_larger_calls_are_more_efficient_and_never_take_less() -> None:
    device = cluster().device
    times = [kernel(device, product(10.0**k), "bfloat16") for k in range(6, 14)]
    assert times == sorted(times)
    shares = [share(device, "matmul", 10**k) for k in range(6, 14)]
    assert shares == sorted(shares)


def test_model_flops_are_six_for_a_matrix_parameter_and_twelve_for_attention() -> None:
    program = gpt(layers=4, hidden=1024, heads=16, vocab=4096, length=512).at(batch=2, length=512)
    parameters = 4 * 12 * 1024**2 + 4096 * 1024
    assert total_flops(program) / (2 * 512) == 6 * parameters + 12 * 4 * 1024 * 512


def test_model_flops_do_not_depend_on_how_attention_is_spelled() -> None:
    made = [total_flops(gpt(fused=f).at(batch=2, length=512)) for f in (False, True)]
    assert made[0] == made[1]


def test_frozen_weights_have_no_weight_gradient_in_the_models_flops() -> None:
    program = gpt(train_only=("q.weight",)).at(batch=1, length=512)
    whole = gpt().at(batch=1, length=512)
    assert 0.6 < total_flops(program) / total_flops(whole) < 0.75
    node = next(n for n in program.blocks["block_0"].nodes if "linear" in str(n.target))
    assert model_flops(node) == 3 * 2 * 512 * 1024 * 1024  # the trained one: x, and its own weight


def test_dtypes_can_be_named_and_a_wrong_name_is_refused() -> None:
    from autopar.errors import SpecError

    program = gpt()
    assert Precision.of(program, {"compute": "bfloat16"}).compute == torch.bfloat16
    assert Precision.of(program).compute == torch.float32
    with pytest.raises(SpecError, match="bfloat17"):
        Precision.of(program, {"compute": "bfloat17"})
    assert math.isclose(MIXED.itemsize(torch.float32), 2)
    assert MIXED.itemsize(torch.int64) == 8
