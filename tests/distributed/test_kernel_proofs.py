"""Programs with kernels under plans: tensor parallel with the vocabulary split, pipelines, ZeRO, recompute; in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_equal, job_of, prove_source, source_of

import autopar
from autopar.cluster.cluster import Cluster
from autopar.models.batch import example_batch
from autopar.models.load import build

KERNELS: list[dict[str, Any]] = [
    {"flash_attention": {}},
    {"fused_norm": {}},
    {"fused_rotary": {}},
    {"fused_glu": {}},
    {"fused_loss": {}},
]
EVEN = {"vocab_size": 252, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "pins",
    [
        dict(tp=2),
        dict(tp=2, sequence_parallel=True, recompute="selective"),
        dict(pp=2, dp=2, zero=3, microbatch=1, recompute="full"),
    ],
    ids=str,
)
def test_all_kernels_under_a_plan(pins: dict[str, Any]) -> None:
    assert_equal(prove_source(source_of("llama", **EVEN), pins, passes=KERNELS))


def test_a_tied_output_layer_whose_loss_is_fused() -> None:
    source = source_of("llama", tie_word_embeddings=True, **EVEN)
    assert_equal(prove_source(source, dict(tp=2), passes=[{"fused_loss": {}}, {"fused_norm": {}}]))


@pytest.mark.parametrize("family", ["bloom", "glm"])
def test_other_families(family: str) -> None:
    layers = {"n_layer": 2} if family == "bloom" else {"num_hidden_layers": 2}
    assert_equal(prove_source(source_of(family, vocab_size=252, **layers), dict(tp=2), passes=KERNELS))


def test_the_emitted_code_splits_the_vocabulary_and_imports_kernels_only_where_there_are_some(tmp_path: Path) -> None:
    model = build(source_of("llama", **EVEN), meta=False, dtype=torch.float64, seed=1)
    batch = example_batch(model, 8, 16)
    for passes, name in ((KERNELS, "with"), ([], "without")):
        job = job_of(dict(tp=2), passes=passes)
        assert job.cluster is not None
        executable = autopar.compile(model, Cluster.load(job.cluster), batch=batch, passes=passes, job=job)
        executable.save(tmp_path / name)
    text = (tmp_path / "with/stages/stage_0.py").read_text()
    for line in (
        "from autopar import kernels\n",
        "vocabulary_linear_cross_entropy(",
        "kernels.flash_attention(",
        "kernels.glu(",
    ):
        assert line in text, line
    assert "kernels" not in (tmp_path / "without/stages/stage_0.py").read_text()
