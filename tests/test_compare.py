"""`autopar compare`: counts against published numbers, and one row for whatever a job can name."""

import json

import pytest

from autopar import cli
from autopar.models.compare import compare_models, row
from autopar.spec.origin import read_origin
from autopar.spec.source import Source


def test_counts_are_the_published_ones():
    llama, falcon, gpt = compare_models(["llama-2-7b", "falcon-7b", "gpt3-175b"], 2048)
    assert llama["parameters"] == 6_738_415_616  # Touvron et al. 2023
    assert llama["kv_cache_bytes_per_token"] == 2 * 2 * 32 * 4096
    assert llama["flops_per_token"] == 6 * (6_738_415_616 - 32_000 * 4096 - 65 * 4096) + 12 * 32 * 4096 * 2048
    assert falcon["attention"].startswith("multi-query, 71 query and 1 key-value heads of 64")
    # Korthikanti et al. 2022, equation 1: bytes of one layer = s b h (34 + 5 a s / h)
    assert gpt["activation_bytes_per_token"] == 96 * (34 * 12288 + 5 * 96 * 2048)


def test_llama_3_keeps_an_eighth_of_the_keys_that_full_attention_would():
    (llama,) = compare_models(["llama-3-8b"])
    assert llama["kv_cache_bytes_per_token"] == 131_072  # stas00/ml-engineering, inference/README.md


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_hugging_face_model_has_a_row_too(kind):
    names = {
        "gpt2": ("n_embd", "n_layer", "n_head"),
        "llama": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    }
    config = dict(zip(names[kind], (64, 2, 4), strict=True)) | {"vocab_size": 250}
    if kind == "llama":
        config |= {"num_key_value_heads": 2, "intermediate_size": 128}
    found = row(read_origin(Source({"hf": kind, "config": config}, "test")), 64)
    blocks = 2 * (4 * 64 * 64 + 8 * 64 * 64) if kind == "gpt2" else 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert found["flops_per_token"] == 6 * (blocks + 250 * 64) + 12 * 2 * 64 * 64
    assert found["kv_cache_bytes_per_token"] == 2 * 2 * 2 * (64 if kind == "gpt2" else 32)


def test_the_command_prints_a_table_or_json_and_names_an_unknown_model(capfd):
    assert cli.main(["compare", "llama-7b", "gpt2", "--json"]) == 0
    assert [line["model"] for line in json.loads(capfd.readouterr().out)] == ["llama-7b", "gpt2"]
    assert cli.main(["compare", "llama-7b", "gpt2"]) == 0
    table = capfd.readouterr().out
    for word in ("tokenizer", "positions", "norm", "activation", "attention", "block", "parameters", "kv_cache"):
        assert word in table
    assert cli.main(["compare", "lama-7b"]) == 2
    assert "did you mean 'llama-7b'" in capfd.readouterr().err
