"""Kernels: tiles in waves, products of skinny matrices, what the backward of operators really runs."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from autopar.cost.memory import Sharding, handled_bytes
from autopar.cost.precision import Precision
from autopar.cost.tiles import filling
from autopar.cost.values import op_name, reads, tensors
from autopar.cost.work import FORWARD, INPUTS, WEIGHTS, work
from autopar.ir.program import Program
from autopar.ir.trace import trace
from autopar.sharding.placement import R


def test_a_product_of_whole_waves_fills_a_device_and_one_tile_more_starts_another_wave() -> None:
    units = 108
    whole = filling((1, 128 * units, 256, 8192), units)
    more = filling((1, 128 * (units + 4), 256, 8192), units)
    assert whole > 0.97
    assert more < 0.9 * whole


def test_skinny_products_reach_less_and_are_divided_along_their_depth() -> None:
    units = 132
    square, skinny = filling((1, 8192, 8192, 8192), units), filling((1, 16, 8192, 8192), units)
    assert skinny < 0.25 * square  # 16 of the 64 rows of the smallest tile
    deep = filling((1, 256, 256, 65536), units)
    undivided = 2 / units  # two tiles alone
    assert deep > 5 * undivided


def test_a_device_of_unknown_units_has_no_waves() -> None:
    assert filling((1, 16, 16, 16), None) == 1.0
    assert filling(None, 108) == 1.0


class Rotary(nn.Module):
    """One of everything whose backward is not its forward's size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, 64))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = F.linear(input_ids.float().unsqueeze(-1).expand(-1, -1, 64) * 1.0, self.weight)
        half = torch.cat([-x[..., :32], x[..., 32:]], dim=-1)
        return F.linear(half.pow(2), self.weight)


@pytest.fixture(scope="module")
def program() -> Program:
    with torch.device("meta"):
        model = Rotary()
    ids = torch.empty((2, 16), dtype=torch.long, device="meta")
    return trace(model, {"input_ids": ids, "labels": ids}).at(batch=2, length=16)


def bytes_of(program: Program, name: str) -> list[tuple[float, float, float]]:
    found = []
    for node in program.graph.nodes:
        if isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) == name:
            done = work(node, (R,) * len(reads(node)), (R,) * len(tensors(node)), 1, Precision())
            found.append((done.bytes(FORWARD), done.bytes(INPUTS), done.bytes(WEIGHTS)))
    return found


def test_cutting_a_slice_is_free_and_its_gradient_is_written_into_zeros(program: Program) -> None:
    whole, part = 2 * 16 * 64 * 4, 2 * 16 * 32 * 4
    cuts = [b for b in bytes_of(program, "slice") if b[1]]
    assert cuts == [(0.0, whole + 2 * part, 0.0)] * 2


def test_a_concatenation_costs_forward_alone_and_a_square_seven_passes_backward(program: Program) -> None:
    size = 2 * 16 * 64 * 4
    assert bytes_of(program, "cat") == [(2 * size, 0.0, 0.0)]
    assert bytes_of(program, "pow") == [(2 * size, 7 * size, 0.0)]


def test_gathered_parameters_are_copied_out_and_gradients_added_where_they_add_up() -> None:
    mixed = Precision(compute=torch.bfloat16)
    assert handled_bytes(Sharding(3, 8, mixed), 100.0, 50.0) == (600.0, 600.0 + 600.0)
    assert handled_bytes(Sharding(2, 8, mixed), 100.0, 50.0) == (0.0, 600.0)
    cast = 6 * 150.0  # read as float32, written as bfloat16, in every micro-batch; the gradients of 100 back
    assert handled_bytes(Sharding(0, 8, mixed), 100.0, 50.0) == (cast, 600.0 + 1200.0)
    assert handled_bytes(Sharding(0, 8, mixed, accumulates=False), 100.0, 50.0) == (cast, 600.0)
    assert handled_bytes(Sharding(0, 8, Precision()), 100.0, 50.0) == (0.0, 1200.0)
