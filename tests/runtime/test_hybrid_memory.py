"""Hybrid ZeRO over n devices holds, while running and by promise, what ZeRO over a dp of n holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import autopar
from autopar.runtime.spawn import spawn

HIDDEN, LAYERS = 96, 4


class Stack(nn.Module):
    """Parameters weigh more than what one small batch makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.ReLU(), nn.Linear(4 * HIDDEN, HIDDEN))
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def measured(folder: str) -> tuple[int, int]:
    """The most bytes alive in one step on this rank, and the elements of parameters it keeps between steps."""
    from autopar.runtime.engine import Engine
    from autopar.runtime.memory import Meter
    from autopar.runtime.train import alive

    engine, batch, meter = Engine(folder), torch.load(f"{folder}/batch.pt"), Meter(torch.device("cpu"))
    engine.step(batch)
    with meter.first_step(alive(engine)):
        engine.step(batch)
    return meter.read(), sum(h.local.numel() for h in engine.held)


def held(folder: Path, dp: int, zero: int) -> tuple[int, int, int]:
    """Peak bytes of the fullest rank, those promised, and the elements that all ranks keep; state over two devices."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(4 * dp, HIDDEN), "labels": torch.randint(0, 10, (4 * dp,))}
    pins = {"dp": dp, "dp_shard": 2, "zero": zero, "pp": 1, "tp": 1, "microbatch": 2, "recompute": "none"}
    made = autopar.compile(Stack(), {"name": "local-cpu", "devices_per_host": dp}, batch=batch, job={"pins": pins})
    made.save(folder)
    torch.save(batch, folder / "batch.pt")
    found = spawn(measured, dp, str(folder))
    return max(p for p, _ in found), made.document.cost.peak_bytes, sum(n for _, n in found)


@pytest.mark.parametrize("zero", [2, 3])
def test_replicas_of_a_state_take_no_more_on_a_device(tmp_path: Path, zero: int) -> None:
    alone, promised, elements = held(tmp_path / "alone", 2, zero)
    hybrid, same, twice = held(tmp_path / "hybrid", 4, zero)
    assert twice == 2 * elements, "two replicas"
    assert same == promised
    assert hybrid == pytest.approx(alone, rel=0.01)
    if zero == 3:
        assert 0.9 * promised <= hybrid <= promised
