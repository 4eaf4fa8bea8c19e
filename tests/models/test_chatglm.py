"""ChatGLM and ChatGLM2 compute what their published code states, written here as plainly as it can be."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from autopar.models.decoder import Decoder
from autopar.spec.model import resolve

LAYERS, HIDDEN, HEADS, VOCAB = 3, 48, 4, 37
SIZE = HIDDEN // HEADS


def turned(x, position, size, interleaved):
    """One vector of ``size`` entries turned pair by pair with Python's own complex numbers."""
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + size // 2) for i in range(size // 2)]
    out = list(x)
    for i, (a, b) in enumerate(pairs):
        z = complex(x[a], x[b]) * complex(
            math.cos(position * 1e4 ** (-2 * i / size)), math.sin(position * 1e4 ** (-2 * i / size))
        )
        out[a], out[b] = z.real, z.imag
    return out


def rotated(x, turn):
    """x (batch, length, heads, size) with ``turn(vector, batch, position)`` applied to every head's vector."""
    rows = [
        [[turn(v.tolist(), b, s) for v in heads] for s, heads in enumerate(seq)] for b, seq in enumerate(x.detach())
    ]
    return torch.tensor(rows, dtype=x.dtype)


def mixture(q, k, v, seen):
    """softmax(q kᵀ / √size) v for each head, (batch, length, heads, size) each."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def model_of(**fields):
    torch.manual_seed(0)
    model = Decoder(resolve(dict(layers=LAYERS, hidden=HIDDEN, heads=HEADS, vocab=VOCAB, **fields))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def test_chatglm_turns_each_half_of_a_head_with_its_own_position():
    model = model_of(family="chatglm")
    ids = torch.randint(0, VOCAB, (2, 6))
    positions = torch.stack((torch.tensor([0, 1, 2, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 2, 3]))).expand(2, 2, 6)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    seen[:, :3] = True  # the prompt is seen by all
    with torch.no_grad():
        got = model(ids, position_ids=positions, attention_mask=seen.expand(2, 1, 6, 6))
        torch.testing.assert_close(got, chatglm(model, ids, positions, seen), rtol=0, atol=1e-9)


def chatglm(model, ids, positions, seen):
    def turn(vector, b, s):
        half = SIZE // 2
        first = turned(vector[:half], positions[b, 0, s].item(), half, interleaved=False)
        return first + turned(vector[half:], positions[b, 1, s].item(), half, interleaved=False)

    alpha = (2 * LAYERS) ** 0.5
    hidden = model.embedding.weight[ids]
    for block in model.blocks:
        normed = block.attention_norm(hidden)
        mixed = block.attention.query_key_value(normed).unflatten(-1, (HEADS, 3 * SIZE))
        q, k, v = mixed.chunk(3, dim=-1)
        out = block.attention.output(mixture(rotated(q, turn), rotated(k, turn), v, seen))
        hidden = normed * alpha + out
        normed = block.mlp_norm(hidden)
        hidden = normed * alpha + block.mlp.down(F.gelu(block.mlp.up(normed), approximate="tanh"))
    return model.norm(hidden) @ model.embedding.weight.T


def test_chatglm2_turns_interleaved_pairs_of_half_a_head_and_groups_its_queries():
    model = model_of(family="chatglm2", kv_heads=2, ffn=56)
    ids = torch.randint(0, VOCAB, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), chatglm2(model, ids), rtol=0, atol=1e-9)


def chatglm2(model, ids):
    def turn(vector, b, s):
        return turned(vector[: SIZE // 2], s, SIZE // 2, interleaved=True) + vector[SIZE // 2 :]

    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    hidden = model.embedding.weight[ids]
    for block in model.blocks:
        mixed = block.attention.query_key_value(rms(block.attention_norm, hidden))
        q, k, v = mixed.split((HIDDEN, 2 * SIZE, 2 * SIZE), dim=-1)
        q, k, v = (x.unflatten(-1, (-1, SIZE)) for x in (q, k, v))
        k, v = (x.repeat_interleave(2, dim=2) for x in (rotated(k, turn), v))
        hidden = hidden + block.attention.output(mixture(rotated(q, turn), k, v, seen))
        gate, up = block.mlp.gate_up(rms(block.mlp_norm, hidden)).chunk(2, dim=-1)
        hidden = hidden + block.mlp.down(F.silu(gate) * up)
    return model.head(rms(model.norm, hidden))


def rms(norm, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
