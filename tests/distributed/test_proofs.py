"""The emitted executable equals one device: loss, every gradient, parameters after two AdamW steps, in float64."""

from __future__ import annotations

import pytest
from cases import FAMILIES, PLANS, assert_equal, prove_source, source_of

EACH = 3
"""Plans per family; llama runs all of them, the others take turns, so that every plan meets several families."""


def turns() -> list[tuple[str, int]]:
    found = [("llama", i) for i in range(len(PLANS))]
    for offset, family in enumerate(f for f in FAMILIES if f != "llama"):
        found += [(family, (3 * offset + 5 * i) % len(PLANS)) for i in range(EACH)]
        if (family, 0) not in found:
            found.append((family, 0))  # every family is split over tp
    return found


def fits(family: str, index: int) -> dict[str, object]:
    """The plan as this family can have it: a stack of three decoder blocks has no three stages of its own."""
    pins = dict(PLANS[index])
    if pins.get("recompute") == "selective" and family == "vit":
        pins["recompute"] = "full"
    return pins


@pytest.mark.parametrize(("family", "index"), turns(), ids=lambda v: str(v))
def test_the_executable_equals_one_device(family: str, index: int) -> None:
    assert_equal(prove_source(source_of(family), fits(family, index)))


@pytest.mark.parametrize(
    "pins", [dict(tp=2), dict(tp=3), dict(pp=2, microbatch=1), dict(pp=2, dp=2, zero=3, microbatch=1)], ids=str
)
def test_nine_query_and_three_key_heads_with_tied_embeddings(pins: dict[str, object]) -> None:
    source = source_of("llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=144, tie_word_embeddings=True)
    assert_equal(prove_source(source, pins))


@pytest.mark.parametrize("pins", [dict(pp=2, microbatch=1), dict(pp=3, microbatch=1)], ids=str)
def test_a_prime_number_of_layers_over_two_and_three_stages(pins: dict[str, object]) -> None:
    assert_equal(prove_source(source_of("llama", num_hidden_layers=7), pins))


@pytest.mark.parametrize("pins", [dict(tp=2), dict(dp=4, zero=3), dict(dp=2, tp=2, zero=1)], ids=str)
def test_a_single_layer(pins: dict[str, object]) -> None:
    assert_equal(prove_source(source_of("llama", num_hidden_layers=1), pins))


@pytest.mark.parametrize(
    "pins",
    [
        dict(tp=2),
        dict(pp=2, microbatch=1),
        dict(dp=2, zero=2, microbatch=1),
        dict(dp=2, zero=3),
        dict(pp=2, tp=2, dp=2, zero=0, microbatch=1),
    ],
    ids=str,
)
def test_frozen_parameters_and_lora(pins: dict[str, object]) -> None:
    passes = [{"lora": {"rank": 4, "targets": ["query", "value"]}}]
    assert_equal(prove_source(source_of("llama"), pins, passes=passes))


def test_lora_on_the_embedding_and_the_last_block_of_a_pipeline() -> None:
    passes = [{"lora": {"rank": 2, "targets": ["embedding", "model.layers.4.mlp.down_proj"]}}]
    assert_equal(prove_source(source_of("llama"), dict(pp=2, tp=2, microbatch=1), passes=passes))


def test_clipping_by_the_global_norm_and_a_schedule() -> None:
    more = dict(
        train={"steps": 10, "clip": 0.05},
        optimizer={"name": "adamw", "lr": 1e-3, "schedule": "cosine", "warmup": 3},
    )
    assert_equal(
        prove_source(source_of("llama", tie_word_embeddings=True), dict(pp=2, tp=2, dp=2, zero=1, microbatch=1), **more)
    )


def test_plain_sgd_with_momentum() -> None:
    optimizer = {"name": "sgd", "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.01}
    assert_equal(prove_source(source_of("gpt2"), dict(dp=2, tp=2, zero=3), optimizer=optimizer))


def test_eight_ranks_of_tensor_parallelism_and_replicas() -> None:
    source = source_of("llama", num_attention_heads=8, num_key_value_heads=4, vocab_size=256)
    assert_equal(prove_source(source, dict(tp=4, dp=2, zero=3)))
