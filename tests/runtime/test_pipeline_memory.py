"""What the ranks of a pipeline with several stages each hold at most is what the plan promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar.runtime.spawn import spawn

LENGTH, MICROBATCHES = 64, 8


def measured(folder: str) -> tuple[int, int]:
    """This rank's place along pp, and the most bytes alive in one step on it."""
    from autopar.runtime.engine import Engine
    from autopar.runtime.memory import Meter
    from autopar.runtime.train import alive

    engine, batch, meter = Engine(folder), torch.load(f"{folder}/batch.pt"), Meter(torch.device("cpu"))
    engine.step(batch)
    with meter.first_step(alive(engine)):
        engine.step(batch)
    return engine.world.rank("pp"), meter.read()


def source(layers: int, hidden: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "vocab_size": 512}
    return {"hf": "llama", "config": {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2}}


@pytest.mark.parametrize(
    ("pins", "more"),
    [
        (dict(schedule="interleaved1f1b", virtual_stages=2), {}),
        (dict(schedule="interleavedzerobubble", virtual_stages=1), {}),
        (dict(schedule="interleavedzerobubble", virtual_stages=2, dp=2, zero=1), {}),
        (dict(schedule="zbvzerobubble"), {}),
        (dict(schedule="zbvzerobubble", pp=4), {}),
        (dict(schedule="zbvzerobubble"), dict(passes=[{"lora": {"rank": 4, "targets": ["query", "value"]}}])),
        (dict(schedule="dualpipev", tp=2), {}),
        (dict(schedule="interleavedzerobubble", virtual_stages=2, recompute="full"), {}),
    ],
    ids=str,
)
def test_no_rank_holds_more_than_promised_and_none_much_less(
    tmp_path: Path, pins: dict[str, Any], more: dict[str, Any]
) -> None:
    from autopar.models.batch import example_batch
    from autopar.models.load import build

    pins = {"tp": 1, "dp": 1, "pp": 2, "zero": 0, "microbatch": 4, "recompute": "none", **pins}
    model = source(11 if pins["pp"] == 4 else 8, 128 if pins["tp"] == 2 else 64)
    module = build(model, meta=False, dtype=torch.float32, seed=1)
    batch = example_batch(module, pins["microbatch"] * MICROBATCHES * pins["dp"], LENGTH, source=model)
    devices = pins["pp"] * pins["dp"] * pins["tp"]
    cluster = {"name": "local-cpu", "devices_per_host": devices}
    made = autopar.compile(module, cluster, batch=batch, job={"pins": pins, **more})
    made.save(tmp_path)
    torch.save(batch, tmp_path / "batch.pt")
    for rank, real in spawn(measured, devices, str(tmp_path)):
        promised = made.document.rank_bytes[rank].total
        assert real <= promised <= 1.1 * real, (rank, real, promised)
