"""The ILP: Megatron's splits fall out, the relaxation is integral, small instances equal brute force."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from autopar.cost.precision import Precision
from autopar.cost.regions import Prices
from autopar.errors import PlanError
from autopar.plan.plan import MeshShape
from autopar.sharding.placement import R, S
from autopar.sharding.redistribute import moves
from autopar.solve.assignment import from_choices
from autopar.solve.blocks import profile
from autopar.solve.formulation import Formulation, assign
from autopar.solve.options import choices, wanted
from tests.cost.models import cluster, gpt


def prices(program, tp: int) -> Prices:  # noqa: ANN001
    machine = cluster()
    precision = Precision.of(program, {"compute": "bfloat16"})
    return Prices(machine.device, machine.axis_link(MeshShape(tp=tp), "tp"), precision)


def by_name(program, assignment, block: str = "block_0") -> dict[str, str]:  # noqa: ANN001
    body = program.blocks[block]
    return {n.meta["name"]: str(assignment.of(block, n).outputs[0]) for n in body.nodes if n.op == "placeholder"}


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_columns_then_rows_and_a_stream_split_over_the_sequence_fall_out(tp: int) -> None:
    program = gpt(hidden=2048, length=2048, vocab=32000).at(batch=1, length=2048)
    made = assign(program, tp, prices(gpt(), tp), spare=True)
    assert made.integral
    where = by_name(program, made)
    for name in ("q", "k", "v", "up"):
        assert where[f"{name}.weight"] == "S(0)", "columns"
    for name in ("o", "down"):
        assert where[f"{name}.weight"] == "S(1)", "rows"
    assert where["x"] == "S(1)"
    assert where["norm1.weight"] == where["norm2.weight"] == "R"
    head = next(n for n in program.graph.nodes if n.meta.get("name") == "head.weight")
    assert made.parameter(program, head) == S(0)
    loss = next(n for n in program.graph.nodes if "cross_entropy" in str(n.target))
    assert made.of("program", loss).special == "vocab_cross_entropy"


def test_a_pin_against_the_sequence_is_kept_everywhere() -> None:
    program = gpt().at(batch=1, length=512)
    made = assign(program, 4, prices(gpt(), 4), sequence=False, spare=True)
    for name, graph in program.graphs():
        for node in graph.nodes:
            if node.op in ("call_function", "placeholder"):
                for p in made.of(name, node).outputs:
                    dims = node.meta["dims"]
                    assert not (p.sharded and dims and "sequence" in dims[p.dim]), node


def test_a_length_that_does_not_divide_refuses_the_pin_with_its_numbers() -> None:
    program = gpt(length=510).at(batch=1, length=510)
    with pytest.raises(PlanError, match=r"sequence_parallel: true is impossible with tp=4.*510"):
        assign(program, 4, prices(gpt(), 4), sequence=True)


def test_heads_that_do_not_divide_leave_attention_whole_and_split_the_rest() -> None:
    program = gpt(hidden=576, heads=9, length=256).at(batch=1, length=256)
    made = assign(program, 2, prices(gpt(), 2), sequence=False, spare=True)
    where = by_name(program, made)
    assert where["up.weight"] == "S(0)"
    assert where["down.weight"] == "S(1)"
    for node in program.blocks["block_0"].nodes:
        if "softmax" in str(node.target):
            assert made.of("block_0", node).outputs[0] != S(1)


def test_the_batch_is_never_split() -> None:
    program = gpt(layers=2).at(batch=4, length=512)
    for item in choices(program, 2).items.values():
        for s in item.options:
            for i, p in enumerate(s.outputs):
                if p.sharded and item.node.op != "output":
                    dims = item.node.meta["dims"]
                    dims = dims[i] if isinstance(item.node.meta["val"], tuple) else dims
                    assert "batch" not in dims[p.dim]


def test_two_blocks_alike_cost_the_same_variables_as_twenty() -> None:
    sizes = []
    for layers in (3, 20):
        program = gpt(layers=layers).at(batch=1, length=512)
        sizes.append(len(Formulation(program, choices(program, 4), 4, prices(gpt(), 4)).linear.cost))
    assert sizes[0] == sizes[1]


def test_an_assignment_survives_its_text_form() -> None:
    program = gpt().at(batch=1, length=512)
    made = assign(program, 4, prices(gpt(), 4))
    again = from_choices(4, made.choices(program))
    assert again.choices(program) == made.choices(program)
    assert profile(program, again, prices(gpt(), 4)) == profile(program, made, prices(gpt(), 4))


def test_what_the_ilp_charges_is_what_the_profile_charges() -> None:
    """The objective, less what it charges for held bytes and once a step, is the profile's time."""
    program = gpt(layers=3, hidden=2048, length=1024).at(batch=2, length=1024)
    made = assign(program, 4, prices(gpt(), 4))
    measured = profile(program, made, prices(gpt(), 4))
    regions = [measured.regions[k] for k in measured.kinds] + list(measured.outer.values())
    seconds = sum(r.forward + r.backward_input + r.backward_weight + r.forward_talk + r.backward_talk for r in regions)
    assert made.objective == pytest.approx(seconds, rel=0.06)


class Tiny(nn.Module):
    """Small enough to try everything: two linears around an activation, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):  # noqa: ANN001, ANN201
        return x + self.b(self.a(x).relu())


def tiny():  # noqa: ANN201
    import torch

    from autopar.ir.trace import trace

    with torch.device("meta"):
        model = nn.Sequential(*(Tiny(512) for _ in range(2)))
    batch = {"input": torch.empty(8, 64, 512, device="meta")}
    program = trace(model, batch, loss=lambda y, _: (y * y).mean())
    return program.at(batch=8)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("spare", [False, True])
def test_the_ilp_finds_what_trying_everything_finds(tp: int, spare: bool) -> None:
    program = tiny()
    form = Formulation(program, choices(program, tp), tp, prices(program, tp), spare)
    best = exhaustive(form)
    assert form.solve(30).objective == pytest.approx(best, rel=1e-6)


def exhaustive(form: Formulation) -> float:
    """The least objective over all combinations of options, by the equations' own words."""
    items = list(form.found.items.values())
    free = [i for i in items if len(i.options) > 1]
    assert 1e6 > len(list(itertools.islice(itertools.product(*(range(len(i.options)) for i in free)), 10**6))) > 50
    fixed = {i.key: 0 for i in items}
    node = {i.key: [i.weight * form.node_cost(i, s) for s in i.options] for i in items}
    best = float("inf")
    for combination in itertools.product(*(range(len(i.options)) for i in free)):
        chosen = {**fixed, **{i.key: k for i, k in zip(free, combination, strict=True)}}
        total = sum(node[k][c] for k, c in chosen.items())
        if total >= best:
            continue
        for edge in form.found.edges:
            producer = form.found.items[edge.producer]
            p = producer.options[chosen[edge.producer]].outputs[edge.output]
            paid = {}
            for r in edge.readers:
                item = form.found.items[r.item]
                w = wanted(item, item.options[chosen[r.item]], r.position, edge.gradient)
                paid[w] = form.move_cost(edge, p, w)
            total += float("inf") if None in paid.values() else edge.weight * sum(paid.values())  # type: ignore[arg-type]
            if total >= best:
                break
        best = min(best, total)
    return best


def test_moves_back_are_legal_for_every_gradient() -> None:
    for p in (R, S(0), S(1)):
        for q in (R, S(0), S(1)):
            assert moves(p, q, q) is not None
