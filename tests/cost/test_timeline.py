"""Schedules as events: closed forms where there are some, and torch's own order of actions."""

from __future__ import annotations

import pytest

from autopar.cost.schedules import SPLIT, actions, rounds
from autopar.cost.timeline import in_flight, moments, run, simulate


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
    split = simulate("interleavedzerobubble", [0.5] * 8, [1.0] * 8, [0.0] * 8, 4, 16, parts=[(0.5, 0.5)] * 8)
    assert split.seconds < whole.seconds
    assert split.busy == pytest.approx(whole.busy)


@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 16), (8, 40), (4, 200)])
@pytest.mark.parametrize(("f", "i", "w"), [(1.0, 1.0, 1.0), (1.0, 1.5, 0.8)])
def test_a_zero_bubble_schedule_has_the_published_bubble(p: int, m: int, f: float, i: float, w: float) -> None:
    """Qi et al. 2023 (arXiv:2401.10241), table 2: ZB-H1, which torch's schedule is with one stage a device, waits
    (p - 1) · (F + I - W), where 1F1B waits (p - 1) · (F + I + W); a step of the first device has its whole backwards."""
    done = simulate("interleavedzerobubble", [f] * p, [i + w] * p, [0.0] * p, p, m, parts=[(i, w)] * p)
    assert done.seconds == pytest.approx(m * (f + i + w) + (p - 1) * (f + i - w))


@pytest.mark.parametrize(("p", "m"), [(2, 4), (2, 9), (4, 8), (4, 16), (8, 64), (4, 301)])
def test_a_v_of_equal_thirds_has_no_bubble_but_the_start(p: int, m: int) -> None:
    """Qi et al. 2023, section 6: with F = I = W every device but the first waits for its first micro-batch alone, and ends
    as much later; so no device waits between two of its actions."""
    done = simulate("zbvzerobubble", [0.5] * 2 * p, [1.0] * 2 * p, [0.0] * 2 * p, p, m, parts=[(0.5, 0.5)] * 2 * p)
    assert done.seconds == pytest.approx(3 * m + (p - 1) * 0.5)
    assert done.ends == pytest.approx([3 * m + d * 0.5 for d in range(p)])


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved1f1b", *sorted(SPLIT)])
@pytest.mark.parametrize("count", [200, 36])
def test_extrapolating_the_steady_state_is_exact(schedule: str, count: int) -> None:
    v = 1 if schedule in ("gpipe", "1f1b") else 2
    f = [1.0, 1.1, 0.9, 1.3] * v
    b = [2.0, 2.1, 1.8, 2.2] * v
    parts = [(0.0, 2.0), *((0.6 * x, 0.5 * x) for x in b[1:])]
    send = [0.05] * (4 * v)
    whole = run(schedule, f, b, send, 4, count, parts, False)
    found = simulate(schedule, f, b, send, 4, count, parts=parts)
    assert found.seconds == pytest.approx(whole.seconds, rel=1e-3)
    assert found.busy == pytest.approx(whole.busy, rel=1e-9)


def test_one_forward_one_backward_holds_as_many_as_stages_follow() -> None:
    assert in_flight("1f1b", 4, 1, 16) == (4, 3, 2, 1)
    assert in_flight("1f1b", 4, 1, 2) == (2, 2, 2, 1)
    assert in_flight("gpipe", 4, 1, 16) == (16,) * 4


def test_sending_delays_what_waits_for_it() -> None:
    fast = simulate("1f1b", [1.0] * 4, [2.0] * 4, [0.0] * 3, 4, 8).seconds
    slow = simulate("1f1b", [1.0] * 4, [2.0] * 4, [0.5] * 3, 4, 8).seconds
    assert slow >= fast + 2 * 3 * 0.5


def test_every_forward_has_its_backward_and_nothing_stays_in_flight() -> None:
    for schedule, v in [("gpipe", 1), ("1f1b", 1), ("interleaved1f1b", 2)]:
        for order in actions(schedule, 4, v, 8):
            kinds = [k for k, _, _ in order]
            assert kinds.count(0) == kinds.count(1) == 8 * v
            assert len(set(order)) == len(order)


def test_a_device_holds_the_stages_it_runs() -> None:
    """The first of four devices of a V has the first and the last stage."""
    for moment in moments("interleaved1f1b", 4, 2, 16, 1):
        assert len(moment.flying) == 2 and not any(moment.waiting) and moment.after < 0
    most = max(moments("zbvzerobubble", 4, 2, 16, 0), key=lambda m: sum(m.flying))
    assert (
        sum(most.flying) == 8
    )  # Qi et al. 2023, table 4: ZB-V holds as much as 1F1B, p micro-batches of a whole device


def test_micro_batches_that_torch_refuses_have_no_rounds() -> None:
    assert rounds(8, 4) == 4
    assert rounds(9, 4) is None
    assert rounds(3, 4) == 3
