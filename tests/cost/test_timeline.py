"""Schedules as events: closed forms where there are some, and torch's own order of actions."""

from __future__ import annotations

import pytest

from autopar.cost.timeline import actions, in_flight, rounds, run, simulate, stage_counts


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 4), (4, 9), (8, 64), (8, 300)])
def test_like_stages_take_m_plus_p_minus_1_turns(schedule: str, p: int, m: int) -> None:
    assert simulate(schedule, [1.0] * p, [2.0] * p, [0.0] * (p - 1), p, m).seconds == pytest.approx(3 * (m + p - 1))


@pytest.mark.parametrize(("p", "v", "m"), [(4, 2, 8), (4, 2, 64), (8, 4, 16)])
def test_interleaving_divides_the_bubble_by_the_stages_of_a_device(p: int, v: int, m: int) -> None:
    """Narayanan et al. 2021, Efficient Large-Scale Language Model Training, section 2.2: bubble (p - 1) / v."""
    done = simulate("interleaved1f1b", [1.0 / v] * (p * v), [2.0 / v] * (p * v), [0.0] * (p * v), p, m)
    assert done.seconds == pytest.approx(3 * (m + (p - 1) / v))


def test_splitting_the_backward_shrinks_the_bubble() -> None:
    whole = simulate("interleaved1f1b", [0.5] * 8, [1.0] * 8, [0.0] * 8, 4, 16)
    split = simulate("interleavedzerobubble", [0.5] * 8, [0.5] * 8, [0.0] * 8, 4, 16, weight=[0.5] * 8)
    assert split.seconds < whole.seconds
    assert split.busy == pytest.approx(whole.busy)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved1f1b"])
def test_extrapolating_the_steady_state_is_exact(schedule: str) -> None:
    v = 2 if "inter" in schedule else 1
    f = [1.0, 1.1, 0.9, 1.3] * v
    b = [2.0, 2.1, 1.8, 2.2] * v
    send = [0.05] * (4 * v)
    whole = run(schedule, f, b, send, 4, 200, (), False)
    assert simulate(schedule, f, b, send, 4, 200).seconds == pytest.approx(whole.seconds, rel=1e-3)


def test_one_forward_one_backward_holds_as_many_as_stages_follow() -> None:
    assert in_flight("1f1b", 4, 1, 16) == (4, 3, 2, 1)
    assert in_flight("1f1b", 4, 1, 2) == (2, 2, 2, 1)
    assert in_flight("gpipe", 4, 1, 16) == (16,) * 4


def test_sending_delays_what_waits_for_it() -> None:
    fast = simulate("1f1b", [1.0] * 4, [2.0] * 4, [0.0] * 3, 4, 8).seconds
    slow = simulate("1f1b", [1.0] * 4, [2.0] * 4, [0.5] * 3, 4, 8).seconds
    assert slow >= fast + 2 * 3 * 0.5


def test_torch_does_the_same_actions_in_the_same_order() -> None:
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, _ComputationType

    names = {_ComputationType.FORWARD: 0, _ComputationType.FULL_BACKWARD: 1}
    for devices, virtual, count in [(2, 2, 4), (4, 2, 8), (4, 3, 8)]:
        schedule = ScheduleInterleaved1F1B.__new__(ScheduleInterleaved1F1B)
        schedule.n_local_stages, schedule.pp_group_size, schedule._n_microbatches = virtual, devices, count
        schedule.microbatches_per_round = rounds(count, devices)  # type: ignore[assignment]
        for d in range(devices):
            theirs = [a for a in schedule._calculate_single_rank_operations(d) if a is not None]
            ours = actions("interleaved1f1b", devices, virtual, count)[d]
            assert [(names[a.computation_type], a.stage_index, a.microbatch_index) for a in theirs] == list(ours)


def test_every_forward_has_its_backward_and_nothing_stays_in_flight() -> None:
    for schedule, v in [("gpipe", 1), ("1f1b", 1), ("interleaved1f1b", 2), ("interleavedzerobubble", 2)]:
        for order in actions(schedule, 4, v, 8):
            kinds = [k for k, _, _ in order]
            assert kinds.count(0) == kinds.count(1) == 8 * v
            assert len(set(order)) == len(order)


def test_a_device_holds_the_stages_it_runs() -> None:
    for d in range(4):
        for counts in stage_counts("interleaved1f1b", 4, 2, 16, d):
            assert set(counts) == {d, d + 4}


def test_micro_batches_that_torch_refuses_have_no_rounds() -> None:
    assert rounds(8, 4) == 4
    assert rounds(9, 4) is None
    assert rounds(3, 4) == 3
