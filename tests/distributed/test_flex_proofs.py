"""Programs whose attention is flex_attention under plans, with masks in words and as tensors; in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_equal, job_of, prove_source, source_of
from torch import nn

import autopar
from autopar.models.load import build
from autopar.proof import ignoring, prove_module

FLEX = [{"flex_attention": {}}]


def packed(**more: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A declared model and rows of packed documents, each with a prefix."""
    sizes = dict(family="llama", layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=64)
    model = build({**sizes, **more}, meta=False, dtype=torch.float64, seed=0)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (8, 16), generator=draw)
    documents = torch.randint(0, 2, (8, 16), generator=draw).cumsum(1)
    prefix = torch.randint(0, 9, (8,), generator=draw)
    return model, ignoring({"input_ids": tokens, "labels": tokens, "document_ids": documents, "prefix_length": prefix})


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_masks_of_sizes(family: str) -> None:
    assert_equal(prove_source(source_of(family), dict(tp=2), passes=FLEX))


@pytest.mark.parametrize(
    "pins",
    [
        dict(tp=2, sequence_parallel=True, recompute="selective"),
        dict(pp=2, dp=2, zero=3, microbatch=1, recompute="full"),
    ],
    ids=str,
)
def test_documents_and_prefixes(pins: dict[str, Any]) -> None:
    model, batch = packed()
    assert_equal(prove_module(model, batch, job_of(pins, passes=FLEX)))


def test_alibi_with_documents_by_a_mask() -> None:
    model, batch = packed(family="bloom", kv_heads=4)
    assert_equal(prove_module(model, batch, job_of(dict(tp=2, pp=2, microbatch=2), passes=FLEX)))


def test_with_adapters_in_half_precision() -> None:
    passes = [{"lora": {"rank": 4}}, {"mixed_precision": {}}, *FLEX]
    assert_equal(prove_source(source_of("llama"), dict(tp=2, dp=2, zero=2), passes=passes))


def test_the_emitted_code_calls_the_operator_with_its_words(tmp_path: Path) -> None:
    model, batch = packed()
    job = job_of(dict(tp=2), passes=FLEX)
    autopar.compile(model, job.cluster, batch=batch, passes=FLEX, job=job).save(tmp_path / "b")
    text = (tmp_path / "b/stages/stage_0.py").read_text()
    assert "from autopar import kernels\n" in text and "kernels.flex_attention(" in text
    assert "causal=True" in text and "prefix=prefix" in text and "documents=documents" in text
