"""What every benchmark here shares: interleaved timing, the table, targets, and making an executable to time."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

import autopar
from autopar.ir.objective import Loss
from autopar.spec.job import Batch, Job, Optimizer, Pins

Step = Callable[[], float]
Times = dict[str, list[float]]
WARM_UP = 3
LR = 1e-3
LINK = {"span": "host", "bandwidth": "10 GB/s", "latency": "50 us"}
"""What plans are priced with: at `local-cpu`'s own, slower link, models this small are not worth splitting at all."""


@dataclass(frozen=True)
class Row:
    """One line of the table. ``ratio`` is met when it is at most (``most``) or at least ``target``; None: no target."""

    what: str
    ours: float
    theirs: float
    ratio: float
    target: float | None = None
    most: bool = True
    unit: str = "ms"

    @property
    def missed(self) -> bool:
        if self.target is None:
            return False
        return self.ratio > self.target if self.most else self.ratio < self.target

    def cells(self) -> list[str]:
        sign = "≤" if self.most else "≥"
        target = "" if self.target is None else f"{sign} {self.target:g}"
        note = "missed" if self.missed else ("met" if self.target is not None else "")
        return [self.what, f"{self.ours:.1f}", f"{self.theirs:.1f}", f"{self.ratio:.3f}", target, note]


def interleaved(sides: Mapping[str, Step], rounds: int) -> Times:
    """Seconds of every side's steps on this rank. One step of each side a round, in turn; all ranks start together.

    Raises ValueError where the sides' first losses differ: they must do the same work to be compared.
    """
    names = list(sides)
    losses = {n: sides[n]() for n in names}
    first = losses[names[0]]
    if any(abs(loss - first) > 1e-3 * abs(first) for loss in losses.values()):
        raise ValueError(f"the sides compute different losses: {losses}")
    times: Times = {n: [] for n in names}
    for i in range(rounds + WARM_UP):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if dist.is_initialized():
                dist.barrier()
            start = time.perf_counter()
            sides[name]()
            if i >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


def slowest(ranks: Sequence[Times]) -> Times:
    """A step takes as long as on its slowest rank."""
    return {n: [max(r[n][i] for r in ranks) for i in range(len(ranks[0][n]))] for n in ranks[0]}


def compared(what: str, times: Times, ours: str, theirs: str, target: float, most: bool = True) -> Row:
    """``most``: ours over theirs, at most the target; otherwise theirs over ours (the speed-up), at least the target.

    A time is the median of a side's steps: the sides take turns, so what else the machine does falls on both.
    """
    mine, other = (1e3 * statistics.median(times[n]) for n in (ours, theirs))
    ratio = mine / other if most else other / mine
    return Row(what, mine, other, ratio, target, most)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    unit = rows[0].unit
    head = ["what", f"ours ({unit})", f"theirs ({unit})", "ratio", "target", ""]
    cells = [head, *(r.cells() for r in rows)]
    widths = [max(len(c[i]) for c in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def options(doc: str | None, rounds: int) -> argparse.Namespace:
    """The command line: ``--rounds N`` and ``--check`` (exit status 1 where a target is missed)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="steps of each side that are timed")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a target is missed")
    return parser.parse_args()


def report(rows: Sequence[Row], check: bool) -> int:
    """Print the table; the exit status."""
    print(table(rows), flush=True)
    return int(check and any(r.missed for r in rows))


def executable(
    model: nn.Module,
    batch: dict[str, Any],
    folder: Path,
    *,
    devices: int = 1,
    loss: Loss | None = None,
    length: int | None = None,
    **pins: Any,
) -> Path:
    """The build folder of ``model`` under the best plan that the pins leave on this machine's cores."""
    cluster: dict[str, Any] = {"name": "local-cpu", "devices_per_host": devices, "links": [LINK]}
    first = next(iter(batch.values()))
    sizes = Batch(sequences=first.shape[0], length=length or (first.shape[1] if first.dim() == 2 else 1))
    job = Job(batch=sizes, pins=Pins(recompute="none", **pins), optimizer=Optimizer(lr=LR))
    return autopar.compile(model, cluster, batch=batch, job=job, loss=loss).save(folder)
