"""Schedules that run the gradients of weights apart equal one device: loss, every gradient, parameters after two steps."""

from __future__ import annotations

from typing import Any

import pytest
from cases import assert_equal, prove_source, source_of

LAYERS = {"num_hidden_layers": 7}
TIED = {"tie_word_embeddings": True, **LAYERS}
CLIPPED = {"train": {"clip": 0.5}}
ZB, ZBV, DUAL = "interleavedzerobubble", "zbvzerobubble", "dualpipev"


@pytest.mark.parametrize(
    ("pins", "changes"),
    [
        (dict(pp=2, schedule=ZB, virtual_stages=1), LAYERS),
        (dict(pp=2, schedule=ZB, virtual_stages=3), LAYERS),
        (dict(pp=2, schedule=ZBV), LAYERS),
        (dict(pp=2, schedule=DUAL), LAYERS),
        (dict(pp=4, schedule=ZB, virtual_stages=1), LAYERS),
        (dict(pp=4, schedule=ZBV), {"num_hidden_layers": 11}),
        (dict(pp=4, schedule=DUAL), {"num_hidden_layers": 11}),
    ],
    ids=str,
)
def test_a_prime_number_of_layers_over_two_and_four_devices(pins: dict[str, Any], changes: dict[str, Any]) -> None:
    assert_equal(prove_source(source_of("llama", **changes), {**pins, "microbatch": 1}))


@pytest.mark.parametrize(
    "pins",
    [
        dict(pp=2, tp=2, schedule=ZBV),
        dict(pp=2, dp=2, zero=1, schedule=DUAL),
        dict(pp=2, dp=2, zero=0, schedule=ZB, virtual_stages=3),
        dict(pp=2, tp=2, dp=2, zero=1, schedule=ZBV),
        dict(pp=2, dp=4, dp_replicate=2, zero=1, schedule=ZB, virtual_stages=2),
    ],
    ids=str,
)
def test_with_other_axes_tied_embeddings_and_clipping(pins: dict[str, Any]) -> None:
    """In a V the first and the last stage, each with its copy of the tied embedding, are on one rank."""
    assert_equal(prove_source(source_of("llama", **TIED), {**pins, "microbatch": 1}, **CLIPPED))


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize(
    "pins",
    [dict(pp=2, tp=2, schedule=ZB, virtual_stages=2), dict(pp=2, schedule=ZBV), dict(pp=2, schedule=DUAL)],
    ids=str,
)
def test_stages_that_are_recomputed_run_their_backward_whole(pins: dict[str, Any], recompute: str) -> None:
    assert_equal(prove_source(source_of("llama", **LAYERS), {**pins, "microbatch": 1, "recompute": recompute}))


@pytest.mark.parametrize(
    "adapter",
    [
        {"lora": {"rank": 4, "targets": ["query", "value"]}},
        {"dora": {"rank": 4, "targets": ["query", "down"]}},
        {"prefix_tuning": {"tokens": 3, "projection": 16}},
        {"prompt_tuning": {"tokens": 3}},
    ],
    ids=lambda a: next(iter(a)),
)
@pytest.mark.parametrize("pins", [dict(pp=2, tp=2, schedule=ZBV), dict(pp=2, dp=2, zero=1, schedule=ZB)], ids=str)
def test_frozen_parameters_and_adapters(pins: dict[str, Any], adapter: dict[str, Any]) -> None:
    assert_equal(prove_source(source_of("llama", **LAYERS), {**pins, "microbatch": 1}, passes=[adapter]))


@pytest.mark.parametrize(
    ("family", "pins"),
    [
        ("gpt2", dict(pp=2, tp=2, schedule=ZBV)),
        ("bloom", dict(pp=2, schedule=DUAL)),
        ("falcon-7b", dict(pp=2, tp=2, schedule=ZB)),
        ("gemma2", dict(pp=2, tp=2, schedule=DUAL)),
        ("qwen3", dict(pp=2, dp=2, zero=1, schedule=ZB)),
        ("mixtral", dict(pp=2, schedule=ZBV)),
        ("bert", dict(pp=2, schedule=ZBV)),
    ],
)
def test_every_kind_of_family(family: str, pins: dict[str, Any]) -> None:
    assert_equal(prove_source(source_of(family), {**pins, "microbatch": 1}))


@pytest.mark.parametrize("pins", [dict(pp=2, schedule=ZBV), dict(pp=2, dp=2, zero=1, schedule=ZB)], ids=str)
def test_a_stage_that_trains_what_it_does_not_receive_runs_its_backward_whole(pins: dict[str, Any]) -> None:
    """T5's decoder begins, in a later stage, with an embedding and a position bias of its own, and hands the bias on."""
    assert_equal(prove_source(source_of("t5"), {**pins, "virtual_stages": 2, "microbatch": 1}))
