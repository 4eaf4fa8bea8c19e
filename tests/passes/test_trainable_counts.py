"""Trainable parameters as printed: by peft (huggingface/peft, the files named) and in the README of LLaMA-Adapter."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import autopar
from autopar.ir.program import Program
from autopar.models.load import build

BLOOM = {"hf": "bloom", "config": dict(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16)}
QWEN = {"hf": "qwen2", "config": dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                                      num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True)}  # fmt: skip
LLAMA = {"hf": "llama", "config": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                       num_attention_heads=32)}  # fmt: skip
ROWS: list[tuple[dict[str, Any], dict[str, Any], int, str]] = [
    (QWEN, {"lora": {"rank": 16}}, 3686400, "README.md:57, Qwen2.5-3B-Instruct"),
    (BLOOM, {"prompt_tuning": {"tokens": 20, "encoder": 128}}, 300288, "docs/source/package_reference/p_tuning.md:48"),
    (BLOOM, {"prompt_tuning": {"tokens": 8}}, 8192, "docs/source/package_reference/prompt_tuning.md:54"),
    (BLOOM, {"prefix_tuning": {"tokens": 30}}, 1474560, "examples/causal_language_modeling/peft_prefix_tuning_clm.ipynb:314"),
    # 1.2M printed (OpenGVLab/LLaMA-Adapter README.md:59): 30 layers × (10 vectors of 4096, a gate for each of 32 heads)
    (LLAMA, {"llama_adapter": {"tokens": 10, "layers": 30, "gates": "head"}}, 1229760, "LLaMA-Adapter README.md:59"),
]  # fmt: skip


@cache
def program(name: str) -> Program:
    model = build({"bloom": BLOOM, "qwen2": QWEN, "llama": LLAMA}[name], meta=True)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return autopar.rewrite(autopar.trace(model, {"input_ids": ids, "labels": ids}))


@pytest.mark.parametrize(("model", "passes", "printed", "source"), ROWS, ids=lambda v: str(v)[:40])
def test_as_many_parameters_are_trained_as_printed(model: Any, passes: Any, printed: int, source: str) -> None:
    adapted = autopar.rewrite(program(model["hf"]), [passes])
    assert sum(p.numel for p in adapted.parameters.values() if p.trainable) == printed, source


def test_all_parameters_are_as_many_as_printed() -> None:
    """559,222,784 with a prompt of 8 vectors, 3,089,625,088 with LoRA of rank 16; a tied head counts once."""
    for model, passes, printed in ((BLOOM, ROWS[2][1], 559222784), (QWEN, ROWS[0][1], 3089625088)):
        adapted = autopar.rewrite(program(model["hf"]), [passes])
        assert sum(p.numel for p in adapted.parameters.values() if p.alias_of is None) == printed
