"""The outer search against trying everything, its ledger, pins, and what it says when nothing fits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from autopar.cluster import Cluster
from autopar.errors import InfeasibleError, PlanError
from autopar.ir.program import Program
from autopar.plan.plan import PlanDocument
from autopar.solve.outcome import outcome
from autopar.solve.search import apart, evaluate, ordered, prepared, solve
from autopar.solve.shortage import enough
from autopar.solve.space import schedules
from autopar.solve.stages import Cutter
from autopar.spec.job import Job, Pins
from tests.cost.models import cluster, gpt

MIXED = [{"mixed_precision": {"compute": "bfloat16"}}]


def job(sequences: int = 32, length: int = 512, **more: Any) -> Job:
    return Job(batch={"sequences": sequences, "length": length}, passes=MIXED, **more)  # type: ignore[arg-type]


def plan(program: Program, machine: Cluster, **more: Any) -> PlanDocument:
    return solve(program, machine, job(**more))


def tight(gib: float, devices: int = 8, hosts: int = 1) -> Cluster:
    return cluster(devices, hosts, memory=f"{gib} GiB")


@pytest.mark.parametrize("gib", [80.0, 1.2, 0.8])
@pytest.mark.parametrize(("devices", "hosts"), [(2, 1), (4, 1), (2, 2)])
def test_the_search_finds_what_trying_everything_finds(devices: int, hosts: int, gib: float) -> None:
    """Every mesh, ZeRO stage and number of replicas of its states, micro-batch, schedule, cut, and number of blocks
    recomputed in each way, all selections included, on each stage."""
    program, machine = gpt(layers=3), tight(gib, devices, hosts)
    asked = job(sequences=8)
    source, setting, batch = prepared(program, machine, asked)
    best = float("inf")
    for _, c in ordered(source, setting, batch, asked.pins) + apart(source, setting, batch, asked.pins, float("inf")):
        cutter = Cutter(source.blocks(c), c, setting)
        for cut in itertools.combinations(range(1, 3), c.stages - 1):
            spans = list(itertools.pairwise((0, *cut, 3)))
            kinds = range(len(cutter.blocks.saved))  # of blocks that are alike, only how many are of each kind counts
            for modes in itertools.product(*(itertools.combinations_with_replacement(kinds, j - i) for i, j in spans)):
                tried = outcome(cutter, spans, list(modes))
                if max(tried.peaks) <= setting.limit:
                    best = min(best, tried.seconds)
    if best == float("inf"):
        with pytest.raises(InfeasibleError):
            solve(program, machine, asked)
        return
    found = solve(program, machine, asked)
    assert found.cost.step_seconds == pytest.approx(best, rel=1e-2)
    assert found.cost.step_seconds >= best * (1 - 1e-9)


@pytest.mark.parametrize("pins", [{}, {"pp": 4}, {"tp": 8}, {"dp": 8, "zero": 3}, {"pp": 2, "tp": 2, "zero": 1}])
def test_the_ledger_adds_up(pins: dict) -> None:
    made = plan(gpt(layers=8), cluster(), pins=pins)
    cost = made.cost
    parts = cost.compute_seconds + cost.exposed_communication_seconds + cost.bubble_seconds + cost.optimizer_seconds
    assert parts == pytest.approx(cost.step_seconds, rel=1e-6)
    assert cost.bytes.total == cost.peak_bytes == max(s.peak_bytes for s in made.plan.stages)
    assert cost.tokens_per_second == pytest.approx(32 * 512 / cost.step_seconds)
    assert made.search.bound <= made.search.objective
    assert made.search.gap <= 0.01


@pytest.mark.parametrize(
    "pins",
    [
        {"tp": 4, "pp": 1, "dp": 2, "zero": 1, "microbatch": 2, "sequence_parallel": True, "recompute": "selective"},
        {"tp": 1, "pp": 4, "dp": 2, "zero": 2, "microbatch": 1, "schedule": "gpipe", "recompute": "full"},
        {"tp": 2, "pp": 2, "dp": 2, "zero": 3, "microbatch": 4, "schedule": "1f1b", "sequence_parallel": False},
        {"tp": 1, "pp": 2, "dp": 4, "zero": 0, "schedule": "interleaved1f1b", "virtual_stages": 2, "microbatch": 1},
        {
            "tp": 1,
            "pp": 2,
            "dp": 4,
            "zero": 1,
            "schedule": "interleavedzerobubble",
            "virtual_stages": 2,
            "microbatch": 1,
        },
        {
            "tp": 1,
            "pp": 4,
            "dp": 2,
            "zero": 1,
            "schedule": "interleavedzerobubble",
            "virtual_stages": 1,
            "microbatch": 1,
        },
        {"tp": 2, "pp": 2, "dp": 2, "zero": 0, "schedule": "zbvzerobubble", "microbatch": 1, "recompute": "full"},
        {"tp": 1, "pp": 4, "dp": 2, "zero": 1, "schedule": "dualpipev", "microbatch": 2},
    ],
)
def test_every_pin_is_kept_and_no_pinned_plan_beats_the_search(pins: dict) -> None:
    program = gpt(layers=8)
    made = plan(program, cluster(), pins=pins)
    shape = made.plan.mesh
    assert (shape.tp, shape.pp, shape.dp) == (pins["tp"], pins["pp"], pins["dp"])
    assert made.plan.zero == pins["zero"]
    assert made.plan.microbatch * made.plan.microbatches * shape.dp == 32
    assert made.plan.schedule == pins.get("schedule", "1f1b")
    if "recompute" in pins:
        assert {r for s in made.plan.stages for r in s.recompute} == {pins["recompute"]}
    if "sequence_parallel" in pins and shape.tp > 1:
        assert made.plan.sequence_parallel is pins["sequence_parallel"]
    assert plan(program, cluster()).cost.step_seconds <= made.cost.step_seconds * (1 + 1e-9)


def test_evaluating_a_plan_gives_the_cost_it_was_chosen_with() -> None:
    program = gpt(layers=8)
    more = [
        {"pp": 4, "schedule": s} for s in ("interleaved1f1b", "interleavedzerobubble", "zbvzerobubble", "dualpipev")
    ]
    for pins in ({}, {"tp": 4, "pp": 2}, *more):
        asked = job(pins=pins)
        made = solve(program, cluster(), asked)
        assert evaluate(program, cluster(), asked, made.plan).cost == made.cost


def test_the_same_job_gives_the_same_plan() -> None:
    program = gpt(layers=8)
    a, b = (plan(program, tight(3.0)) for _ in range(2))
    assert (a.plan, a.cost, a.runners_up) == (b.plan, b.cost, b.runners_up)


def test_more_memory_is_never_slower_and_less_is_never_faster() -> None:
    program = gpt(layers=8)
    times = [plan(program, tight(g)).cost.step_seconds for g in (0.4, 0.5, 0.7, 1.0, 1.5, 80.0)]
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(times))
    assert times[0] > times[-1]


def test_blocks_are_recomputed_only_where_memory_is_short() -> None:
    program = gpt(layers=8)
    pins = {"tp": 1, "pp": 1, "dp": 8, "zero": 1, "microbatch": 4}
    roomy = plan(program, cluster(), pins=pins)
    assert {r for s in roomy.plan.stages for r in s.recompute} == {"none"}
    need = roomy.cost.peak_bytes / 2**30
    counts = []
    for share in (1.0, 0.95, 0.9, 0.85):
        made = plan(program, tight(need * share), pins=pins)
        assert made.cost.peak_bytes <= need * share * 2**30 * 0.95
        counts.append(sum(r != "none" for s in made.plan.stages for r in s.recompute))
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] <= 8


def test_a_large_head_takes_the_place_of_blocks_on_the_last_stage() -> None:
    program = gpt(layers=8, vocab=64000)
    made = plan(program, cluster(4), pins={"pp": 4, "tp": 1}, sequences=32)
    sizes = [s.blocks[1] - s.blocks[0] + 1 for s in made.plan.stages]
    assert sum(sizes) == 8
    assert sizes[-1] < max(sizes)
    longest = max(s.seconds.forward + s.seconds.backward for s in made.plan.stages)
    even = [2, 2, 2, 2]
    assert sizes != even
    assert longest < made.plan.stages[-1].seconds.forward * 10


def test_adapters_change_the_plan() -> None:
    machine = tight(2.0)
    whole = plan(gpt(layers=8), machine)
    part = plan(gpt(layers=8, train_only=("q.weight", "v.weight")), machine)
    assert part.model.trainable_parameters < 0.2 * whole.model.parameters
    assert part.cost.bytes.optimizer < whole.cost.bytes.optimizer or part.plan.zero < whole.plan.zero
    assert part.cost.step_seconds < 0.85 * whole.cost.step_seconds


def test_weights_that_a_pass_freezes_after_the_trace_cost_no_state() -> None:
    from autopar.ir.rewrite import rewrite

    adapted = rewrite(gpt(layers=4), [{"lora": {"rank": 4, "targets": ["*.q", "*.v"]}}])
    pins = {"tp": 1, "pp": 1, "dp": 8, "zero": 0}
    whole, part = plan(gpt(layers=4), cluster(), pins=pins), plan(adapted, cluster(), pins=pins)
    trained = part.model.trainable_parameters
    assert trained == 4 * 2 * 4 * (1024 + 1024)
    assert part.cost.bytes.optimizer == 8 * trained
    assert part.cost.bytes.gradients == 4 * trained
    assert part.cost.bytes.activations < whole.cost.bytes.activations
    assert 0.6 < part.cost.compute_seconds / whole.cost.compute_seconds < 0.9


def test_a_tied_head_is_held_on_both_end_stages_and_once_on_one() -> None:
    tied = gpt(layers=4, vocab=32000, tied=True)
    assert solve(tied, cluster(1), job(sequences=4)).model.parameters == 32000 * 1024 + 4 * 12_596_224 + 2048
    one, two = (plan(tied, cluster(n), pins={"tp": 1, "pp": n, "dp": 1}, sequences=8) for n in (1, 2))
    table, rest = 32000 * 1024 * 6, 4 * 12_596_224 * 6
    assert one.cost.bytes.parameters == pytest.approx(table + rest, rel=0.01)
    assert two.cost.bytes.parameters >= table + rest / 4


def test_unlike_links_are_used_for_what_they_are_good_for() -> None:
    made = plan(gpt(layers=8), cluster(4, hosts=2), pins={"tp": 4})
    assert made.plan.mesh.tp * made.plan.mesh.dp * made.plan.mesh.pp == 8
    slow = plan(gpt(layers=8), cluster(1, hosts=8), pins={"tp": 8, "sequence_parallel": True})
    fast = plan(gpt(layers=8), cluster(8), pins={"tp": 8, "sequence_parallel": True})
    assert slow.cost.exposed_communication_seconds > 3 * fast.cost.exposed_communication_seconds


def test_what_does_not_fit_is_explained_with_numbers_and_ways_out() -> None:
    with pytest.raises(InfeasibleError) as caught:
        plan(gpt(layers=8, vocab=32000), tight(0.3))
    text = str(caught.value)
    for part in (
        "MiB per device needed at best",
        "291.8 MiB there",
        "optimizer state",
        "of memory per device",
        "hosts",
    ):
        assert part in text, text


def test_what_the_pins_alone_forbid_names_them() -> None:
    with pytest.raises(InfeasibleError, match=r"leave out the pins \(.*recompute.*\)"):
        plan(gpt(layers=8), tight(1.5), pins={"recompute": "none", "zero": 0, "tp": 1, "pp": 1})


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"tp": 3}, "3 devices a copy"),
        ({"pp": 8, "tp": 2}, "16 devices a copy"),
        ({"tp": 2, "pp": 2, "dp": 4}, "16 devices a copy"),
        ({"cp": 3}, r"cp=3 does not divide the batch.s length of 512"),
        ({"cp": 16}, "16 devices a copy"),
        ({"cp": 2, "context": "ring"}, "ring cannot be with cp=2.*sdpa_attention"),
        ({"microbatch": 3}, "microbatch=3 does not divide"),
        (
            {"schedule": "dualpipev", "pp": 2, "dp": 4, "tp": 1, "microbatch": 4},
            "a micro-batch for each of its 4 stages",
        ),
        ({"schedule": "zbvzerobubble", "pp": 2, "dp": 4, "tp": 1, "zero": 3}, "take zero 0 and 1 only"),
    ],
)
def test_pins_that_cannot_be_are_refused_with_the_arithmetic(pins: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(gpt(layers=8), cluster(), pins=pins)


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(PlanError, match="pp=8 needs at least 8 blocks; the model has 4"):
        plan(gpt(layers=4), cluster(), pins={"pp": 8})


def test_a_batch_that_no_replica_divides_is_refused() -> None:
    with pytest.raises(PlanError, match="7 sequences"):
        plan(gpt(layers=4), cluster(), sequences=7, pins={"dp": 8})


def test_a_time_limit_ends_the_search_with_the_best_so_far_and_a_bound() -> None:
    made = plan(gpt(layers=8), tight(2.0, 8, 8), sequences=256, search={"seconds": 1e-6})
    assert made.search.status in ("time limit", "optimal")
    assert 0 < made.search.bound <= made.search.objective


def test_no_schedule_is_planned_that_torch_refuses_to_run() -> None:
    """1F1B takes a micro-batch for each stage, or more."""
    assert {name for name, _ in schedules(4, 2, 8, Pins())} == {"gpipe", "interleaved1f1b"}
    assert "1f1b" in {name for name, _ in schedules(4, 4, 8, Pins())}


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        (
            dict(schedule="1f1b", pp=4, microbatch=16),
            "4 and 2 micro-batches, of 32 sequences a replica; at least 4 are needed",
        ),
        (dict(virtual_stages=2, pp=1), "virtual_stages 2 need a pipeline, pp > 1"),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_run_is_refused_with_its_numbers(pins: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(gpt(layers=4), tight(80, 4), pins=pins)


def test_pins_and_options_that_could_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence_parallel splits over tp, which is pinned to 1"):
        Pins(tp=1, sequence_parallel=True)


def test_so_much_memory_as_the_message_says_is_enough() -> None:
    assert enough(98.2 * 2**30) == "99 GiB" and enough(98.0 * 2**30) == "98 GiB"
    assert enough(12.34 * 2**20) == "12.4 MiB"


def test_gradients_of_weights_run_apart_where_waiting_costs_more_and_memory_is_there() -> None:
    """Long sequences, few micro-batches over eight stages of equal blocks: the bubble is what is left to save."""
    program, pins = gpt(layers=16), {"pp": 8, "tp": 1, "zero": 0, "microbatch": 1, "recompute": "none"}
    machine = cluster(8, host_bandwidth="64 GB/s")
    asked = job(sequences=16, length=4096, pins=pins)
    made = solve(program, machine, asked)
    assert made.plan.splits
    whole = solve(program, machine, job(sequences=16, length=4096, pins={**pins, "schedule": "interleaved1f1b"}))
    assert made.cost.bubble_seconds < 0.8 * whole.cost.bubble_seconds
    assert made.cost.step_seconds < 0.98 * whole.cost.step_seconds
    less = whole.cost.peak_bytes if whole.cost.peak_bytes < made.cost.peak_bytes else made.cost.peak_bytes * 0.9
    tighter = cluster(8, memory=f"{less * 1.06 / 2**30:.4f} GiB", host_bandwidth="64 GB/s")
    assert solve(program, tighter, asked).cost.peak_bytes <= less * 1.01


def test_a_host_that_computes_pays_for_splitting_small_blocks() -> None:
    """Without an accelerator to hide behind, finding every weight in autograd's graph takes longer than waiting."""
    pins = {"pp": 4, "tp": 1, "dp": 2, "microbatch": 1}
    made = plan(gpt(layers=8), cluster(), pins=pins)
    split = plan(gpt(layers=8), cluster(), pins={**pins, "schedule": "zbvzerobubble"})
    assert not made.plan.splits
    assert split.cost.compute_seconds > 1.2 * made.cost.compute_seconds
    assert split.cost.step_seconds > made.cost.step_seconds
