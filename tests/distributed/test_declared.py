"""Proofs over what declared models alone have: their own masks, positions and losses, experts, norms around sublayers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_equal, prove_built
from torch import Tensor

from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.proof import ignoring

SIZES = dict(layers=4, hidden=64, heads=4, kv_heads=2, ffn=96, vocab=128)
TP, PP = dict(tp=2), dict(pp=2, microbatch=1)


def documents(rows: int, length: int) -> dict[str, Tensor]:
    places = torch.arange(length).expand(rows, length)
    return {"document_ids": places // 6, "position_ids": (places % 6).contiguous()}


def blanks(rows: int, length: int) -> dict[str, Tensor]:
    """A prefix and positions in two dimensions, as GLM's objective makes them."""
    place = torch.arange(length)
    two = torch.stack((place.clamp(max=9), (place - 9).clamp(min=0)))
    return {"prefix_length": torch.arange(rows) % 5, "position_ids": two.expand(rows, 2, length).contiguous()}


CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "windows, soft caps, four norms": (dict(family="gemma2", window=5), None, PP),
    "experts": (dict(family="mixtral", moe=dict(experts=4, top=2)), None, PP),
    "experts gathered, a shared one": (
        dict(family="mixtral", moe=dict(experts=4, top=2, dispatch="gathered", shared=32, shared_gate=True)),
        None,
        TP,
    ),
    "packed documents": (dict(family="glm"), documents, PP),
    "blank infilling in two dimensions": (dict(family="chatglm", kv_heads=4), blanks, TP),
    "z-loss, deepnorm, a shrunk embedding gradient": (
        dict(family="gpt", kv_heads=4, positions="sinusoidal", block="deepnorm", z_loss=1e-2, embedding_gradient=0.1),
        None,
        PP,
    ),
    "norms of what is added, dynamic positions": (
        dict(family="olmo2", max_length=8, rope=dict(scaling=dict(kind="dynamic", factor=4))),
        None,
        TP,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_executable_of_a_declared_model_equals_one_device(case: str) -> None:
    fields, inputs, pins = CASES[case]
    model = build({**SIZES, **fields}, meta=False, dtype=torch.float64, seed=1)
    batch = ignoring(example_batch(model, 8, 16))
    assert_equal(prove_built(model, batch | (inputs(8, 16) if inputs else {}), pins))
