"""A shrunk source is the same architecture in small sizes."""

from __future__ import annotations

import pytest

from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.models.shrink import shrink
from autopar.spec import library

KEPT = ("family", "tied", "norm", "activation", "positions", "qkv", "block", "bias", "embedding_norm", "fused_gate_up")


@pytest.mark.parametrize("name", library.names("models"))
def test_a_shipped_model_keeps_its_architecture(name):
    before, after = build(name, meta=True).spec, shrink(name).decoder
    assert all(getattr(after, field) == getattr(before, field) for field in KEPT)
    assert after.layers % 2 == 1 and after.hidden <= 160 and after.vocab <= 256 and not after.dropout.hidden
    assert all((after.heads % n == 0) == (before.heads % n == 0) for n in (2,))
    assert (after.kv_heads == after.heads) == (before.kv_heads == before.heads)
    assert (after.kv_heads == 1) == (before.kv_heads == 1)
    assert after.vocab % 2 == before.vocab % 2


TYPES = [
    "llama",
    "qwen3",
    "falcon",
    "bloom",
    "gpt2",
    "glm",
    "gemma2",
    "mixtral",
    "deepseek_v3",
    "gptj",
    "opt",
    "bert",
    "t5",
    "vit",
]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_hugging_face_type_shrinks_to_one_that_trains(model_type):
    small = shrink({"hf": model_type, "config": {}})
    model = build(small, meta=False)
    assert sum(p.numel() for p in model.parameters()) < 5_000_000
    assert model(**example_batch(model, 2, 10)).loss.isfinite()
    assert shrink(small) == small
    assert not [k for k, v in model.config.to_dict().items() if "drop" in k and isinstance(v, float) and v > 0]


def test_what_the_user_set_is_kept():
    given = {
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
    }
    config = build(shrink({"hf": "llama", "config": given}), meta=True).config
    assert config.tie_word_embeddings and config.hidden_act == "gelu"
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)


def test_a_checkpoint_shrinks_to_its_type(tmp_path):
    config = dict(hidden_size=192, intermediate_size=256, num_hidden_layers=7, num_attention_heads=12, vocab_size=500)
    build({"hf": "llama", "config": config}, meta=False).save_pretrained(tmp_path)
    small = build(shrink({"hf": str(tmp_path)}), meta=True).config
    assert (small.model_type, small.num_hidden_layers, small.num_attention_heads, small.vocab_size) == (
        "llama",
        5,
        4,
        256,
    )


def test_a_builders_source_comes_back_as_it_is():
    assert shrink({"python": "builders:mlp", "kwargs": {"size": 4}}).kwargs == {"size": 4}
