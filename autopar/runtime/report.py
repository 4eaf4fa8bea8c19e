"""What a run leaves behind: a progress bar, metrics.jsonl, summary.json, status.json."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from autopar.plan.plan import PlanDocument

METRICS, SUMMARY, STATUS = "metrics.jsonl", "summary.json", "status.json"
PARTS = ("data_seconds", "passes_seconds", "update_seconds")
APART = 0.15
"""Predicted and measured step time that differ by more than this share of the prediction are explained."""


class Metrics:
    """One line of metrics.jsonl a step; a run that resumes at step n drops the lines from n on."""

    def __init__(self, folder: Path, start: int):
        path = folder / METRICS
        kept = [x for x in _lines(path) if x["step"] <= start] if start else []
        replace(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(path, "a")  # noqa: SIM115 (kept open for the run)
        self.lines = kept

    def add(self, **values: Any) -> None:
        self.lines.append(values)
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Progress:
    """A bar on stderr: loss, tokens/s, time left."""

    def __init__(self, start: int, steps: int):
        from tqdm import tqdm

        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
        self.bar = tqdm(total=steps, initial=start, unit="step", file=sys.stderr, bar_format=form, mininterval=0.5)

    def step(self, loss: float, tokens_per_second: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def summary(metrics: list[dict[str, Any]], own: int, peaks: list[int], document: PlanDocument | None, how: str) -> dict:
    """Predicted beside measured. ``own``: this run's lines are the last ``own``; its first step warms up and measures
    memory, so it is left out of the times where there are others."""
    mine = metrics[-own:] if own else []
    timed = mine[1:] or mine

    def median(key: str) -> float | None:
        return statistics.median(m[key] for m in timed) if timed else None

    predicted = None
    if document is not None:
        cost = document.cost
        by_stage = [s.peak_bytes for s in document.plan.stages]
        predicted = {"step_seconds": cost.step_seconds, "peak_bytes": cost.peak_bytes, "peak_bytes_by_stage": by_stage}
        predicted["tokens_per_second"] = cost.tokens_per_second
        predicted |= {"data_seconds": 0.0, "update_seconds": cost.optimizer_seconds}
        predicted["passes_seconds"] = cost.step_seconds - cost.optimizer_seconds
    measured = {
        **{key: median(key) for key in ("step_seconds", "tokens_per_second", *PARTS)},
        "peak_bytes": max(peaks),
        "peak_bytes_by_rank": peaks,
    }
    return {
        "steps": metrics[-1]["step"] if metrics else 0,
        "first_loss": metrics[0]["loss"] if metrics else None,
        "last_loss": metrics[-1]["loss"] if metrics else None,
        "predicted": predicted,
        "measured": measured,
        "peak_bytes_measures": how,
    }


def table(found: dict[str, Any]) -> str:
    """The summary for people."""
    predicted, measured = found["predicted"] or {}, found["measured"]
    rows = [f"{'':24}{'predicted':>14}{'measured':>14}"]
    for title, key, form in (
        ("seconds per step", "step_seconds", lambda v: f"{v:.4f}"),
        ("  waiting for data", "data_seconds", lambda v: f"{v:.4f}"),
        ("  forward and backward", "passes_seconds", lambda v: f"{v:.4f}"),
        ("  update", "update_seconds", lambda v: f"{v:.4f}"),
        ("tokens per second", "tokens_per_second", lambda v: f"{v:,.0f}"),
        ("peak memory, MiB", "peak_bytes", lambda v: f"{v / 2**20:,.1f}"),
    ):
        cells = [form(v) if (v := side.get(key)) is not None else "–" for side in (predicted, measured)]
        rows.append(f"{title:24}{cells[0]:>14}{cells[1]:>14}")
    ranks = ", ".join(f"{b / 2**20:,.1f}" for b in measured["peak_bytes_by_rank"])
    return "\n".join([*rows, f"peak memory of each rank, MiB: {ranks}", *disagreement(predicted, measured)])


def disagreement(predicted: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """Where the seconds are that were not predicted, if a step takes more than `APART` longer or shorter than predicted."""
    ours, real = predicted.get("step_seconds"), measured["step_seconds"]
    if not ours or not real or abs(real / ours - 1) <= APART:
        return []
    part = max(PARTS, key=lambda key: abs(measured[key] - predicted[key]))
    name = {"data_seconds": "waiting for data", "passes_seconds": "forward, backward and their communication"}
    where = name.get(part, "the update")
    return [
        f"a step takes {real / ours:.2f} times what was predicted; most of the difference is {where}: "
        f"{measured[part]:.4f} s, {predicted[part]:.4f} s predicted",
        *([RECALIBRATE] if part != "data_seconds" else []),
    ]


RECALIBRATE = "(`autopar run … --recalibrate` measures this machine and says which plan is the best for what it does)"


def status(folder: Path, state: str, **details: Any) -> None:
    """How the run stands: ``running``, ``done``, ``interrupted``, ``failed``; `launch` reads it at the end."""
    replace(folder / STATUS, json.dumps({"state": state, **details}))


def failed(folder: Path, rank: int, message: str) -> None:
    """The user's input is wrong, says a rank. Rank 0 prints its own message; of the others the first word counts."""
    path = folder / STATUS
    if rank == 0 or not path.exists() or json.loads(path.read_text())["state"] != "failed":
        status(folder, "failed", rank=rank, message=message)


def replace(path: Path, text: str) -> None:
    """Write a file so that it is never seen half-written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # a line that a killed run did not finish
            break
    return found
