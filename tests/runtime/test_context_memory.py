"""What devices along cp hold while a step runs, beside what the plan promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar.runtime.spawn import spawn
from tests.cost.models import GPT
from tests.runtime.test_hybrid_memory import measured

LENGTH, HIDDEN, VOCABULARY = 512, 64, 128


def held(folder: Path, pins: dict[str, Any]) -> tuple[int, int, int]:
    """Peak bytes of the fullest rank, those promised, and those of activations by promise."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    batch = {"input_ids": ids, "labels": ids}
    pins = {"tp": 1, "pp": 1, "dp": 1, "microbatch": 1, "recompute": "none", **pins}
    model = GPT(layers=3, hidden=HIDDEN, heads=4, vocab=VOCABULARY, fused=True)
    cluster = {"name": "local-cpu", "devices_per_host": pins["cp"]}
    made = autopar.compile(model, cluster, batch=batch, job={"pins": pins})
    made.save(folder)
    torch.save(batch, folder / "batch.pt")
    found = spawn(measured, pins["cp"], str(folder))
    return max(p for p, _ in found), made.document.cost.peak_bytes, made.document.cost.bytes.activations


@pytest.mark.parametrize("context", ["ring", "all_to_all"])
def test_a_device_along_cp_holds_what_the_plan_promised(tmp_path: Path, context: str) -> None:
    pins = {"zero": 2, "context": context}
    two, promised_two, activations_two = held(tmp_path / "two", {"cp": 2, **pins})
    four, promised_four, activations_four = held(tmp_path / "four", {"cp": 4, **pins})
    assert activations_four == pytest.approx(activations_two / 2, rel=0.01)
    assert 0.85 * promised_two <= two <= promised_two
    assert 0.85 * promised_four <= four <= promised_four
    assert four < 0.7 * two
