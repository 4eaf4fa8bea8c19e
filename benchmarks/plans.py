"""Predicted against measured: at least 30 plans of three models on 2 and 4 CPU processes.

The machine is calibrated first; every plan is priced with what that gave, built, and run. Printed: step time and peak
memory of every plan, predicted and measured; Spearman's rank correlation of each group; how the plan that the search
chooses does against the fastest one measured. Memory is bytes of tensors alive at the worst moment of the fullest rank.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import autopar
from autopar.cluster.calibrate import calibrate
from autopar.errors import AutoparError
from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.runtime.engine import Engine
from autopar.runtime.memory import Meter
from autopar.runtime.spawn import spawn
from autopar.runtime.train import alive
from autopar.spec.job import Batch, Job, Pins

MODELS = {
    "llama": {"hf": "llama", "config": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6,
              num_attention_heads=8, num_key_value_heads=4, vocab_size=2048)},
    "gpt2": {"hf": "gpt2", "config": dict(n_embd=256, n_layer=4, n_head=8, vocab_size=8192)},
    "bloom": {"hf": "bloom", "config": dict(hidden_size=320, n_layer=4, n_head=10, vocab_size=1024)},
}  # fmt: skip
SEQUENCES, LENGTH = 8, 128
CORRELATION, CHOSEN, MEMORY = 0.9, 1.05, 1.10  # targets: at least, at most, at most


@dataclass(frozen=True)
class Measured:
    """A plan's predicted and measured seconds of a step and bytes at the peak."""

    model: str
    ranks: int
    plan: str
    predicted: float
    measured: float
    predicted_bytes: int
    measured_bytes: int
    chosen: bool = False


def this_machine(ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """The machine as ``ranks`` processes found it: more of them than cores share the cores."""
    return {**found, "name": f"this machine, {ranks} processes"}


def pinned(ranks: int, count: int, seed: int) -> Iterator[Pins]:
    """Different plans for so many ranks, in a random order that is always the same."""
    found = []
    for tp in (1, 2, 4):
        for pp in (1, 2, 4):
            dp = ranks // (tp * pp)
            if tp * pp * dp != ranks:
                continue
            for zero in (0, 1, 2, 3) if dp > 1 else (0,):
                for microbatch in (1, 2, 4, 8):
                    for schedule in ("1f1b", "gpipe") if pp > 1 else ("1f1b",):
                        for recompute in ("none", "full"):
                            if SEQUENCES % (dp * microbatch) == 0 and SEQUENCES // (dp * microbatch) >= pp:
                                found.append(Pins(tp=tp, pp=pp, dp=dp, zero=zero, microbatch=microbatch,
                                                  schedule=schedule, recompute=recompute))  # fmt: skip
    random.Random(seed).shuffle(found)
    yield from found[:count]


def executable(name: str, cluster: dict[str, Any], pins: Pins, folder: Path) -> autopar.Executable:
    source = MODELS[name]
    model = build(source, meta=False, seed=0)
    batch = example_batch(model, SEQUENCES, LENGTH, source=source)
    job = Job(batch=Batch(sequences=SEQUENCES, length=LENGTH), pins=pins)
    made = autopar.compile(model, cluster, batch=batch, job=job)
    made.save(folder)
    torch.save(dict(batch), folder / "batch.pt")
    return made


def run(folder: str, steps: int) -> tuple[list[float], int]:
    """Seconds of every step of this rank, and its peak bytes."""
    engine, batch = Engine(folder), torch.load(f"{folder}/batch.pt")
    meter, times = Meter(torch.device("cpu")), []
    engine.step(batch)
    with meter.first_step(alive(engine)):
        engine.step(batch)
    for _ in range(steps + 1):
        engine.world.barrier()
        begin = time.perf_counter()
        engine.step(batch)
        times.append(time.perf_counter() - begin)
    return times[1:], meter.read()


def measured(name: str, ranks: int, cluster: dict[str, Any], pins: Pins, steps: int, chosen: bool = False) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        document = executable(name, cluster, pins, Path(folder)).document
        results = spawn(run, ranks, folder, steps)
    seconds = [max(r[0][i] for r in results) for i in range(steps)]
    plan, mesh = document.plan, document.plan.mesh
    text = f"tp {mesh.tp} pp {mesh.pp} dp {mesh.dp} zero {plan.zero} mb {plan.microbatch} {plan.schedule} "
    text += "+".join(sorted({r for s in plan.stages for r in s.recompute})) or "none"
    return Measured(
        name, ranks, text, document.cost.step_seconds, min(seconds), document.cost.peak_bytes,
        max(r[1] for r in results), chosen,
    )  # fmt: skip


def ranks_of(values: list[float]) -> list[float]:
    """Average ranks, ties shared."""
    order = sorted(values)
    return [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]


def correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    x, y = (torch.tensor(ranks_of(v), dtype=torch.float64) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()))


def told(rows: list[Measured]) -> Iterator[str]:
    yield "| plan | predicted (ms) | measured (ms) | ratio | predicted (MiB) | measured (MiB) | ratio |"
    yield "|---|---|---|---|---|---|---|"
    for r in sorted(rows, key=lambda r: r.measured):
        mark = " ← chosen" if r.chosen else ""
        yield (
            f"| {r.plan}{mark} | {1e3 * r.predicted:.0f} | {1e3 * r.measured:.0f} | {r.predicted / r.measured:.2f} | "
            f"{r.predicted_bytes / 2**20:.1f} | {r.measured_bytes / 2**20:.1f} | {r.predicted_bytes / r.measured_bytes:.3f} |"
        )


def verdict(rows: list[Measured]) -> tuple[str, bool]:
    """The group's numbers in a line, and whether all targets are met."""
    rho = correlation([r.predicted for r in rows], [r.measured for r in rows])
    chosen = next(r for r in rows if r.chosen).measured / min(r.measured for r in rows)
    memory = [r.predicted_bytes / r.measured_bytes for r in rows]
    text = (
        f"{rows[0].model} on {rows[0].ranks}: rank correlation {rho:.3f} (target ≥ {CORRELATION}), chosen / fastest {chosen:.3f} "
        f"(≤ {CHOSEN}), memory {min(memory):.3f} to {max(memory):.3f} (1 to {MEMORY})"
    )
    return text, rho >= CORRELATION and chosen <= CHOSEN and min(memory) >= 1 and max(memory) <= MEMORY


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=5, help="pinned plans of each model on each number of processes")
    parser.add_argument("--rounds", type=int, default=6, help="steps timed of each plan; the fastest counts")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a target is missed")
    asked = parser.parse_args()
    machines, missed, everything = {ranks: calibrate(ranks) for ranks in asked.ranks}, False, []
    for name in asked.models:
        for ranks in asked.ranks:
            cluster, rows = this_machine(ranks, machines[ranks]), []
            rows.append(measured(name, ranks, cluster, Pins(), asked.rounds, chosen=True))
            for pins in pinned(ranks, asked.plans, seed=ranks):
                try:
                    rows.append(measured(name, ranks, cluster, pins, asked.rounds))
                except AutoparError as error:
                    print(f"left out: {error}", file=sys.stderr)
            text, met = verdict(rows)
            print("\n".join([f"\n{text}\n", *told(rows)]), flush=True)
            missed |= not met
            everything += rows
    print(f"\n{len(everything)} plans", flush=True)
    return int(asked.check and missed)


if __name__ == "__main__":
    sys.exit(main())
