"""Data parallelism on two CPU processes: emitted ZeRO 0, 2 and 3 against DistributedDataParallel and FSDP2 by hand.

One step is two micro-batches (forward, backward), the sums over replicas, and AdamW. All sides hold the same weights,
divide by the number of labels of the global batch, and compute the same loss.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from _measure import LR, Row, Step, Times, compared, executable, interleaved, options, report, slowest
from _models import Decoder, Sizes, loss_sum, shifted, text
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from autopar.runtime.engine import Engine
from autopar.runtime.spawn import spawn

RANKS, MICROBATCHES, PER_MICROBATCH, LENGTH = 2, 2, 2, 64
SIZES = Sizes()


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SIZES)


def batch() -> dict[str, torch.Tensor]:
    return text(RANKS * MICROBATCHES * PER_MICROBATCH, LENGTH, SIZES.vocabulary)


def wrapped(whole: Decoder, zero: int) -> nn.Module:
    """The model as it is replicated or sharded by hand."""
    if zero == 0:
        return DistributedDataParallel(whole, gradient_as_bucket_view=True)
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in [*whole.blocks, whole]:
        fully_shard(module, mesh=mesh, reshard_after_forward=zero == 3)
    return whole


def by_hand(zero: int) -> Step:
    module = wrapped(model(), zero)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0, fused=True)
    given = {k: v.chunk(RANKS)[dist.get_rank()].chunk(MICROBATCHES) for k, v in batch().items()}
    parts = list(zip(given["input_ids"], given["labels"], strict=True))

    def step() -> float:
        count = sum((shifted(labels) >= 0).sum() for _, labels in parts)
        assert isinstance(count, torch.Tensor)
        dist.all_reduce(count)
        total = torch.zeros(())
        for i, (ids, labels) in enumerate(parts):
            ends = i == MICROBATCHES - 1
            silent = module.no_sync() if isinstance(module, DistributedDataParallel) and not ends else None
            if isinstance(module, FSDPModule):
                module.set_is_last_backward(ends)
            with silent or contextlib.nullcontext():
                loss = loss_sum(module(ids), labels) * (RANKS / count)  # both wrappers take the mean over ranks
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        return float(total) / RANKS

    return step


def rank_times(folder: str, zero: int, rounds: int) -> Times:
    engine, given = Engine(folder), batch()
    return interleaved({"ours": lambda: engine.step(given), "hand": by_hand(zero)}, rounds)


def measured(zero: int, rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        executable(model(), batch(), Path(folder), devices=RANKS, dp=RANKS, zero=zero, microbatch=PER_MICROBATCH)
        times = slowest(spawn(rank_times, RANKS, folder, zero, rounds, timeout=600.0))
    other = "DistributedDataParallel" if zero == 0 else "fully_shard"
    return compared(f"ZeRO {zero}, against {other} by hand", times, "ours", "hand", 1.03)


def main() -> int:
    given = options(__doc__, rounds=40)
    return report([measured(zero, given.rounds) for zero in (0, 2, 3)], given.check)


if __name__ == "__main__":
    sys.exit(main())
