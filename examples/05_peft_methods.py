"""One model, one text, every method of parameter-efficient fine-tuning: a table, and a plot in peft-methods.svg."""

from __future__ import annotations

import inspect
import json.decoder
import statistics
import textwrap
import time
from pathlib import Path

import torch
import yaml

import autopar
from autopar.api import planned
from autopar.cluster.cluster import Cluster
from autopar.ir.program import Program
from autopar.models.load import build
from autopar.spec.job import Job

SETUP = yaml.safe_load(Path(__file__).with_name("peft-methods.yaml").read_text())
SIZES, STEPS, RATE = SETUP["batch"], SETUP["steps"], SETUP["rate"]
COLUMNS = {"trainable": ",.0f", "memory, KiB": ",.0f", "step, ms": ".1f", "loss": ".3f"}


def batches(text: str, steps: int) -> list[dict[str, torch.Tensor]]:
    """Random pieces of a text as bytes, the same for every method."""
    data, draw = torch.tensor(list(text.encode())), torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(data) - SIZES["length"], (steps, SIZES["sequences"]), generator=draw)
    return [{"input_ids": x, "labels": x} for x in data[starts.unsqueeze(-1) + torch.arange(SIZES["length"])]]


def train(program: Program, text: str, steps: int, rate: float) -> tuple[float, float]:
    """Mean loss of the last five steps, and the median seconds of one."""
    module, losses, seconds = program.module(), [], []
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=rate)
    for batch in batches(text, steps):
        start = time.perf_counter()
        total, count = module(**batch)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / count))
        seconds.append(time.perf_counter() - start)
    return statistics.mean(losses[-5:]), statistics.median(seconds)


def plot(rows: dict[str, list[float]]) -> str:
    """Bars, each column on its own scale."""
    parts = [f'<text x="{150 + 160 * c}" y="15">{title}</text>' for c, title in enumerate(COLUMNS)]
    for y, (name, row) in zip(range(36, 10**6, 22), rows.items(), strict=False):
        parts.append(f'<text x="5" y="{y}">{name}</text>')
        for c, (value, style) in enumerate(zip(row, COLUMNS.values(), strict=True)):
            x, wide = 150 + 160 * c, 90 * value / max(r[c] for r in rows.values())
            parts.append(f'<rect x="{x}" y="{y - 11}" width="{wide:.1f}" height="13" fill="#4a7ebb"/>')
            parts.append(f'<text x="{x + 5 + wide:.0f}" y="{y}">{value:{style}}</text>')
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="400" font-size="12">{"".join(parts)}</svg>\n'


def main() -> None:
    text, cluster = inspect.getsource(json.decoder), Cluster.load({"name": "local-cpu", "devices_per_host": 1})
    base = autopar.trace(build(SETUP["model"], meta=False, seed=0), batches(text, 1)[0])
    train(autopar.rewrite(base), inspect.getsource(textwrap), STEPS["before"], RATE["before"])
    learned, rows = {n: t.detach().clone() for n, t in base.tensors.items()}, {}
    for name, passes in SETUP["methods"].items():
        for n, t in base.tensors.items():
            t.data.copy_(learned[n])  # every method begins with the same weights
        program = autopar.rewrite(base, passes)
        plan = planned(program, cluster, Job.model_validate({"batch": SIZES, "pins": {"recompute": "none"}}))
        loss, seconds = train(program, text, STEPS["each"], RATE["each"])
        rows[name] = [plan.model.trainable_parameters, plan.cost.peak_bytes / 1024, 1e3 * seconds, loss]
    print(f"{'method':16}" + "".join(f"{title:>14}" for title in COLUMNS))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{v:14{s}}" for v, s in zip(row, COLUMNS.values(), strict=True)))
    Path("peft-methods.svg").write_text(plot(rows))


if __name__ == "__main__":
    main()
