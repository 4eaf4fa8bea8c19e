"""A pipeline of two CPU processes: the emitted stages against a hand-written `PipelineStage` under `Schedule1F1B`.

One step is four micro-batches through both stages, and AdamW. Both sides hold the same weights and compute the same loss.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from _measure import LR, Row, Step, Times, compared, executable, interleaved, options, report, slowest
from _models import Decoder, Sizes, loss_sum, shifted, text
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from autopar.runtime.engine import Engine
from autopar.runtime.spawn import spawn

RANKS, MICROBATCHES, PER_MICROBATCH, LENGTH = 2, 4, 2, 64
SIZES = Sizes()


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SIZES)


def batch() -> dict[str, torch.Tensor]:
    return text(MICROBATCHES * PER_MICROBATCH, LENGTH, SIZES.vocabulary)


def part(rank: int, blocks: list[range]) -> nn.Module:
    """This rank's stage of the whole model, cut where the emitted one is."""
    whole = model()
    if rank == 0:
        whole.norm = whole.head = None
    else:
        whole.embedding = None
    whole.blocks = nn.ModuleList(whole.blocks[i] for i in blocks[rank])
    return whole


def by_hand(blocks: list[range]) -> Step:
    rank, given = dist.get_rank(), batch()
    module = part(rank, blocks)
    ids = torch.empty(PER_MICROBATCH, LENGTH, dtype=torch.int64, device="meta")
    hidden = torch.empty(PER_MICROBATCH, LENGTH, SIZES.width, device="meta", requires_grad=True)
    logits = torch.empty(PER_MICROBATCH, LENGTH, SIZES.vocabulary, device="meta", requires_grad=True)
    stage = PipelineStage(
        module,
        rank,
        RANKS,
        torch.device("cpu"),
        input_args=(hidden if rank else ids,),
        output_args=(logits if rank else hidden,),
    )
    count = (shifted(given["labels"]) >= 0).sum()
    schedule = Schedule1F1B(stage, MICROBATCHES, lambda out, y: loss_sum(out, y) / count, scale_grads=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def step() -> float:
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(given["input_ids"])
        else:
            schedule.step(target=given["labels"], losses=losses, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        total = torch.stack(losses).sum().detach() if losses else torch.zeros(())
        dist.broadcast(total, src=RANKS - 1)
        return float(total)

    return step


def rank_times(folder: str, rounds: int) -> Times:
    engine, given = Engine(folder), batch()
    blocks = [range(s.blocks[0], s.blocks[1] + 1) for s in engine.plan.stages]
    return interleaved({"ours": lambda: engine.step(given), "hand": by_hand(blocks)}, rounds)


def measured(rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        pins = {"pp": RANKS, "schedule": "1f1b", "microbatch": PER_MICROBATCH}
        executable(model(), batch(), Path(folder), devices=RANKS, **pins)
        times = slowest(spawn(rank_times, RANKS, folder, rounds, timeout=600.0))
    return compared(f"1F1B, {MICROBATCHES} micro-batches, against Schedule1F1B by hand", times, "ours", "hand", 1.03)


def main() -> int:
    given = options(__doc__, rounds=40)
    return report([measured(given.rounds)], given.check)


if __name__ == "__main__":
    sys.exit(main())
