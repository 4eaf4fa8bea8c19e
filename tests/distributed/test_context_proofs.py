"""Proofs of plans that split sequences over cp: loss, gradients and parameters equal one device's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_equal, prove_built, prove_source, source_of
from torch import Tensor

from autopar.errors import PlanError
from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.proof import ignoring

SIZES = dict(layers=2, hidden=64, heads=4, kv_heads=2, ffn=96, vocab=128)
RING, HEADS = dict(cp=2, context="ring"), dict(cp=2, context="all_to_all")


def small(name: str) -> dict[str, Any]:
    return source_of(name, **{"n_layer" if name in ("bloom", "gpt2") else "num_hidden_layers": 2})


@pytest.mark.parametrize(
    "pins",
    [
        dict(RING),
        dict(HEADS),
        dict(cp=4, context="ring"),
        dict(RING, tp=2, sequence_parallel=True, recompute="full"),
        dict(HEADS, tp=1, dp=2, zero=3, microbatch=2),
        dict(RING, dp=2, zero=0, microbatch=1),
        dict(RING, dp=2, dp_replicate=2, zero=2, microbatch=2),
        dict(RING, zero=1, microbatch=4),
        dict(HEADS, zero=2, microbatch=4, recompute="selective"),
        dict(RING, pp=2, microbatch=1, zero=3),
    ],
    ids=str,
)
def test_sequences_split_with_every_other_axis_equal_one_device(pins: dict[str, Any]) -> None:
    found = prove_source(small("llama"), pins, train={"steps": 10, "clip": 0.05})
    assert_equal(found)
    assert found["plan"]["context"]["attention"] == pins["context"]
    assert found["plan"]["context"]["whole"] == [], "nothing is computed twice"


@pytest.mark.parametrize("name", ["gpt2", "falcon-40b", "falcon-7b", "glm", "bert", "mixtral"])
def test_every_family_is_split(name: str) -> None:
    found = prove_source(small(name), dict(cp=2))
    assert_equal(found)
    assert found["plan"]["context"]["attention"]


@pytest.mark.parametrize("name", ["bloom", "gemma2"])
def test_families_that_write_attention_out_gather_keys_and_values(name: str) -> None:
    found = prove_source(small(name), dict(cp=2))
    assert_equal(found)
    assert found["plan"]["context"]["attention"] == ""


def declared(fields: dict[str, Any], passes: list[Any], pins: dict[str, Any], inputs: dict[str, Tensor] | None = None):  # noqa: ANN201
    model = build({**SIZES, **fields}, meta=False, dtype=torch.float64, seed=1)
    found = prove_built(model, ignoring(example_batch(model, 8, 16)) | (inputs or {}), pins, passes=passes)
    assert_equal(found)
    return found["plan"]["context"]


PLACES = torch.arange(16)
DOCUMENTS = {"document_ids": (PLACES // 6).expand(8, 16), "position_ids": (PLACES % 6).expand(8, 16).contiguous()}
BLANKS = {
    "prefix_length": torch.arange(8) % 5,
    "position_ids": torch.stack((PLACES.clamp(max=9), (PLACES - 9).clamp(min=0))).expand(8, 2, 16).contiguous(),
}
FLASH, SDPA = [{"flash_attention": {}}], [{"sdpa_attention": {}}]


@pytest.mark.parametrize(
    ("fields", "passes", "pins", "inputs"),
    [
        (dict(family="bloom", kv_heads=4), FLASH, dict(cp=4, context="ring"), None),
        (dict(family="bloom", kv_heads=4), FLASH, HEADS, None),
        (dict(family="bloom", kv_heads=4), SDPA, RING, None),
        (dict(family="mistral", window=5), FLASH, RING, None),
        (dict(family="mistral", window=5), FLASH, HEADS, None),
        (dict(family="chatglm", kv_heads=4), FLASH, RING, BLANKS),
        (dict(family="chatglm", kv_heads=4), SDPA, RING, BLANKS),
        (dict(family="glm"), SDPA, RING, DOCUMENTS),
        (dict(family="glm"), SDPA, HEADS, DOCUMENTS),
        (dict(family="gpt", kv_heads=4), FLASH, dict(RING, tp=2), None),
        (dict(family="bloom", kv_heads=4), FLASH, dict(HEADS, tp=2), None),
    ],
)
def test_biases_windows_prefixes_and_documents_follow_the_positions(
    fields: dict[str, Any], passes: list[Any], pins: dict[str, Any], inputs: dict[str, Tensor] | None
) -> None:
    assert declared(fields, passes, pins, inputs)["attention"] == pins["context"]


def test_attention_that_is_written_out_gathers_keys_and_values() -> None:
    assert declared(dict(family="llama"), [], dict(cp=2))["attention"] == ""


def test_a_length_in_whole_parts_but_not_in_chunks_is_split_in_plain_order() -> None:
    found = prove_source(small("llama"), RING, length=18, train={"steps": 10})
    assert_equal(found)
    assert not found["plan"]["context"]["zigzag"]


def test_a_length_that_cp_does_not_divide_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(PlanError, match=r"cp=2 does not divide the batch's length of 15 \(15 / 2 = 7.5\)"):
        prove_source(small("llama"), dict(cp=2), length=15)


def test_heads_that_do_not_divide_refuse_the_all_to_all() -> None:
    with pytest.raises(PlanError, match="all_to_all cannot be with cp=2: .*key heads"):
        prove_source(small("falcon-7b"), HEADS)


def test_adapters_and_dropped_parts_of_a_pipeline_are_split() -> None:
    lora = [{"lora": {"rank": 4, "targets": ["query", "value"]}}]
    assert_equal(prove_source(small("llama"), dict(RING, pp=2, microbatch=1, zero=2), passes=lora))


def test_a_relative_bias_that_is_learned_is_split_by_its_rows() -> None:
    assert_equal(prove_source(source_of("t5", num_layers=2), dict(cp=2)))
