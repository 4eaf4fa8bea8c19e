"""Decoders trace with symbolic sizes, start as published, and keep their parameters neat."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from autopar.models.decoder import Decoder
from autopar.models.load import build
from autopar.models.positions.alibi import alibi_slopes
from autopar.spec.model import resolve

SIZES = dict(layers=2, hidden=48, heads=6, vocab=61, max_length=64)
GATED = dict(kv_heads=2, ffn=80)
FAMILIES = {
    "gpt": dict(family="gpt", dropout=dict(embedding=0.1, attention=0.1, hidden=0.1)),
    "llama": dict(family="llama", **GATED),
    "llama with query and key norms": dict(family="llama", query_key_norm=True, **GATED),
    "bloom": dict(family="bloom"),
    "falcon 7b": dict(family="falcon", kv_heads=1, block="parallel"),
    "falcon 40b": dict(family="falcon", kv_heads=2),
    "chatglm": dict(family="chatglm"),
    "chatglm2": dict(family="chatglm2", **GATED),
    "mpt": dict(family="mpt"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_exports_with_batch_and_length_as_symbols(name, device):
    with torch.device(device):
        model = Decoder(resolve({**SIZES, **FAMILIES[name]})).train()
    ids = torch.zeros(3, 12, dtype=torch.long, device=device)
    dynamic = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    exported = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=dynamic, strict=False)
    (logits,) = [n.args[0][0] for n in exported.graph.nodes if n.op == "output"]
    batch, length, vocab = logits.meta["val"].shape
    assert isinstance(batch, torch.SymInt) and isinstance(length, torch.SymInt) and vocab == 61
    if device == "cpu" and model.dropout is None:
        other = torch.randint(0, 61, (5, 7))
        assert torch.equal(exported.module()(input_ids=other), model(other))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_position_sees_no_later_token(name):
    torch.manual_seed(0)
    model = Decoder(resolve({**SIZES, **FAMILIES[name]})).double().eval()
    ids = torch.randint(0, 61, (1, 9))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 61
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


def test_the_families_hold_no_buffers_and_name_their_parameters_alike():
    for fields in FAMILIES.values():
        model = Decoder(resolve({**SIZES, **fields}))
        assert not list(model.buffers())
        roots = {name.split(".")[0] for name, _ in model.named_parameters()}
        assert roots <= {"embedding", "positions", "embedding_norm", "blocks", "norm", "head"}


def test_weights_start_as_gpt2_published_them():
    model = build({**SIZES, "family": "gpt", "layers": 8, "hidden": 384, "heads": 6}, meta=False)
    block = model.blocks[3]
    assert block.attention.query.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)  # √(2 · 8 layers) = 4
    assert block.attention.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert not block.mlp.down.bias.any() and bool((block.mlp_norm.weight == 1).all())


def test_a_module_made_on_meta_is_initialized_by_its_own_reset_parameters():
    with torch.device("meta"):
        model = Decoder(resolve({**SIZES, **FAMILIES["llama"]}))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_seed_alone_decides_the_weights():
    fields = {**SIZES, **FAMILIES["llama"]}
    first, again, other = (build(fields, meta=False, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_tied_embeddings_stay_one_tensor_in_every_dtype_and_on_meta():
    for meta in (True, False):
        for dtype in (None, torch.bfloat16, torch.float64):
            model = build({**SIZES, "family": "llama", "tied": True, **GATED}, meta=meta, dtype=dtype)
            assert model.head.weight is model.embedding.weight
            assert model.head.weight.dtype == (dtype or torch.float32) and model.head.weight.is_meta == meta


def test_alibi_slopes_are_the_papers():
    slopes = alibi_slopes(8, torch.float64, torch.device("cpu"))
    assert slopes.tolist() == [2.0**-i for i in range(1, 9)]  # Press et al. 2022, section 3
    twelve = alibi_slopes(
        12, torch.float64, torch.device("cpu")
    ).tolist()  # their code: 8 heads', then every other of 16's
    assert twelve == pytest.approx([*[2.0**-i for i in range(1, 9)], *[2.0 ** -(i / 2) for i in (1, 3, 5, 7)]])


def test_a_mask_of_four_dims_replaces_the_causal_one():
    model = Decoder(resolve({**SIZES, **FAMILIES["chatglm"]})).double()
    ids = torch.randint(0, 61, (2, 8))
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    torch.testing.assert_close(model(ids, attention_mask=causal.expand(2, 1, 8, 8)), model(ids))
    prefix = causal.clone()
    prefix[:, :4] = True  # GLM: the prompt sees all of itself
    assert not torch.allclose(model(ids, attention_mask=prefix.expand(2, 1, 8, 8))[:, 0], model(ids)[:, 0])
