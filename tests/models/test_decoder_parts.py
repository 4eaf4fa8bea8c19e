"""Every part of a decoder against its published formula, written as plainly as it can be."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from autopar.errors import SpecError
from autopar.ir.objective import Objective
from autopar.models.decoder import Decoder, decoder
from autopar.models.parts import part
from autopar.spec.model import resolve
from autopar.spec.parts import parts

SIZES = dict(family="llama", layers=3, hidden=48, heads=6, kv_heads=2, ffn=40, vocab=61, max_length=64)
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(2))
KINDS = ("activations", "blocks", "dispatch", "mlps", "norms", "positions", "projections", "scalings")


def model_of(**fields) -> Decoder:
    torch.manual_seed(0)
    model = decoder(resolve({**SIZES, **fields})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_a_parts_folder_is_a_part(kind):
    assert parts(kind) and all(callable(part(kind, name)) for name in parts(kind))


def test_a_part_is_known_by_its_file_alone(tmp_path, monkeypatch):
    import autopar.models.activations as folder
    from autopar.spec import parts as known

    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "cubed.py").write_text("def make(x):\n    return x**3\n")
    monkeypatch.setattr(known, "FOLDER", tmp_path)
    monkeypatch.setattr(folder, "__path__", [str(tmp_path / "activations")])
    monkeypatch.setattr("autopar.spec.model.parts.parts", known.parts.__wrapped__)
    assert part("activations", "cubed")(torch.tensor(2.0)) == 8
    with pytest.raises(SpecError, match="did you mean 'cubed'"):
        resolve({**SIZES, "activation": "cubd"})


ACTIVATIONS = {
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def test_activations_are_their_formulas():
    assert set(ACTIVATIONS) == set(parts("activations"))
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for name, formula in ACTIVATIONS.items():
        wanted = torch.tensor([formula(v) for v in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(part("activations", name)(x), wanted, rtol=0, atol=1e-12)


def test_sinusoidal_positions_are_vaswanis():
    model = model_of(positions="sinusoidal")
    added = model.attention_positions.added(None, torch.tensor([[0, 3]]), torch.zeros(1, 2, 48, dtype=torch.float64))
    wanted = [f(3 / 10000 ** (2 * i / 48)) for i in range(24) for f in (math.sin, math.cos)]
    assert added[0, 1].tolist() == pytest.approx(wanted) and added[0, 0].tolist() == [0, 1] * 24


def rest(block, x):
    """Attention of one block over x under a causal mask, without positions."""
    mask = torch.full((x.shape[1],) * 2, torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
    return block.attention(x, mask, ())


FORMULAS = {
    "sequential": lambda b, x, n: (x := x + rest(b, n(b.attention_norm, x))) + b.mlp(n(b.mlp_norm, x)),
    "post_norm": lambda b, x, n: n(b.mlp_norm, (x := n(b.attention_norm, x + rest(b, x))) + b.mlp(x)),
    "output_norm": lambda b, x, n: (x := x + n(b.attention_post_norm, rest(b, x))) + n(b.mlp_post_norm, b.mlp(x)),
    "sandwich": lambda b, x, n: (
        (x := x + n(b.attention_post_norm, rest(b, n(b.attention_norm, x))))
        + n(b.mlp_post_norm, b.mlp(n(b.mlp_norm, x)))
    ),
    "parallel": lambda b, x, n: x + rest(b, n(b.attention_norm, x)) + b.mlp(n(b.attention_norm, x)),
    "parallel_two_norms": lambda b, x, n: x + rest(b, n(b.attention_norm, x)) + b.mlp(n(b.mlp_norm, x)),
    "deepnorm": lambda b, x, n: n(
        b.mlp_norm, 6**0.25 * (x := n(b.attention_norm, 6**0.25 * x + rest(b, x))) + b.mlp(x)
    ),
    "scaled_norm_residual": lambda b, x, n: (
        6**0.5 * (y := n(b.mlp_norm, 6**0.5 * (z := n(b.attention_norm, x)) + rest(b, z))) + b.mlp(y)
    ),
}


def layernorm(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


@pytest.mark.parametrize("kind", parts("blocks"))
def test_a_block_joins_its_sublayers_as_its_formula_says(kind):
    model = model_of(block=kind, positions="none", norm="layernorm")
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    mask = torch.full((5, 5), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
    got = model.blocks[1](x, mask, ())
    torch.testing.assert_close(got, FORMULAS[kind](model.blocks[1], x, layernorm), rtol=0, atol=1e-10)


def test_deepnorms_sublayers_end_in_smaller_weights():
    fields = {**SIZES, "hidden": 384, "ffn": 384, "block": "deepnorm", "initializer": {"std": 0.05}}
    torch.manual_seed(0)
    block = Decoder(resolve(fields)).blocks[0]
    beta = (8 * 3) ** -0.25  # Wang et al. 2022
    assert block.mlp.down.weight.std().item() == pytest.approx(0.05 * beta, rel=0.02)
    assert block.mlp.up.weight.std().item() == pytest.approx(0.05, rel=0.02)


def test_a_residual_scale_multiplies_what_each_sublayer_adds():
    plain, scaled = model_of(block="parallel"), model_of(block="parallel", residual_scale=0.25)
    x = torch.randn(1, 5, 48, dtype=torch.float64)
    mask, tables = torch.zeros(5, 5, dtype=torch.float64), plain.attention_positions.tables(torch.arange(5)[None], x)
    added = plain.blocks[0](x, mask, tables) - x
    torch.testing.assert_close(scaled.blocks[0](x, mask, tables) - x, added * 0.25)


def test_scales_and_caps_reach_embedding_and_logits():
    plain = model_of()
    assert torch.allclose(model_of(logit_scale=0.5)(IDS), plain(IDS) * 0.5)
    assert torch.allclose(model_of(head_soft_cap=2)(IDS), torch.tanh(plain(IDS) / 2) * 2)
    scaled = model_of(embedding_scale="sqrt_hidden")
    with torch.no_grad():
        plain.embedding.weight *= 48**0.5
    torch.testing.assert_close(scaled(IDS), plain(IDS))


def test_the_embeddings_gradient_shrinks_and_nothing_else_changes():
    plain, shrunk = model_of(), model_of(embedding_gradient=0.1)
    torch.testing.assert_close(shrunk(IDS), plain(IDS))
    for model in (plain, shrunk):
        model(IDS).square().sum().backward()
    torch.testing.assert_close(shrunk.embedding.weight.grad, plain.embedding.weight.grad * 0.1)
    torch.testing.assert_close(shrunk.head.weight.grad, plain.head.weight.grad)


def test_the_z_loss_is_the_square_of_log_z_at_every_label_that_counts():
    plain, model = model_of(), model_of(z_loss=1e-2)
    labels = IDS.clone()
    labels[0, :4] = -100
    total, count = Objective(model)({"input_ids": IDS, "labels": labels})
    expected, number = Objective(plain)({"input_ids": IDS, "labels": labels})
    counted = labels[:, 1:] != -100
    z = plain(IDS)[:, :-1].exp().sum(-1).log().square()[counted].sum()
    torch.testing.assert_close(total, expected + 1e-2 * z)
    assert count == number == counted.sum()
    assert model(IDS).shape == (2, 9, 61)


MIXTURE = dict(experts=5, top=2, ffn=24)


def mixture(mlp, x, spec):
    """Token by token, expert by expert."""
    out = torch.zeros_like(x)
    for i, token in enumerate(x):
        logits = mlp.router.weight @ token
        every = logits.softmax(0) if spec.score == "softmax" else logits.sigmoid()
        best = sorted(range(len(every)), key=lambda e: -every[e])[: spec.top]
        total = sum(every[e] for e in best) if spec.normalize else 1
        for e in best:
            gate, up, down = (getattr(mlp.experts, part)[e] for part in ("gate", "up", "down"))
            out[i] = out[i] + spec.scale * every[e] / total * (down @ (F.silu(gate @ token) * (up @ token)))
        if mlp.shared is not None:
            share = 1 if mlp.shared_router is None else (mlp.shared_router.weight @ token).sigmoid()
            out[i] = out[i] + share * mlp.shared(token)
    return out


@pytest.mark.parametrize("dispatch", parts("dispatch"))
@pytest.mark.parametrize(
    "more",
    [{}, {"normalize": False, "shared": 16}, {"score": "sigmoid", "scale": 2.5, "shared": 16, "shared_gate": True}],
    ids=["plain", "shared", "gated"],
)
def test_a_mixture_is_the_sum_over_the_chosen_experts(dispatch, more):
    model = model_of(moe={**MIXTURE, **more, "dispatch": dispatch, "dense_layers": 1})
    assert hasattr(model.blocks[0].mlp, "gate") and not hasattr(model.blocks[1].mlp, "gate")
    x = torch.randn(2, 4, 48, dtype=torch.float64)
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        wanted = mixture(mlp, x.flatten(0, 1), model.spec.moe).view_as(x)
        torch.testing.assert_close(mlp(x), wanted, rtol=0, atol=1e-10)


def test_biases_are_where_they_are_asked_for():
    model = model_of(bias=dict(query=True, qkv=False, value=True, head=True))
    attention = model.blocks[0].attention
    found = [getattr(attention, p).bias is not None for p in ("query", "key", "value", "output")]
    assert found == [True, False, True, False] and model.head.bias is not None


MISTAKES = {
    "an unknown position": (dict(positions="rop"), "did you mean 'rope'"),
    "an unknown block": (dict(block="paralel"), "did you mean 'parallel'"),
    "an unknown scaling": (dict(rope=dict(scaling=dict(kind="yarm", factor=2))), "did you mean 'yarn'"),
    "more experts chosen than there are": (dict(moe=dict(experts=2, top=3)), "top: 3 of experts: 2"),
    "a gate without its expert": (dict(moe=dict(experts=2, top=1, shared_gate=True)), "no shared expert"),
    "experts that are not gated": (dict(activation="gelu", ffn=8, moe=dict(experts=2, top=1)), "gelu has no gate"),
    "biases that one matrix cannot have": (dict(qkv="grouped", bias=dict(query=True)), "one matrix for all"),
    "an unknown expert field": (dict(moe=dict(experts=2, tops=1)), "did you mean 'top'"),
    "no window pattern": (dict(window_pattern=[]), "window_pattern"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    fields, words = MISTAKES[mistake]
    with pytest.raises(SpecError) as caught:
        resolve({**SIZES, **fields})
    assert words in str(caught.value)
