"""What is made again for the same bytes: our selections beside torch's memory-budget knapsack, and beside selective policies.

First table: a block as torch's joint graph; at the bytes that torch's partitioner keeps under a budget, the FLOPs that it runs
again (a thousandth of its elements for what is no product) and those of our selection. Second table: a training step of
the emitted model under our selection that keeps no more than `torch.utils.checkpoint` does with a policy that keeps the
results of products and of attention, against the same blocks under that policy; and under full recompute.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _joint import joint, problem
from _measure import LINK, LR, Row, Times, compared, interleaved, options, table
from _models import Decoder, FeedForward, Norm, Sizes, text
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import autopar
from autopar.ir.objective import Loss
from autopar.runtime.engine import Engine
from autopar.runtime.spawn import spawn
from autopar.solve.saving import within

SIZES, SEQUENCES, LENGTH = Sizes(), 8, 128
BUDGETS, SOLVERS = (0.2, 0.4, 0.6, 0.8), ("dp", "greedy", "ilp")
SELECTION = "custom_2"
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


class Block(nn.Module):
    """A norm, attention written out, a norm and a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        w = SIZES.width
        self.q, self.k, self.v, self.o = (nn.Linear(w, w, bias=False) for _ in range(4))
        self.first, self.second, self.feed_forward = Norm(w), Norm(w), FeedForward(SIZES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        n = self.first(x)
        q, k, v = (f(n).view(b, s, SIZES.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2) * SIZES.head**-0.5, -1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(b, s, h))
        return x + self.feed_forward(self.second(x))


def knapsack(budget: float, solver: str) -> Row:
    torch.manual_seed(0)
    graph, theirs = joint(Block(), torch.randn(2, LENGTH, SIZES.width), budget, solver)
    what = problem(graph)
    same = what.selection(theirs.again)
    assert same is not None, "what torch chooses is a choice of ours"
    ours = within(what, theirs.bytes)
    ratio = ours.seconds / same.seconds if same.seconds else 1.0
    what_ = f"torch's {solver}, budget {budget:g}: {theirs.bytes / 2**20:.2f} MiB kept"
    return Row(what_, ours.seconds / 1e6, same.seconds / 1e6, ratio, 1.0, unit="MFLOPs again")


def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    total = torch.nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="sum")
    return total, (labels != -100).sum()


def compiled(folder: Path, mode: str) -> str:
    torch.manual_seed(0)
    pins = {"recompute": mode, "microbatch": SEQUENCES}
    job = {"batch": {"sequences": SEQUENCES, "length": LENGTH}, "pins": pins, "optimizer": {"lr": LR}}
    cluster: dict[str, Any] = {"name": "local-cpu", "devices_per_host": 1, "links": [LINK]}
    given: Loss = loss
    batch = text(SEQUENCES, LENGTH, SIZES.vocabulary)
    return str(autopar.compile(Decoder(SIZES), cluster, batch=batch, job=job, loss=given).save(folder))


def by_policy(engine: Engine) -> Engine:
    """The engine's blocks under a selective policy."""

    def policy(_: Any, operator: Any, *args: Any, **more: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    for block in engine.stages[0][2].blocks:  # type: ignore[union-attr]
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    return engine


def rank_times(folders: dict[str, str], rounds: int) -> Times:
    batch = text(SEQUENCES, LENGTH, SIZES.vocabulary)
    engines = {mode: Engine(folder) for mode, folder in folders.items()}
    engines["policy"] = by_policy(engines["policy"])
    return interleaved({mode: functools.partial(e.step, batch) for mode, e in engines.items()}, rounds)


def steps(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        modes = {"none": "none", SELECTION: SELECTION, "full": "full", "policy": "none"}
        folders = {side: compiled(Path(name) / side, mode) for side, mode in modes.items()}
        (times,) = spawn(rank_times, 1, folders, rounds, timeout=600.0)
    return [
        compared(f"{SELECTION}, against a policy that keeps products", times, SELECTION, "policy", 1.0),
        compared(f"{SELECTION}, against full recompute", times, SELECTION, "full", 1.0),
        compared(f"{SELECTION}, against none", times, SELECTION, "none", 1.15),
    ]


def main() -> int:
    given = options(__doc__, rounds=20)
    tables = [[knapsack(b, s) for b in BUDGETS for s in SOLVERS], steps(given.rounds)]
    print("\n\n".join(map(table, tables)), flush=True)
    return int(given.check and any(row.missed for rows in tables for row in rows))


if __name__ == "__main__":
    sys.exit(main())
