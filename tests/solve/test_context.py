"""Splitting sequences over cp: the ILP and the search against trying everything, costs, and where cp is weighed at all."""

from __future__ import annotations

import itertools
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autopar.cost.precision import Precision
from autopar.cost.regions import Prices
from autopar.errors import PlanError
from autopar.ir.context import KINDS, ContextAttention
from autopar.ir.program import Program
from autopar.ir.trace import trace
from autopar.plan.explain import explain
from autopar.plan.plan import MeshShape, PlanDocument
from autopar.sharding.placement import R
from autopar.solve.context import ContextFormulation, assign_context, context_choices
from autopar.solve.outcome import outcome
from autopar.solve.parts import LONG
from autopar.solve.search import evaluate, ordered, prepared, solve
from autopar.solve.stages import Cutter
from tests.cost.models import cluster, gpt
from tests.solve.test_formulation import exhaustive
from tests.solve.test_search import job


def prices(program: Program, cp: int) -> Prices:
    machine = cluster()
    link = machine.axis_link(MeshShape(cp=cp), "cp")
    return Prices(machine.device, link, Precision.of(program, {"compute": "bfloat16"}), link)


class Tiny(nn.Module):
    """Small enough to try everything: attention with a residual, then a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(64, 256), nn.Linear(256, 256, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        q = x.view(*ids.shape, 4, 64).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(x.shape)
        return self.up(x + mixed).relu().mean(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cp", [2, 4])
def test_the_ilp_along_cp_finds_what_trying_everything_finds(cp: int, kind: str) -> None:
    with torch.device("meta"):
        model = Tiny()
    batch = {"ids": torch.zeros(2, 32, dtype=torch.long, device="meta")}
    program = trace(model, batch, loss=lambda y, _: (y * y).mean()).at(batch=1, length=32)
    found, natures = context_choices(program, cp, kind)
    form = ContextFormulation(program, found, cp, prices(program, cp), natures)
    assert form.solve(30).objective == pytest.approx(exhaustive(form), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_grows_with_the_sequence_is_split_and_no_parameter_is(kind: str) -> None:
    program = gpt(fused=True).at(batch=1, length=512)
    made = assign_context(program, 4, kind, prices(program, 4), 30)
    for name, graph in program.graphs():
        for node in graph.nodes:
            if node.op == "placeholder" and node.meta["kind"] == "parameter":
                assert made.of(name, node).outputs[0] == R
            elif (
                node.op == "call_function"
                and node.target is not operator.getitem
                and node.meta["requires_grad"] is True
                and "sequence" in set().union(*node.meta["dims"])
            ):
                assert made.of(name, node).outputs[0].sharded, node
    assert {s.special for s in made.strategies.values()} == {"", kind}


@pytest.mark.parametrize(("devices", "hosts"), [(2, 1), (4, 1), (2, 2)])
def test_the_search_with_cp_finds_what_trying_everything_finds(devices: int, hosts: int) -> None:
    program, machine = gpt(layers=3, fused=True), cluster(devices, hosts, memory="1.2 GiB")
    asked = job(sequences=4, pins={"cp": 2})
    source, setting, _ = prepared(program, machine, asked)
    best, seen = float("inf"), set()
    for _, c in ordered(source, setting, asked.batch, asked.pins):
        cutter = Cutter(source.blocks(c), c, setting)
        seen.add(c.context)
        for cut in itertools.combinations(range(1, 3), c.stages - 1):
            spans = list(itertools.pairwise((0, *cut, 3)))
            for modes in itertools.product(range(3), repeat=3):
                tried = outcome(cutter, spans, [tuple(modes[i:j]) for i, j in spans])
                if max(tried.peaks) <= setting.limit:
                    best = min(best, tried.seconds)
    found = solve(program, machine, asked)
    assert seen == set(KINDS)
    assert found.plan.mesh.cp == 2
    assert found.cost.step_seconds == pytest.approx(best, rel=1e-2)
    assert found.cost.step_seconds >= best * (1 - 1e-9)


def pinned(length: int = 512, **pins: object) -> PlanDocument:
    alone = {"tp": 1, "pp": 1, "dp": 1, "zero": 0, "microbatch": 1, "recompute": "none"}
    asked = job(sequences=2, length=length, pins=alone | pins)
    return solve(gpt(fused=True), cluster(int(pins.get("cp", 1))), asked)  # type: ignore[call-overload]


def test_a_plan_with_cp_is_read_again_and_costs_the_same() -> None:
    made = pinned(cp=2, context="ring")
    again = PlanDocument.model_validate_json(made.model_dump_json())
    assert again == made
    assert again.plan.mesh.degrees == {"pp": 1, "dp": 1, "cp": 2, "tp": 1}
    asked = job(sequences=2, pins={"cp": 2})
    assert evaluate(gpt(fused=True), cluster(2), asked, again.plan).cost == made.cost


def test_activations_are_divided_and_the_models_own_work_is_not() -> None:
    alone, split = pinned(length=4096), pinned(length=4096, cp=4, context="ring")
    assert split.cost.bytes.activations == pytest.approx(alone.cost.bytes.activations / 4, rel=0.01)
    assert split.model.flops_per_token == alone.model.flops_per_token
    assert split.cost.compute_seconds < alone.cost.compute_seconds / 2.5, "small operators are slower than their share"


def test_the_plain_order_of_a_causal_ring_is_charged_for_its_last_device() -> None:
    """A length in four chunks, but not in eight: the last device's queries see all keys."""
    zigzag, plain = (pinned(length=n, cp=4, context="ring") for n in (8192, 8188))
    assert zigzag.plan.context is not None and plain.plan.context is not None
    assert (zigzag.plan.context.zigzag, plain.plan.context.zigzag) == (True, False)

    def core(made: PlanDocument) -> float:
        return next(f.forward for f in made.nodes["block_0"].values() if f.op == "ring_attention")

    assert 1.4 * core(zigzag) < core(plain) < 1.75 * core(zigzag), (
        "7/8 of the scores for a half and the diagonal's tiles"
    )


def test_the_explanation_says_how_sequences_are_split() -> None:
    made = pinned(cp=2, context="all_to_all")
    assert "sequences split over cp 2; an all-to-all splits heads while attention runs" in explain(made)
    assert "cp 2" in explain(made).splitlines()[1]


def test_cp_is_weighed_where_lengths_are_long_or_pins_leave_devices_to_it() -> None:
    def degrees(length: int, **pins: int) -> list[int]:
        asked = job(sequences=8, length=length, pins=pins)
        return prepared(gpt(fused=True), cluster(8, 2), asked)[0].degrees()

    assert degrees(512) == degrees(LONG // 2) == [1]
    assert degrees(LONG) == [1, 2, 4, 8, 16]
    assert degrees(512, cp=4) == [4]
    assert degrees(512, tp=2, pp=1, dp=2) == [4]
    assert degrees(LONG, tp=8) == [1, 2]


def test_devices_left_over_by_every_other_pin_split_sequences() -> None:
    asked = job(sequences=4, pins={"tp": 1, "pp": 1, "dp": 2})
    assert solve(gpt(fused=True), cluster(8), asked).plan.mesh.degrees == {"pp": 1, "dp": 2, "cp": 4, "tp": 1}


def test_long_sequences_that_one_device_cannot_hold_are_split() -> None:
    program, machine = gpt(layers=4, fused=True, heads=8), cluster(4, memory="6 GiB")
    made = solve(program, machine, job(sequences=1, length=2 * LONG, pins={"tp": 1, "pp": 1}))
    assert made.plan.mesh.cp == 4
    with pytest.raises(Exception, match="no plan fits|devices and 1 sequences"):
        solve(program, machine, job(sequences=1, length=2 * LONG, pins={"cp": 1, "tp": 1, "pp": 1}))


def test_a_length_in_no_whole_parts_is_refused_with_the_nearest_that_is() -> None:
    with pytest.raises(PlanError, match=r"cp=4 does not divide the batch's length of 510 \(510 / 4 = 127.5\); .* 512"):
        pinned(length=510, cp=4)


def test_models_that_mix_positions_are_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 32)
            self.layers = nn.ModuleList(nn.Conv1d(32, 32, 3, padding=1) for _ in range(3))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.table(input_ids).transpose(1, 2)
            for layer in self.layers:
                x = layer(x)
            return x.mean(-1)

    with torch.device("meta"):
        model = Mixing()
    ids = torch.zeros(2, 32, dtype=torch.long, device="meta")
    program = trace(model, {"input_ids": ids}, loss=lambda y, _: (y * y).mean())
    with pytest.raises(PlanError, match="mixes positions in a way that sequences cannot be split through"):
        solve(program, cluster(2), job(sequences=2, length=32, pins={"cp": 2}))


def test_targets_of_equal_options_are_equal() -> None:
    assert ContextAttention("ring", 2, True) == ContextAttention("ring", 2, True)
    assert ContextAttention("ring", 2, True) != ContextAttention("ring", 2, False)
