"""Models of many families: traced once per distinct block, equal to the full trace and to the eager model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equality import assert_equal_to_eager, tokens, unfolded
from torch import nn

from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace
from autopar.models.load import build

VOCAB = 67
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
DRY = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
FALCON = {**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, **DRY}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "mistral": {**GROUPED, "sliding_window": 5},
    "falcon_40b": {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_7b": {**FALCON, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    "bloom": {**FALCON, "n_layer": 4, "n_head": 4},
    "gpt2": {**SMALL, "n_positions": 32, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "glm": {**GROUPED, "head_dim": 16},
    "gemma2": {**GROUPED, "head_dim": 16, "sliding_window": 5, "num_hidden_layers": 8},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "gpt_neox": {**SMALL, **DRY},
    "bert": {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {
        "vocab_size": VOCAB,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 5,
        "num_heads": 4,
        "dropout_rate": 0.0,
    },
    "vit": {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 5},
}
DECLARED = {
    "declared_gpt": {"family": "gpt"},
    "declared_llama": {"family": "llama", "kv_heads": 2},
    "declared_bloom": {"family": "bloom"},
}
DISTINCT = {"t5": 2}  # encoder and decoder; their first blocks, which make the position bias, stand alone
SIZES = [(4, 16), (1, 9)]


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in DECLARED:
        sizes = {"layers": 4, "hidden": 64, "ffn": 48, "heads": 4, "vocab": VOCAB, **DECLARED[name]}
        return build(sizes, meta=False)
    config = FAMILIES[name]
    if name == "vit":
        config = {k: v for k, v in config.items() if k not in ("vocab_size", "bos_token_id", "eos_token_id")}
    if name == "t5":
        config = {**config, "decoder_start_token_id": 0}
    return build({"hf": name.split("_4")[0].split("_7")[0], "config": config}, meta=False)


def batch_of(name: str, batch: int, length: int) -> dict[str, Any]:
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16), "labels": torch.randint(5, (batch,))}
    return tokens(VOCAB)(batch, length)


@pytest.mark.parametrize("name", [*FAMILIES, *DECLARED])
def test_a_family_is_traced_once_per_distinct_block_and_computes_the_eager_bits(name: str) -> None:
    model = model_of(name)
    example = batch_of(name, 4, 16)
    folded = trace(model, example)
    assert folded.history == []
    assert folded.sizes
    assert len(folded.blocks) == DISTINCT.get(name, 1)
    assert unfolded(folded) == unfolded(trace(model, example, full=True))
    batches = [batch_of(name, *size) for size in SIZES]
    assert_equal_to_eager(rewrite(folded), model, batches)
