"""Training starts from a checkpoint's own values: as Hugging Face's module or as the declared model, whatever its names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from autopar.api import compile_job, load
from autopar.errors import SpecError
from autopar.models.load import build
from autopar.models.shrink import shrink
from autopar.spec.job import Job
from autopar.spec.origin import read_origin
from autopar.spec.source import Source

GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=16)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)


def state_after_start(model, folder):
    """What one process holds when it starts to train the model."""
    cluster = {"name": "local-cpu", "devices_per_host": 1}
    job = Job.model_validate({"model": model, "cluster": cluster, "batch": {"sequences": 2, "length": 8}})
    compile_job(job, folder)
    return load(folder).start().state_dict()


def test_a_base_models_checkpoint_trains_in_the_model_with_its_head(tmp_path):
    """As the hub's GPT-2: names without `transformer.`, and masks that are no weights."""
    theirs = build({"hf": "gpt2", "config": GPT2}, meta=False)
    theirs.config.save_pretrained(tmp_path)
    bare = {n: t.detach().contiguous() for n, t in theirs.transformer.named_parameters()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    save_file(bare | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    held = state_after_start({"hf": str(tmp_path)}, tmp_path / "build")
    assert all(torch.equal(held[f"transformer.{n}"], t) for n, t in bare.items())


def test_a_checkpoint_trains_as_the_declared_model_that_it_is(tmp_path):
    theirs = build({"hf": "llama", "config": {**LLAMA, "tie_word_embeddings": True}}, meta=False)
    theirs.save_pretrained(tmp_path / "theirs")
    source = {"hf": str(tmp_path / "theirs"), "declarative": True}
    held = state_after_start(source, tmp_path / "build")
    assert torch.equal(held["blocks.1.mlp.up.weight"], theirs.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(held["head.weight"], theirs.model.embed_tokens.weight)
    assert load_file(tmp_path / "build" / "weights.safetensors").keys() < held.keys() | {"head.weight"}


def test_a_declared_checkpoint_is_written_as_it_was_given_and_shrinks_to_its_spec(tmp_path):
    build({"hf": "llama", "config": LLAMA}, meta=False).save_pretrained(tmp_path)
    source = {"hf": str(tmp_path), "declarative": True}
    origin = read_origin(Source(source, "job.yaml"))
    assert origin.model_dump() == source and origin.decoder.hidden == 32
    assert shrink(origin).weights is None
    model = build(source, meta=False, dtype=torch.float64)
    assert model.blocks[0].mlp.up.weight.dtype == torch.float64


@pytest.mark.parametrize("more", [{"declarative": 3}, {"declarative": True, "config": {"hidden_size": 3}}])
def test_a_wrong_declarative_entry_is_named(more, tmp_path):
    build({"hf": "llama", "config": LLAMA}, meta=False).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"model\.declarative"):
        read_origin(Source({"hf": str(tmp_path), **more}, "job.yaml"))
