"""Proofs under hybrid ZeRO: states divided within dp_shard devices, repeated dp_replicate times."""

from __future__ import annotations

from typing import Any

import pytest
from cases import assert_equal, prove_source, source_of

HYBRID = dict(dp=4, dp_shard=2, microbatch=1)
LORA = [{"lora": {"rank": 4, "targets": ["query", "value"]}}]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_hybrid_states_with_tied_weights_and_clipping(zero: int) -> None:
    source = source_of("llama", tie_word_embeddings=True, num_hidden_layers=2)
    assert_equal(prove_source(source, dict(zero=zero, **HYBRID), train={"steps": 10, "clip": 0.05}))


@pytest.mark.parametrize(
    ("zero", "schedule"),
    [(1, {}), (2, dict(schedule="gpipe")), (3, dict(schedule="interleaved1f1b", virtual_stages=2))],
)
def test_hybrid_states_under_a_pipeline_with_tied_weights_and_clipping(zero: int, schedule: dict[str, Any]) -> None:
    source = source_of("llama", tie_word_embeddings=True, num_hidden_layers=4)
    pins = dict(pp=2, zero=zero, **HYBRID, **schedule)
    assert_equal(prove_source(source, pins, sequences=16, train={"steps": 10, "clip": 0.05}))


def test_hybrid_states_of_adapters_under_a_pipeline() -> None:
    assert_equal(prove_source(source_of("llama", num_hidden_layers=3), dict(pp=2, zero=2, **HYBRID), passes=LORA))


def test_hybrid_states_of_a_mixture_of_experts_with_tensor_parallelism() -> None:
    assert_equal(prove_source(source_of("mixtral", num_hidden_layers=1), dict(tp=2, zero=3, **HYBRID)))
