"""Hugging Face checkpoints become declarative models and come back bit for bit; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autopar.errors import CheckpointError
from autopar.models.checkpoint import read_checkpoint, write_checkpoint
from autopar.models.load import build
from autopar.spec.family import load_family
from autopar.spec.model import resolve
from autopar.spec.reference import read_config, read_spec, write_config

LLAMA = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=61,
)
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TYPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma2": {**LLAMA, "head_dim": 8, **IDS},
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, vocab_size=61),
    "gpt_neox": {**LLAMA, "num_key_value_heads": 4, "intermediate_size": 128},
    "falcon": dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_kv_heads=2,
        vocab_size=61,
        new_decoder_architecture=True,
    ),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("model_type", TYPES)
def test_a_checkpoint_goes_through_our_model_and_back_bit_for_bit(model_type, tmp_path):
    theirs = build({"hf": model_type, "config": TYPES[model_type]}, meta=False, dtype=torch.bfloat16, seed=3)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model = read_checkpoint(tmp_path / "theirs")
    assert next(model.parameters()).dtype == torch.bfloat16 and model.training
    ids = torch.randint(3, 61, (2, 7))
    expected = theirs.float().eval()(input_ids=ids).logits
    torch.testing.assert_close(model.float().eval()(ids), expected, rtol=1e-4, atol=1e-4)
    write_checkpoint(read_checkpoint(tmp_path / "theirs"), tmp_path / "back", like=tmp_path / "theirs")
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    same = {f.name for f in (tmp_path / "theirs").glob("model*")} == {
        f.name for f in (tmp_path / "back").glob("model*")
    }
    assert same, "not the same files"


@pytest.mark.parametrize("model_type", TYPES)
def test_our_own_checkpoint_is_read_by_transformers(model_type, tmp_path):
    theirs = build({"hf": model_type, "config": TYPES[model_type]}, meta=False, seed=3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = read_checkpoint(tmp_path / "theirs")
    write_checkpoint(model, tmp_path / "ours", shard=40_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = build({"hf": str(tmp_path / "ours")}, meta=False)
    assert type(again) is type(theirs)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_names_of_a_base_model_without_its_head_are_read_too(tmp_path):
    theirs = build({"hf": "gpt2", "config": TYPES["gpt2"]}, meta=False)
    theirs.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in tensors(tmp_path)
    model = read_checkpoint(tmp_path)
    assert torch.equal(model.blocks[1].mlp.up.weight, theirs.transformer.h[1].mlp.c_fc.weight.T)
    assert model.head.weight is model.embedding.weight


def test_a_gguf_file_becomes_a_declarative_model(tmp_path):
    from test_load import write_gguf

    theirs = build({"hf": "llama", "config": {**LLAMA, "num_key_value_heads": 4}}, meta=False, seed=5)
    write_gguf(tmp_path / "tiny.gguf", theirs.state_dict(), theirs.config)
    model = read_checkpoint(tmp_path / "tiny.gguf")
    assert (model.spec.layers, model.spec.kv_heads) == (3, 4)
    write_checkpoint(model, tmp_path / "back")
    before, after = theirs.state_dict(), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def broken(tmp_path: Path, change: Any) -> str:
    build({"hf": "llama", "config": LLAMA}, meta=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    return str(caught.value)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    def change(found):
        found["model.layers.1.flux"] = found.pop("model.layers.1.mlp.up_proj.weight")

    message = broken(tmp_path, change)
    assert "missing: blocks.1.mlp.up.weight" in message and "unknown: model.layers.1.flux" in message


def test_a_tensor_of_another_shape_is_named(tmp_path):
    message = broken(tmp_path, lambda found: found.update({"model.norm.weight": torch.ones(5)}))
    assert "model.norm.weight is 5, the model needs 32" in message


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    build({"hf": "llama", "config": LLAMA}, meta=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        read_checkpoint(tmp_path)


MISTAKES = {
    "an unknown type": ({"model_type": "mamba"}, "no family reads the model type 'mamba'"),
    "a missing size": ({"model_type": "llama", "hidden_size": 8}, "layers (num_hidden_layers)"),
    "what no part does": (
        {"model_type": "gpt2", **TYPES["gpt2"], "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx: true",
    ),
    "an unknown scaling": (
        {"model_type": "llama", **LLAMA, "rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "rope_type 'longrope' is not known",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_config_that_cannot_be_read_is_named(mistake):
    config, words = MISTAKES[mistake]
    with pytest.raises(CheckpointError) as caught:
        read_config(config, "here/config.json")
    assert words in str(caught.value) and str(caught.value).startswith("here/config.json: ")


def test_a_spec_that_a_type_cannot_express_has_no_config():
    spec = resolve(dict(family="llama", layers=1, hidden=8, ffn=8, heads=1, vocab=3, block="parallel"))
    with pytest.raises(CheckpointError, match="cannot have this block"):
        write_config(spec)


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_spec(tmp_path)


def test_every_family_that_reads_a_type_names_each_tensor_of_its_model_once(tmp_path):
    """On the reference's own parameter names; nothing of the reference is left over."""
    theirs = build({"hf": "qwen3", "config": LLAMA}, meta=False)
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as data:
        names = set(data.keys())
    write_checkpoint(read_checkpoint(tmp_path), tmp_path / "ours")
    assert tensors(tmp_path / "ours").keys() == names and load_family("qwen3").reads == ("qwen3",)
