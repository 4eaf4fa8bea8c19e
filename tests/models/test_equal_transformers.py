"""Our decoders compute what transformers' compute: logits and gradients, with the same weights, in float64."""

from __future__ import annotations

import pytest
import torch
from reference import Wide, build, fuse, rename
from torch.nn import functional as F

from autopar.models.decoder import Decoder
from autopar.spec.model import resolve

LLAMA = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=61,
)
OURS = dict(layers=2, hidden=48, ffn=80, heads=6, kv_heads=2, vocab=61)
STRETCH = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
FALCON = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    vocab_size=61,
    bias=False,
    parallel_attn=True,
    alibi=False,
)
SMALL = dict(layers=2, hidden=48, heads=6, vocab=61)
QUIET = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
HALF = dict(rope_theta=1e4, partial_rotary_factor=0.5, rope_type="default")

CASES = {
    "llama": ("llama", {**LLAMA, "rms_norm_eps": 1e-5}, dict(family="llama", norm_eps=1e-5, **OURS), "llama"),
    "llama 3.1's stretched rotary positions": (
        "llama",
        {**LLAMA, "rope_parameters": STRETCH},
        dict(
            family="llama",
            rope=dict(
                theta=5e5, scaling=dict(factor=8, low_frequency_factor=1, high_frequency_factor=4, original_length=64)
            ),
            **OURS,
        ),
        "llama",
    ),
    "qwen3": (
        "qwen3",
        {**LLAMA, "head_dim": 12},
        dict(family="llama", head_dim=12, query_key_norm=True, **OURS),
        "llama",
    ),
    "qwen2": (
        "qwen2",
        {**LLAMA, "tie_word_embeddings": True},
        dict(family="llama", tied=True, bias=dict(qkv=True), **OURS),
        "llama",
    ),
    "gpt2": ("gpt2", dict(n_embd=48, n_layer=2, n_head=6, vocab_size=61, **QUIET), dict(family="gpt", **SMALL), "gpt2"),
    "falcon 7b's style": (
        "falcon",
        {**FALCON, "multi_query": True, "new_decoder_architecture": False},
        dict(family="falcon", kv_heads=1, block="parallel", **SMALL),
        "falcon",
    ),
    "falcon 40b's style": (
        "falcon",
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
        dict(family="falcon", kv_heads=2, **SMALL),
        "falcon",
    ),
    "bloom with a number of heads that is no power of two": (
        "bloom",
        dict(hidden_size=48, n_layer=2, n_head=6, vocab_size=61),
        dict(family="bloom", **SMALL),
        "bloom",
    ),
    "mpt": (
        "mpt",
        dict(d_model=48, n_layers=2, n_heads=6, vocab_size=61, expansion_ratio=4, max_seq_len=64),
        dict(family="mpt", **SMALL),
        "mpt",
    ),
    "glm, whose rotary positions and MLP are ChatGLM2's": (
        "glm",
        {
            **LLAMA,
            "head_dim": 8,
            "attention_bias": True,
            "rope_parameters": HALF,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
        },
        dict(family="chatglm2", **OURS),
        "glm",
    ),
}


@pytest.fixture(autouse=True)
def _exact_gelu(monkeypatch):
    """BLOOM's GELU rounds √(2/π) to eight digits and writes its own backward; put the function it stands for."""
    from transformers.models.bloom.modeling_bloom import BloomGelu

    monkeypatch.setattr(BloomGelu, "forward", lambda self, x: F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case):
    model_type, config, ours, names = CASES[case]
    theirs = build(model_type, **config)
    model = Decoder(resolve(ours)).double()
    renamed = _ours(dict(theirs.named_parameters()), names)
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected and set(missing) <= {"head.weight"}, (missing, unexpected)
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    with Wide():
        expected = theirs(input_ids=ids).logits
    got = model(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    gradients = _ours({n: p.grad for n, p in theirs.named_parameters()}, names)
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=0, atol=1e-9 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_padding_is_not_seen_as_in_transformers():
    theirs = build("llama", **LLAMA)
    model = Decoder(resolve(dict(family="llama", **OURS))).double()
    model.load_state_dict(_ours(dict(theirs.named_parameters()), "llama"))
    ids = torch.randint(0, 61, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with Wide():
        expected = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    got = model(ids, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


def _ours(tensors, names):
    if names == "glm":
        return fuse(rename(tensors, "llama"))
    return rename(tensors, names)
