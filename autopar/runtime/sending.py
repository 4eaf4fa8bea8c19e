"""A pipeline stage that lets go of what it has sent as soon as it knows that it has arrived.

torch's runtime for several stages on a rank keeps every message of a step until the step ends: with gloo and with NCCL
a pending `Work` holds its tensor (torch 2.13). Waiting for a message that has arrived takes no time, and that it has
arrived follows from what comes back: a stage's gradient from the stage behind answers what was sent there, and an
activation from the stage before, whatever that one took before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

FORWARD, BACKWARDS = "FORWARD", ("FULL_BACKWARD", "BACKWARD_INPUT")


class Sender(PipelineStage):
    """Sends for itself; torch's runtime is told of no message."""

    def prepare(self, before: Iterable[Any]) -> None:
        """``before``: the actions, in order, of the rank that has the stage before this one."""
        self.forth: dict[int, list[dist.Work]] = {}
        self.back: dict[int, list[dist.Work]] = {}
        self.answers = answers(before, self.stage_index - 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self.forth[fwd_chunk_id] = [_send(op) for op in super().get_fwd_send_ops(fwd_chunk_id)]
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self.back[bwd_chunk_id] = [_send(op) for op in super().get_bwd_send_ops(bwd_chunk_id)]
        return []

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        for chunk in self.answers.get(fwd_chunk_id, ()):
            _arrived(self.back.pop(chunk, []))
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        _arrived(self.forth.pop(bwd_chunk_id, []))
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def finish(self) -> None:
        """Wait for what is left at the end of a step."""
        for works in (*self.forth.values(), *self.back.values()):
            _arrived(works)
        self.forth.clear()
        self.back.clear()


def answers(actions: Iterable[Any], stage: int) -> dict[int, list[int]]:
    """For every micro-batch that ``stage`` sends on, those whose gradients it took since it sent the one before."""
    found: dict[int, list[int]] = {}
    taken: list[int] = []
    for action in (part for a in actions if a is not None for part in (a.sub_actions or (a,))):
        if action.stage_index != stage:
            continue
        if action.computation_type.name in BACKWARDS:
            taken.append(action.microbatch_index)
        elif action.computation_type.name == FORWARD:
            found[action.microbatch_index], taken = taken, []
    return found


def _send(op: dist.P2POp) -> dist.Work:
    return dist.isend(op.tensor, group=op.group, tag=op.tag, group_dst=op.group_peer)  # type: ignore[return-value]


def _arrived(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
