"""Our decoders compute what transformers' compute: logits and gradients, with the same config and weights, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Wide, build, ours, translated
from torch.nn import functional as F

LENGTH = 11
LLAMA: dict[str, Any] = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=61,
    max_position_embeddings=8,  # shorter than the sequences, so that what stretches it shows
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FALCON: dict[str, Any] = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=6, vocab_size=61, new_decoder_architecture=False
)
NEOX: dict[str, Any] = {**LLAMA, "intermediate_size": 192}
QUIET = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
ROPE = dict(rope_theta=1e4, factor=4.0)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {**LLAMA, "rope_parameters": {**ROPE, "rope_type": kind, **more}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**LLAMA, "rms_norm_eps": 1e-5}),
    "llama with biases and wide heads": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama with linear scaling": ("llama", rope("linear")),
    "llama with dynamic NTK scaling": ("llama", rope("dynamic")),
    "llama 3.1's scaling": (
        "llama",
        rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama with YaRN": ("llama", rope("yarn", original_max_position_embeddings=64)),
    "llama with YaRN's options": (
        "llama",
        rope(
            "yarn",
            original_max_position_embeddings=64,
            beta_fast=4.0,
            beta_slow=0.5,
            attention_factor=1.3,
            truncate=False,
        ),
    ),
    "mistral with a window": ("mistral", {**LLAMA, "sliding_window": 4}),
    "qwen2, tied, with a window in its upper layers": (
        "qwen2",
        {**LLAMA, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2 without a window": ("qwen2", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 12}),
    "gemma": ("gemma", {**LLAMA, "head_dim": 12}),
    "gemma2": ("gemma2", {**LLAMA, "head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 20}),
    "phi3 with partial rotation": (
        "phi3",
        {**LLAMA, "rope_parameters": dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)},
    ),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 5}),
    "olmo2": ("olmo2", LLAMA),
    "glm": ("glm", {**LLAMA, "head_dim": 8, "attention_bias": True}),
    "gpt2": ("gpt2", dict(n_embd=48, n_layer=2, n_head=6, vocab_size=61, **QUIET)),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, sequential": ("gpt_neox", {**NEOX, "use_parallel_residual": False}),
    "falcon 7b's style": ("falcon", {**FALCON, "multi_query": True}),
    "falcon 40b's and 180b's style": ("falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon 11b's style, one norm": (
        "falcon",
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    # transformers' eager attention adds Falcon's biases twice, once in the mask; its sdpa, as published, once
    "falcon rw's style: ALiBi, sequential, biases": (
        "falcon",
        {**FALCON, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True, "attention": "sdpa"},
    ),
    "bloom with a number of heads that is no power of two": (
        "bloom",
        dict(hidden_size=48, n_layer=2, n_head=6, vocab_size=61),
    ),
    "mpt": ("mpt", dict(d_model=48, n_layers=2, n_heads=6, vocab_size=61, expansion_ratio=4, max_seq_len=64)),
    "mpt with clipped projections and a scale of its own": (
        "mpt",
        dict(
            d_model=48,
            n_layers=2,
            n_heads=6,
            vocab_size=61,
            max_seq_len=64,
            attn_config=dict(clip_qkv=0.7, softmax_scale=0.2),
        ),
    ),
}


@pytest.fixture(autouse=True)
def _exact_gelu(monkeypatch):
    """BLOOM's GELU rounds √(2/π) to eight digits and writes its own backward; put the function it stands for."""
    from transformers.models.bloom.modeling_bloom import BloomGelu

    monkeypatch.setattr(BloomGelu, "forward", lambda self, x: F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case):
    model_type, config = CASES[case]
    with Wide():
        theirs = build(model_type, **config)
    model = translated(theirs)
    ids = torch.randint(3, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with Wide():
        expected = theirs(input_ids=ids, use_cache=False).logits
    got = model(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    gradients = ours(model, {n: p.grad for n, p in theirs.named_parameters()})
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=0, atol=1e-9 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_padding_is_not_seen_as_in_transformers():
    theirs = build("llama", **LLAMA)
    model = translated(theirs)
    ids = torch.randint(0, 61, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with Wide():
        expected = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    got = model(ids, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)
