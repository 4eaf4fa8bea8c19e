"""Selections of recompute under plans: pipelines, tensor parallelism with its collectives run again, ZeRO; in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_equal, ignoring, job_of, prove_source, source_of

import autopar
from autopar.cluster.cluster import Cluster
from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.plan.plan import Selected
from autopar.proof import float64, prove_module
from autopar.solve.search import solve


@pytest.mark.parametrize(
    ("family", "pins"),
    [
        ("llama", dict(tp=2, recompute="custom_4")),
        ("gpt2", dict(dp=2, zero=3, recompute="custom_3")),
        ("llama", dict(pp=2, tp=2, dp=2, zero=2, microbatch=1, recompute="custom_5")),
        ("bloom", dict(pp=2, microbatch=1, recompute="custom_2")),
        ("glm", dict(tp=2, sequence_parallel=True, recompute="custom_5")),
        ("falcon-40b", dict(pp=2, schedule="interleaved1f1b", virtual_stages=2, microbatch=1, recompute="custom_4")),
    ],
    ids=str,
)
def test_selections_equal_one_device(family: str, pins: dict[str, Any]) -> None:
    proof = prove_source(source_of(family, **({"num_hidden_layers": 4} if family == "llama" else {})), pins)
    assert_equal(proof)
    assert all(mode.startswith("custom_") for s in proof["plan"]["stages"] for mode in s["recompute_each"])


def test_blocks_of_a_stage_recomputed_each_in_its_own_way_equal_one_device() -> None:
    source = source_of("llama")
    model = build(source, meta=False, dtype=torch.float64, seed=1)
    job = job_of(dict(tp=2, dp=2, zero=1, microbatch=2))
    batch = ignoring(example_batch(model, 8, 16, source=source))
    with float64():
        program = autopar.rewrite(autopar.trace(model.double(), batch))
        found: dict[str, Selected] = {}
        for mode in ("custom_1", "custom_3"):
            pins = job.pins.model_copy(update={"recompute": mode})
            plan = solve(program, Cluster.load(job.cluster), job.model_copy(update={"pins": pins})).plan
            found |= plan.recompute_groups["block_0"]
    each = ("none", "custom_1", "full", "custom_3", "selective")
    stage = plan.stages[0].model_copy(update={"recompute": each})
    mixed = plan.model_copy(update={"stages": (stage,), "recompute_groups": {"block_0": found}})
    assert_equal(prove_module(model, batch, job, plan=mixed))
