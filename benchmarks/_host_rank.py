"""One rank of `hosts.py`, under torchrun: the steps of a build folder, or what the link between the hosts carries."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from autopar.runtime.world import leave

MESSAGES = (64, 2**20)  # bytes
ROUNDS = 7


def link() -> list[list[float]]:
    """(bytes, seconds) of an all-reduce between the first ranks of the two hosts: medians."""
    group = dist.new_group([0, dist.get_world_size() // 2])
    found = []
    for size in MESSAGES:
        tensor, times = torch.ones(size // 4), []
        for _ in range(ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            if dist.get_rank() in (0, dist.get_world_size() // 2):
                dist.all_reduce(tensor, group=group)
            times.append(time.perf_counter() - start)
        found.append([size, sorted(times[1:])[len(times) // 2]])
    return found


def steps(folder: str, count: int) -> list[float]:
    from autopar.runtime.engine import Engine

    engine, batch, times = Engine(folder), torch.load(f"{folder}/batch.pt"), []
    for i in range(count + 2):
        engine.world.barrier()
        start = time.perf_counter()
        engine.step(batch)
        engine.world.barrier()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    what, out, count = sys.argv[1:4]
    result = link() if what == "link" else steps(what, int(count))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
    dist.barrier()
    leave(0)
