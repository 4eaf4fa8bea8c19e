"""Every source a job can name builds a module, with its batch; every mistake gets one message that names it."""

from __future__ import annotations

import pytest
import torch

from autopar.errors import AutoparError, CheckpointError, SpecError
from autopar.models.batch import example_batch
from autopar.models.decoder import Decoder
from autopar.models.load import build
from autopar.spec.model import resolve

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
SEQUENCE = dict(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=61)
IMAGE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)
HUGGING_FACE = {
    "LlamaForCausalLM": ("llama", SMALL),
    "MixtralForCausalLM": ("mixtral", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}),
    "BertForMaskedLM": ("bert", SMALL),
    "T5ForConditionalGeneration": ("t5", SEQUENCE),
    "ViTForImageClassification": ("vit", IMAGE),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_hugging_face_type_builds_its_training_class_and_trains_on_the_example_batch(name):
    model_type, config = HUGGING_FACE[name]
    model = build({"hf": model_type, "config": config}, meta=False)
    assert type(model).__name__ == name and model.training
    batch = example_batch(model, 3, 12)
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and all(value.shape[0] == 3 for value in batch.values())


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_meta_and_real_models_have_the_same_parameters(name):
    model_type, config = HUGGING_FACE[name]
    source = {"hf": model_type, "config": config}
    empty, real = build(source, meta=True, dtype=torch.float64), build(source, meta=False, dtype=torch.float64)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.float64 for p in empty.parameters())


def test_a_tied_model_stays_tied_on_meta():
    model = build({"hf": "llama", "config": {**SMALL, "tie_word_embeddings": True}}, meta=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_experts_run_in_a_way_that_can_be_traced():
    model = build({"hf": "mixtral", "config": HUGGING_FACE["MixtralForCausalLM"][1]}, meta=True)
    assert model.config._experts_implementation == "batched_mm"


def test_a_checkpoint_folder_gives_its_weights_and_on_meta_none(tmp_path):
    saved = build({"hf": "llama", "config": SMALL}, meta=False, seed=5)
    saved.save_pretrained(tmp_path)
    loaded = build({"hf": str(tmp_path)}, meta=False)
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert all(p.is_meta for p in build({"hf": str(tmp_path)}, meta=True).parameters())


def test_a_gguf_file_gives_its_weights(tmp_path):
    saved = build({"hf": "llama", "config": SMALL}, meta=False, seed=5)
    write_gguf(tmp_path / "tiny.gguf", saved.state_dict(), saved.config)
    loaded = build({"hf": str(tmp_path / "tiny.gguf")}, meta=False)
    assert type(loaded) is type(saved) and loaded.config.num_hidden_layers == 2
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert all(p.is_meta for p in build({"hf": str(tmp_path / "tiny.gguf")}, meta=True).parameters())


def test_a_gguf_file_without_some_weights_is_refused_by_their_names(tmp_path):
    saved = build({"hf": "llama", "config": SMALL}, meta=False)
    kept = {key: value for key, value in saved.state_dict().items() if "layers.1.mlp.up_proj" not in key}
    write_gguf(tmp_path / "tiny.gguf", kept, saved.config)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        build({"hf": str(tmp_path / "tiny.gguf")}, meta=False)


def write_gguf(path, state, config):
    """A Llama as llama.cpp's converter writes it: its names, queries and keys permuted for interleaved rotation."""
    import gguf

    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
    }
    names |= {"up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm", "norm": "output_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "lm_head": "output", "embed_tokens": "token_embd"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(64)
    for key, value in state.items():
        parts = key.split(".")
        block = f"blk.{parts[2]}." if "layers" in parts else ""
        if parts[-2] in ("q_proj", "k_proj"):
            value = value.unflatten(0, (config.num_attention_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{block}{names[parts[-2]]}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_declared_model_needs_no_transformers():
    import subprocess
    import sys

    code = "import sys; from autopar.models.load import build; build('gpt2', meta=True)"
    code += "; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_python_builder_gets_its_arguments_dtype_and_device():
    model = build({"python": "builders:mlp", "kwargs": {"size": 5}}, meta=True, dtype=torch.bfloat16)
    assert [(tuple(p.shape), p.dtype, p.is_meta) for p in model.parameters()][0] == ((5, 5), torch.bfloat16, True)


def test_a_builders_own_batch_comes_before_its_modules():
    for name, shape in (("builders:tokens", (2, 3)), ("builders:mlp", (2, 3, 8))):
        source = {"python": name}
        assert example_batch(build(source, meta=True), 2, 3, source=source)["input"].shape == shape


def test_a_batch_of_a_declared_model_is_tokens_and_labels_and_seeded():
    model = Decoder(resolve(dict(family="llama", layers=1, hidden=8, ffn=8, heads=1, vocab=11)))
    batch = example_batch(model, 4, 6, seed=1)
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 6) and batch["input_ids"].max() < 11
    assert torch.equal(batch["input_ids"], example_batch(model, 4, 6, seed=1)["input_ids"])
    assert not torch.equal(batch["input_ids"], example_batch(model, 4, 6, seed=2)["input_ids"])


MISTAKES = {
    "a model's name": ("lama-2-7b", "did you mean 'llama-2-7b'"),
    "a model type": ({"hf": "lamma", "config": {}}, "'lamma'; did you mean 'llama'"),
    "an option's name": ({"hf": "llama", "config": {**SMALL, "hiden_size": 3}}, "did you mean 'hidden_size'"),
    "an activation": ({"hf": "llama", "config": {**SMALL, "hidden_act": "no_such_act"}}, "hidden_act: no_such_act"),
    "an option's type": ({"hf": "llama", "config": {**SMALL, "hidden_size": "wide"}}, "wide"),
    "heads that do not divide": ({"hf": "llama", "config": {**SMALL, "num_attention_heads": 5}}, "attention heads (5)"),
    "a folder": ({"hf": "no/such/folder"}, "no checkpoint folder 'no/such/folder'"),
    "a module": ({"python": "no_such_module:build"}, "no module 'no_such_module'"),
    "a function": ({"python": "builders:mpl"}, "no function 'mpl'; did you mean 'mlp'"),
    "no function": ({"python": "builders:made_up"}, "builders:made_up is a int"),
    "a builder that raises": ({"python": "builders:broken"}, "builders:broken raised RuntimeError: the flux is off"),
    "a wrong argument": ({"python": "builders:mlp", "kwargs": {"sizes": 3}}, "'sizes'"),
    "no module built": ({"python": "builders:numbers"}, "returned a list, not a torch.nn.Module"),
    "a family": ({"family": "lama", "layers": 1}, "unknown family 'lama'; did you mean 'llama'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    source, words = MISTAKES[mistake]
    with pytest.raises(AutoparError) as caught:
        build(source, meta=True)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_length_past_a_table_of_positions_is_refused():
    model = build(
        {"hf": "gpt2", "config": dict(n_embd=8, n_layer=1, n_head=1, vocab_size=61, n_positions=16)}, meta=True
    )
    with pytest.raises(SpecError, match="17 tokens do not fit the model's table of 16"):
        example_batch(model, 1, 17)


def test_a_module_of_unknown_inputs_is_refused_with_what_would_be_right():
    with pytest.raises(SpecError, match=r"example_batch\(sequences, length\)"):
        example_batch(torch.nn.Linear(2, 2), 1, 4)
