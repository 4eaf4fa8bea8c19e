"""Dropout under a plan: ranks agree where a tensor is whole, and recomputation repeats the masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import job_of, source_of

import autopar
from autopar.api import planned
from autopar.cluster.cluster import Cluster
from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.runtime.spawn import spawn


def trained(folder: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps, and this rank's copies of the parameters that every rank along tp holds whole."""
    from autopar.runtime.engine import Engine

    engine = Engine(folder)
    stored = torch.load(f"{folder}/batch.pt")
    losses = [engine.step(stored) for _ in range(3)]
    return losses, {h.name: h.local.clone() for h in engine.held if str(h.entry.placement) == "R"}


def run(folder: Path, pins: dict[str, Any]) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    source = source_of("gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    model = build(source, meta=False, seed=1)
    job = job_of(pins)
    assert job.batch is not None
    batch = example_batch(model, job.batch.sequences, job.batch.length, source=source)
    program = autopar.rewrite(autopar.trace(model, batch))
    document = planned(program, Cluster.load(job.cluster), job)
    autopar.Executable(program, document, job).save(folder)
    torch.save(batch, folder / "batch.pt")
    return spawn(trained, document.plan.mesh.devices, str(folder))


def test_ranks_along_tp_drop_the_same_where_a_tensor_is_whole(tmp_path: Path) -> None:
    (losses, first), (other_losses, second) = run(tmp_path / "a", dict(tp=2, microbatch=4))
    assert losses == other_losses
    assert first.keys() == second.keys() and len(first) > 0
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_recomputing_repeats_the_masks(tmp_path: Path) -> None:
    plain = run(tmp_path / "a", dict(tp=2, microbatch=4, recompute="none"))[0][0]
    full = run(tmp_path / "b", dict(tp=2, microbatch=4, recompute="full"))[0][0]
    assert max(abs(a - b) for a, b in zip(plain, full, strict=True)) < 1e-5


def test_a_run_is_the_same_again_and_another_seed_is_another_run(tmp_path: Path) -> None:
    once = run(tmp_path / "a", dict(dp=2, microbatch=4))[0][0]
    again = run(tmp_path / "b", dict(dp=2, microbatch=4))[0][0]
    assert once == again
