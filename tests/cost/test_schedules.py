"""Every schedule's actions are torch's own, in torch's own order."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torchs

from autopar.cost.schedules import BACKWARD, FORWARD, INPUT, SPLIT, WEIGHT, actions, device_of, rounds, runs, stages_of

KINDS = {
    torchs.FORWARD: FORWARD,
    torchs.FULL_BACKWARD: BACKWARD,
    torchs.BACKWARD_INPUT: INPUT,
    torchs.BACKWARD_WEIGHT: WEIGHT,
}
CLASSES = {
    "interleaved1f1b": torchs.ScheduleInterleaved1F1B,
    "interleavedzerobubble": torchs.ScheduleInterleavedZeroBubble,
    "zbvzerobubble": torchs.ScheduleZBVZeroBubble,
    "dualpipev": torchs.ScheduleDualPipeV,
}


def flat(found: list[Any]) -> list[tuple[int, int, int]]:
    """torch's actions without waits, overlapped pairs one after the other as torch runs them."""
    single = [s for a in found if a is not None for s in (a.sub_actions or (a,))]
    return [
        (KINDS[a.computation_type], a.stage_index, a.microbatch_index) for a in single if a.microbatch_index is not None
    ]


def theirs(name: str, devices: int, virtual: int, microbatches: int) -> list[list[tuple[int, int, int]]]:
    """What torch's schedule computes for every rank, no process group needed."""
    made = CLASSES[name].__new__(CLASSES[name])
    made.n_local_stages, made.pp_group_size, made._n_microbatches = virtual, devices, microbatches
    made.num_stages, made.rank = devices * virtual, 0
    made.microbatches_per_round = rounds(microbatches, devices)
    return [flat(made._calculate_single_rank_operations(d)) for d in range(devices)]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("times", [1, 2, 3, 5])
@pytest.mark.parametrize("more", [0, 1, 3])
def test_torch_does_the_same_actions_in_the_same_order(name: str, devices: int, times: int, more: int) -> None:
    microbatches = times * devices + more
    for virtual in (2,) if name in ("zbvzerobubble", "dualpipev") else (1, 2, 3) if name in SPLIT else (2, 3):
        if runs(name, devices, microbatches):
            assert theirs(name, devices, virtual, microbatches) == [
                list(order) for order in actions(name, devices, virtual, microbatches)
            ]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_stage_is_where_torch_expects_it(name: str, devices: int) -> None:
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    style = "v" if name in ("zbvzerobubble", "dualpipev") else "loop"
    wanted = generate_stage_to_rank_mapping(devices, 2 * devices, style)
    assert {s: device_of(name, devices, s) for s in range(2 * devices)} == wanted
    for device in range(devices):
        assert stages_of(name, devices, 2 * devices, device) == [s for s, d in wanted.items() if d == device]
        assert {s for _, s, _ in actions(name, devices, 2, 2 * devices)[device]} == set(
            stages_of(name, devices, 2 * devices, device)
        )


@pytest.mark.parametrize("name", sorted(SPLIT))
def test_every_split_backward_has_both_parts_in_their_order(name: str) -> None:
    for order in actions(name, 4, 2, 12):
        at = {action: i for i, action in enumerate(order)}
        assert len(at) == len(order)
        inputs = [(s, m) for k, s, m in order if k == INPUT]
        assert inputs, "something is split"
        for s, m in inputs:
            assert at[FORWARD, s, m] < at[INPUT, s, m] < at[WEIGHT, s, m]
        done = inputs + [(s, m) for k, s, m in order if k == BACKWARD]
        assert sorted(done) == sorted((s, m) for k, s, m in order if k == FORWARD)
        assert sorted(inputs) == sorted((s, m) for k, s, m in order if k == WEIGHT)
