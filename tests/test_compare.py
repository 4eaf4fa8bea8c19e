"""`autopar compare`: what is read off the traced graphs, against closed forms, configs and published numbers."""

from __future__ import annotations

import json

import pytest

from autopar import cli
from autopar.compare.rows import compare_models, row
from autopar.models.load import build
from autopar.spec.model import DecoderSpec, resolve
from autopar.spec.origin import read_origin
from autopar.spec.source import Source

LENGTH = 64
OURS = dict(layers=3, hidden=64, ffn=96, heads=4, vocab=250)
THEIRS = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=250,
)


def of(model) -> dict:
    return row(read_origin(Source(model, "test")), LENGTH)


def flops(spec: DecoderSpec) -> float:
    """Six for every weight that multiplies a token, twelve for every layer, entry of the heads and token of the sequence."""
    width, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    inner = 3 if spec.gated else 2
    mlp = inner * spec.hidden * spec.ffn
    if spec.moe is not None:
        mlp = spec.moe.top * mlp + spec.hidden * spec.moe.experts
    each = spec.hidden * (2 * width + 2 * kv) + mlp
    return 6 * (spec.layers * each + spec.hidden * spec.vocab) + 12 * spec.layers * width * LENGTH


DECLARED = {  # family → fields, and what stands in its row: positions, norm, activation, block, attention
    "bloom": ({}, ("ALiBi", "LayerNorm, eps 1e-05, pre", "gelu_tanh", "sequential, 2 norms", "multi-head, 4 heads")),
    "falcon": (
        {"kv_heads": 1, "block": "parallel"},
        ("rotary (half), 16 of 16", "LayerNorm, eps 1e-05, pre", "gelu", "parallel, 1 norm", "multi-query, 4 query and 1"),
    ),
    "chatglm": (
        {},
        ("rotary (half) in two dimensions, 16 of 16", "LayerNorm, eps 1e-05, post", "gelu_tanh", "sequential", "multi-head"),
    ),
    "chatglm2": (
        {"kv_heads": 2},
        ("rotary (interleaved), 8 of 16", "RMSNorm, eps 1e-05, pre", "silu, gated", "sequential", "grouped-query, 4 query"),
    ),
    "gemma2": (
        {"kv_heads": 2},
        ("rotary (half)", "RMSNorm, eps 1e-06, pre and output", "gelu_tanh, gated", "sequential, 4 norms", "grouped-query"),
    ),
    "qwen3": ({"kv_heads": 2}, ("rotary (half)", "RMSNorm, eps 1e-06, pre, also of", "silu, gated", "sequential", "grouped")),
    "olmo2": ({}, ("rotary (half)", "RMSNorm, eps 1e-05, output, also of", "silu, gated", "sequential", "multi-head")),
    "gpt_neox": ({}, ("rotary (half), 4 of 16", "LayerNorm", "gelu", "parallel, 2 norms", "multi-head")),
    "mixtral": (
        {"kv_heads": 2, "moe": {"experts": 5, "top": 2}},
        ("rotary (half)", "RMSNorm", "silu, gated", "sequential, 2 norms, 5 experts, 2 for each token", "grouped-query"),
    ),
    "gpt": (
        {"positions": "sinusoidal", "block": "post_norm"},
        ("sinusoidal", "LayerNorm, eps 1e-05, post", "gelu_tanh", "sequential, 2 norms", "multi-head"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", DECLARED)
def test_a_declared_models_graph_tells_what_its_spec_says(family):
    fields, words = DECLARED[family]
    model = {"family": family, **OURS, **fields}
    found, spec = of(model), resolve(model)
    for key, text in zip(("positions", "norm", "activation", "block", "attention"), words, strict=True):
        assert found[key].startswith(text), (key, found[key])
    assert found["objective"] == "causal, next token" and found["layers"] == 3
    assert found["parameters"] == sum(p.numel() for p in build(model, meta=True).parameters())
    assert sum(found["parts"].values()) == found["parameters"] and "other" not in found["parts"]
    assert found["flops_per_token"] == flops(spec)
    assert found["kv_cache_bytes_per_token"] == 2 * 2 * 3 * spec.kv_heads * spec.head_dim
    assert ("softmax" in found["precision"]) == spec.softmax_float32


HUGGING_FACE = {
    "llama": (THEIRS, ("rotary (half)", "RMSNorm, eps 1e-06, pre", "silu, gated", "sequential", "grouped-query")),
    "gpt2": (
        dict(n_embd=64, n_layer=3, n_head=4, vocab_size=250, n_positions=128),
        ("learned, 128", "LayerNorm", "gelu_tanh", "sequential", "multi-head, 4 heads of 16"),
    ),
    "falcon": (
        dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=250, alibi=True, multi_query=False),
        ("ALiBi", "LayerNorm", "gelu", "parallel, 1 norm", "multi-head"),
    ),
    "bert": (
        {k: v for k, v in THEIRS.items() if k != "num_key_value_heads"},
        ("learned", "LayerNorm, eps 1e-12, post", "gelu", "sequential", "multi-head"),
    ),
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_hugging_face_models_graph_tells_as_much(kind):
    config, words = HUGGING_FACE[kind]
    found = of({"hf": kind, "config": config})
    for key, text in zip(("positions", "norm", "activation", "block", "attention"), words, strict=True):
        assert found[key].startswith(text), (key, found[key])
    assert found["objective"] == ("bidirectional, labels in place" if kind == "bert" else "causal, next token")
    assert found["kv_cache_bytes_per_token"] == 2 * 2 * 3 * (32 if kind == "llama" else 64)
    if kind == "llama":
        assert found["flops_per_token"] == flops(resolve({**OURS, "family": "llama", "kv_heads": 2}))


def test_activations_of_a_block_are_korthikantis():
    """Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h) bytes for a block of a GPT with dropout."""
    hidden, heads = 256, 4
    drop = {"attention": 0.1, "hidden": 0.1}
    found = of(dict(family="gpt", layers=3, hidden=hidden, heads=heads, vocab=250, dropout=drop))
    formula = 34 * hidden + 5 * heads * LENGTH
    statistics = 2 * 2 * 4  # mean and deviation of two norms in float32, which the paper leaves out
    assert found["activation_bytes_per_layer"] == pytest.approx(formula + statistics, rel=0.01)


def test_published_sizes_come_out_of_the_graphs():
    llama, small = compare_models(["llama-3-8b", "llama-2-7b"])
    assert llama["kv_cache_bytes_per_token"] == 131_072  # stas00/ml-engineering, inference/README.md
    assert small["parameters"] == 6_738_415_616  # Touvron et al. 2023
    assert small["parts"]["embedding"] == small["parts"]["head"] == 32_000 * 4096
    assert small["flops_per_token"] == 6 * (6_738_415_616 - 32_000 * 4096 - 65 * 4096) + 12 * 32 * 4096 * 2048


def test_the_command_prints_a_table_json_or_a_page(capfd, tmp_path):
    model = tmp_path / "tiny.yaml"
    model.write_text(json.dumps({"family": "llama", **OURS}))
    assert cli.main(["compare", str(model), str(model), "--length", "64", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)) == 2
    assert cli.main(["compare", str(model), "--length", "64"]) == 0
    table = capfd.readouterr().out
    for word in (
        "tokenizer",
        "positions",
        "norm",
        "activation",
        "attention",
        "block",
        "parameters",
        "  gate",
        "kv_cache",
    ):
        assert word in table
    assert cli.main(["compare", str(model), "--length", "64", "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and 'class="bar"' in page and "src=" not in page


def test_a_mistake_is_named(capfd):
    assert cli.main(["compare", "lama-7b"]) == 2
    assert "did you mean 'llama-7b'" in capfd.readouterr().err
    assert cli.main(["compare", "gpt2", "--length", "2000"]) == 2
    assert "1024 learned positions" in capfd.readouterr().err
