"""Pipeline schedules: which device has which stages, and what every device does, in torch's own order.

Source: torch.distributed.pipelining.schedules (2.13); `tests/cost/test_schedules.py` compares every list with torch's.
"""

from __future__ import annotations

from functools import lru_cache

FORWARD, BACKWARD, WEIGHT, INPUT = 0, 1, 2, 3
"""A forward, a whole backward, or the two parts of one: gradients of weights, gradients of the stage's inputs."""
Action = tuple[int, int, int]
"""(FORWARD, BACKWARD, WEIGHT or INPUT, stage, micro-batch)."""

SPLIT = frozenset({"interleavedzerobubble", "zbvzerobubble", "dualpipev"})
"""Schedules that run the gradients of weights apart, to fill time in which a device would wait (Qi et al. 2023,
arXiv:2401.10241)."""
V_SHAPED = frozenset({"zbvzerobubble", "dualpipev"})
"""Schedules whose device d of p has the stages d and 2p - 1 - d: the first device has the first and the last."""


def device_of(schedule: str, devices: int, stage: int) -> int:
    """The device along pp that runs a stage."""
    return min(stage, 2 * devices - 1 - stage) if schedule in V_SHAPED and devices > 1 else stage % devices


def stages_of(schedule: str, devices: int, stages: int, device: int) -> list[int]:
    """The stages that a device along pp runs, in order."""
    if schedule in V_SHAPED and devices > 1:
        return [device, stages - 1 - device]
    return list(range(device, stages, devices))


def rounds(microbatches: int, devices: int) -> int | None:
    """Micro-batches in one round of an interleaved schedule; None where torch refuses the number."""
    count = max(1, microbatches // devices)
    return microbatches // count if microbatches % count == 0 else None


def runs(schedule: str, devices: int, microbatches: int) -> bool:
    """Whether torch runs a schedule with so many micro-batches."""
    if schedule == "1f1b":
        return microbatches >= devices
    if schedule == "dualpipev":
        return microbatches >= 2 * devices
    return schedule in ("gpipe", "zbvzerobubble") or rounds(microbatches, devices) is not None


@lru_cache(maxsize=512)
def actions(schedule: str, devices: int, virtual: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """What every device does, in order."""
    if schedule == "gpipe":
        fill = [tuple((FORWARD, d, m) for m in range(microbatches)) for d in range(devices)]
        return tuple(f + tuple((BACKWARD, d, m) for m in range(microbatches)) for d, f in enumerate(fill))
    if schedule == "1f1b":
        return tuple(one_forward_one_backward(d, devices, microbatches) for d in range(devices))
    if schedule in ("interleaved1f1b", "interleavedzerobubble"):
        return tuple(interleaved(d, devices, virtual, microbatches, schedule in SPLIT) for d in range(devices))
    if schedule == "zbvzerobubble":
        return tuple(zero_bubble_v(d, devices, microbatches) for d in range(devices))
    if schedule == "dualpipev":
        return tuple(DualPipe(d, devices, microbatches).order for d in range(devices))
    raise ValueError(f"no timeline for the schedule {schedule!r}")


def one_forward_one_backward(device: int, devices: int, microbatches: int) -> tuple[Action, ...]:
    warm = min(microbatches, devices - device)
    order: list[Action] = [(FORWARD, device, m) for m in range(warm)]
    for m in range(microbatches):
        order.append((BACKWARD, device, m))
        if warm + m < microbatches:
            order.append((FORWARD, device, warm + m))
    return tuple(order)


class Counted:
    """A list of actions, each with the next micro-batch of its kind and stage."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.done: dict[tuple[int, int], int] = {}

    def put(self, kind: int, stage: int) -> None:
        m = self.done.get((kind, stage), 0)
        self.done[kind, stage] = m + 1
        self.actions.append((kind, stage, m))

    def count(self, kind: int, stage: int) -> int:
        return self.done.get((kind, stage), 0)


def interleaved(device: int, devices: int, virtual: int, microbatches: int, split: bool) -> tuple[Action, ...]:
    """torch's `_get_1f1b_rank_ops`; with ``split`` the gradients of weights run apart, ``device`` steps later."""
    each = rounds(microbatches, devices)
    if each is None:
        raise ValueError(f"{microbatches} micro-batches are no multiple of the rounds over {devices} devices")
    total = virtual * microbatches
    warm = min((virtual - 1) * each + (1 if split else 2) * (devices - 1 - device), total)
    made, backwards, weights = Counted(), [], 0
    for step in range(total + warm):
        if step < total:
            made.put(FORWARD, step // each % virtual * devices + device)
        if step >= warm:
            backwards.append((virtual - 1 - (step - warm) // each % virtual) * devices + device)
            made.put(INPUT if split else BACKWARD, backwards[-1])
            if split and step - warm >= device:
                made.put(WEIGHT, backwards[weights])
                weights += 1
    for stage in backwards[weights:] if split else ():
        made.put(WEIGHT, stage)
    return tuple(made.actions)


def zero_bubble_v(device: int, devices: int, microbatches: int) -> tuple[Action, ...]:
    """torch's `ScheduleZBVZeroBubble` (Qi et al. 2023, section 6): where there are fewer than 2p - 1 micro-batches, the
    order of 2p - 1 without those that are not there."""
    most, first, second, made = max(2 * devices - 1, microbatches), device, 2 * devices - 1 - device, Counted()

    def backward(stage: int) -> None:
        made.put(INPUT, stage)
        made.put(WEIGHT, stage)

    for _ in range(2 * (devices - device) - 1):
        made.put(FORWARD, first)
    for _ in range(device):
        made.put(FORWARD, second)
        made.put(FORWARD, first)
    for _ in range(devices - device):
        made.put(FORWARD, second)
        backward(second)
    while made.count(FORWARD, second) < made.count(FORWARD, first) or made.count(FORWARD, first) < most:
        if made.count(FORWARD, first) < most:
            made.put(FORWARD, first)
        backward(first)
        made.put(FORWARD, second)
        backward(second)
    for _ in range(device):
        made.put(INPUT, first)
        made.put(INPUT, second)
    for _ in range(devices - device):
        backward(first)
    for stage in (second, first):
        while made.count(WEIGHT, stage) < made.count(INPUT, stage):
            made.put(WEIGHT, stage)
    return tuple(a for a in made.actions if a[2] < microbatches)


class DualPipe(Counted):
    """torch's `ScheduleDualPipeV` (DeepSeek-AI 2024, arXiv:2412.19437, as a V): most backwards are whole; torch runs the
    forward and the backward of an overlapped pair one after the other."""

    def __init__(self, device: int, devices: int, microbatches: int) -> None:
        super().__init__()
        self.pending: list[Action] = []
        first, second, after = device, 2 * devices - 1 - device, devices - device - 1
        for _ in range(2 * after):
            self.put(FORWARD, first)
        for _ in range(device + 1):
            self.put(FORWARD, first)
            self.put(FORWARD, second)
        for _ in range(after):
            self.backward(second, True)
            self.late()
            self.put(FORWARD, second)
        for _ in range(microbatches - 2 * devices + device + 1):
            self.put(FORWARD, first)
            self.backward(second)
            self.put(FORWARD, second)
            self.backward(first)
        for _ in range(after):
            self.backward(second)
            self.put(FORWARD, second)
            self.backward(first)
        split = False
        for i in range(device + 1):
            half = i == (device + 1) // 2
            split = split or half and device % 2 == 1
            self.backward(second, split)
            split = split or half and device % 2 == 0
            self.backward(first, split)
        for _ in range(after):
            self.late()
            self.backward(first, split)
        while self.pending:
            self.late()

    @property
    def order(self) -> tuple[Action, ...]:
        return tuple(self.actions)

    def backward(self, stage: int, split: bool = False) -> None:
        """The next micro-batch's; with ``split`` its gradients of weights wait."""
        m = self.count(BACKWARD, stage)
        self.done[BACKWARD, stage] = m + 1
        self.actions.append((INPUT if split else BACKWARD, stage, m))
        if split:
            self.pending.append((WEIGHT, stage, m))

    def late(self) -> None:
        """The oldest gradients of weights that wait, if any do."""
        if self.pending:
            self.actions.append(self.pending.pop(0))
