"""Values come shard by shard from files, from a module, or from a seed, and what does not fit is named."""

from __future__ import annotations

import json
import math

import pytest
import torch
from handmade import plan_of, reference, write
from safetensors.torch import save_file
from torch import nn

from autopar.errors import AutoparError, CheckpointError
from autopar.runtime.engine import Engine
from autopar.runtime.manifest import Manifest
from autopar.runtime.materialize import check, source_of
from autopar.runtime.seeded import Seeded
from autopar.runtime.sources import Chain, Files, Tensors
from autopar.sharding.placement import R, S, local


def test_files_give_the_slices_that_a_placement_asks_for(tmp_path):
    whole = {"a": torch.randn(12, 6), "b": torch.randn(4, 8), "c": torch.randn(())}
    save_file(whole, tmp_path / "x.safetensors")
    source = Files(tmp_path / "x.safetensors")
    for name, place in (("a", S(0)), ("a", S(0, (8, 4))), ("b", S(1)), ("b", R), ("c", R)):
        for rank in range(2):
            assert torch.equal(source.read(name, place, rank, 2), local(place, whole[name], rank, 2)), (name, place)
    assert source.shape("a") == (12, 6) and source.shape("nothing") is None


def test_an_indexed_folder_of_files_reads_as_one(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert Files(tmp_path).read("b", R, 0, 1).tolist() == [0, 0]
    index.write_text(json.dumps({"weight_map": {"a": "three.safetensors"}}))
    with pytest.raises(CheckpointError, match="three.safetensors"):
        Files(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"garbage that is no header"])
def test_files_that_are_not_safetensors_are_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="broken.safetensors"):
        Files(path)


def test_everything_that_does_not_fit_is_named(tmp_path):
    read = Engine(write(tmp_path / "b", plan_of(), tied=True), source=Tensors.of(reference(tied=True)))
    state = dict(reference().state_dict())
    state["blocks.1.scale"] = torch.zeros(3)
    state["blocks.2.scalee"] = state.pop("blocks.2.scale")
    state.pop("head.weight")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check(read.manifest, Files(tmp_path / "w.safetensors"))
    message = str(caught.value)
    assert "missing: blocks.2.scale;" in message, "head.weight is tied to embed.weight and need not be there"
    assert "blocks.1.scale is 3, the model needs 10" in message
    assert "unknown to the model: blocks.2.scalee" in message
    ignored = Files(tmp_path / "w.safetensors", ignore=["*.scalee"])
    assert ignored.unexpected({n for n in state if n != "blocks.2.scalee"}) == []


def test_the_first_source_of_a_chain_wins():
    chain = Chain(Tensors({"a": torch.ones(1)}), Tensors({"a": torch.zeros(1), "b": torch.zeros(1)}))
    assert chain.read("a", R, 0, 1).item() == 1 and chain.read("b", R, 0, 1).item() == 0


def test_meta_tensors_are_no_source():
    assert Tensors({"a": torch.empty(2, device="meta")}).shape("a") is None


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(AutoparError, match="lists no weights"):
        Engine(write(tmp_path / "b", plan_of()))


def test_the_handmade_model_trains_from_a_seed(tmp_path):
    folder = write(tmp_path / "b", plan_of())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights"] = [{"seed": 3}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AutoparError, match="needs `build`"):
        Engine(folder)
    state = Engine(folder, build=lambda: reference_on_default_dtype()).state_dict()
    again = Engine(folder, build=lambda: reference_on_default_dtype()).state_dict()
    other = Seeded(reference_on_default_dtype, seed=4)
    assert all(torch.equal(state[n], again[n]) for n in state)
    assert not torch.equal(state["head.weight"], other.read("head.weight", R, 0, 1))
    assert not torch.equal(state["blocks.0.up.weight"], state["blocks.1.up.weight"])
    assert state["gain"].item() == 1.5, "a parameter that only the constructor sets"
    assert torch.equal(state["shift"], torch.linspace(-1, 1, 10).double()), "a buffer that only the constructor sets"
    assert state["blocks.0.norm.weight"].tolist() == [1] * 10
    assert state["blocks.0.up.weight"].abs().max() <= math.sqrt(1 / 10)  # nn.Linear's own bound


def reference_on_default_dtype():
    from handmade import Reference

    return Reference()


def weights_of(folder, entries):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"weights": entries}))
    return Manifest.read(folder)


def test_a_seed_beside_a_checkpoint_gives_buffers_but_never_a_missing_parameter(tmp_path):
    folder = write(tmp_path / "b", plan_of())
    state = dict(reference().state_dict())
    state.pop("shift")
    state["pooler.weight"] = torch.zeros(2)  # the model has it, the program does not read it
    save_file(state, folder / "w.safetensors")
    entries = [{"files": "w.safetensors"}, {"seed": 0, "buffers_only": True}]
    manifest = weights_of(folder, entries)

    def build():
        model = reference_on_default_dtype()
        model.pooler = nn.Linear(1, 2, bias=False)
        return model

    source = source_of(folder, manifest, build)
    check(manifest, source)
    assert source.read("shift", R, 0, 1).shape == (10,)
    del state["head.weight"], state["pooler.weight"]
    state["pooled.weight"] = torch.zeros(2)
    save_file(state, folder / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: head\.weight; unknown to the model: pooled\.weight"):
        check(manifest, source_of(folder, manifest, build))


class Rescaling(nn.Module):
    """Initializes as GPT-2 does: a rule for every module, and one from outside by name."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 64), "proj": nn.Linear(64, 64)}) for _ in range(2)
        )

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.zeros_(module.bias)
        for name, parameter in module.named_parameters():
            if "proj" in name and "weight" in name:
                nn.init.normal_(parameter, std=0.01)


def test_initialization_from_outside_reaches_the_inner_module():
    source = Seeded(Rescaling)
    assert source.read("blocks.0.up.weight", R, 0, 1).std() == pytest.approx(0.5, rel=0.1)
    assert source.read("blocks.1.proj.weight", R, 0, 1).std() == pytest.approx(0.01, rel=0.1)
    assert source.read("blocks.1.proj.bias", R, 0, 1).abs().max() == 0


def test_seeded_slices_are_slices_of_the_seeded_whole_in_any_order():
    one, two = Seeded(Rescaling, 7), Seeded(Rescaling, 7)
    torch.manual_seed(123)
    whole = one.read("blocks.1.up.weight", R, 0, 1)
    two.read("blocks.0.proj.weight", S(1), 1, 2)
    assert torch.equal(two.read("blocks.1.up.weight", S(0), 1, 2), local(S(0), whole, 1, 2))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hugging_face_models_initialize_as_their_own_code_does(kind):
    """Every tensor has the mean and spread that the model's own constructor gives it, buffers are equal."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512}}
    llama = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **small.get(kind, llama | {"vocab_size": 512}))
    source = Seeded(lambda: AutoModelForCausalLM.from_config(config), 1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        made = source.read(name, R, 0, 1)
        assert made.shape == parameter.shape and made.isfinite().all(), name
        own = parameter.detach().double()
        assert float(made.std()) == pytest.approx(float(own.std()), rel=0.15, abs=1e-9), name
        assert float(made.mean()) == pytest.approx(float(own.mean()), abs=0.02), name
    for name, buffer in model.named_buffers():
        assert torch.equal(source.read(name, R, 0, 1).to(buffer.dtype), buffer), name


def test_gguf_weights_are_converted_once(tmp_path):
    """A small Llama written as GGUF reads back as its own weights."""
    gguf = pytest.importorskip("gguf")
    path = write_gguf(gguf, tmp_path / "small.gguf")
    from autopar.runtime.gguf import converted

    target = converted(path, tmp_path / "build")
    assert target.parent == tmp_path / "build" / "weights"
    source, stamp = Files(target), target.stat().st_mtime_ns
    assert source.shape("model.layers.0.mlp.down_proj.weight") == (32, 64)
    assert source.read("model.norm.weight", R, 0, 1).tolist() == [2.0] * 32
    assert converted(path, tmp_path / "build").stat().st_mtime_ns == stamp
    with pytest.raises(CheckpointError, match="other.gguf"):
        converted(tmp_path / "other.gguf", tmp_path / "build")


def write_gguf(gguf, path):
    draw = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(48)
    shapes = {"token_embd": (48, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    shapes |= {"blk.0.ffn_down": (32, 64), "output": (48, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=draw).numpy())
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", torch.full((32,), 2.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_of_a_manifest_come_from_files_beside_it(tmp_path):
    folder = write(tmp_path / "b", plan_of())
    save_file(dict(reference(seed=5).state_dict()), folder / "w.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights"] = [{"files": "w.safetensors"}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    engine = Engine(folder)
    assert source_of(folder, engine.manifest).shape("gain") == ()
    assert all(torch.equal(t, reference(seed=5).state_dict()[n]) for n, t in engine.state_dict().items())
