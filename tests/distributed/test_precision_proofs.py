"""Programs with casts equal the unmodified model, in float64: a cast changes nothing but rounding."""

from __future__ import annotations

from typing import Any

import pytest
from cases import assert_equal, prove_source, source_of


@pytest.mark.parametrize(
    ("family", "compute", "pins"),
    [
        ("llama", "bfloat16", dict(tp=2, sequence_parallel=True)),
        ("bloom", "float16", dict(pp=2, dp=2, zero=1, microbatch=1)),
        ("mixtral", "bfloat16", dict(tp=2)),
        ("falcon-7b", "bfloat16", dict(dp=2, zero=3, recompute="full")),
        ("gpt2", "float16", dict(tp=2, dp=2, zero=2)),
    ],
    ids=str,
)
def test_mixed_precision_under_a_plan(family: str, compute: str, pins: dict[str, Any]) -> None:
    assert_equal(prove_source(source_of(family), pins, passes=[{"mixed_precision": {"compute": compute}}]))


def test_mixed_precision_with_lora_on_a_frozen_base_in_half_precision() -> None:
    passes = [
        {"lora": {"rank": 4, "targets": ["query", "value"]}},
        {"mixed_precision": {"compute": "bfloat16", "frozen": "bfloat16"}},
    ]
    assert_equal(prove_source(source_of("llama"), dict(pp=2, dp=2, zero=2, microbatch=1), passes=passes))


@pytest.mark.parametrize("pins", [dict(tp=2), dict(pp=2, dp=2, zero=3, microbatch=1)], ids=str)
def test_fp8_layers_with_adapters_beside_them(pins: dict[str, Any]) -> None:
    passes = [{"lora": {"rank": 4, "targets": ["query", "down"]}}, {"mixed_precision": {}}, {"fp8": {}}]
    assert_equal(prove_source(source_of("llama"), pins, passes=passes))


def test_fp8_layers_alone() -> None:
    assert_equal(prove_source(source_of("llama"), dict(tp=2, dp=2, zero=3), passes=[{"fp8": {}}]))
