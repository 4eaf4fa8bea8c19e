"""Causal self-attention, written out: scores, scale, mask, softmax, mixture of values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopar.models.layers import Linear
from autopar.models.norms import norm, wide_dtype
from autopar.models.positions import Positions, Tables
from autopar.spec.model import DecoderSpec


class Attention(nn.Module):
    """Attention of ``spec.heads`` queries over ``spec.kv_heads`` keys and values; the subclasses project."""

    def __init__(self, spec: DecoderSpec, positions: Positions, output_std: float) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.repeats = spec.heads // spec.kv_heads
        self.scale = spec.head_dim**-0.5
        self.softmax_float32 = spec.softmax_float32
        self.positions = positions
        self.output = Linear(spec.heads * spec.head_dim, spec.hidden, bias=spec.bias.output, std=output_std)
        self.dropout = nn.Dropout(spec.dropout.attention) if spec.dropout.attention else None
        self.query_norm = norm(spec, spec.head_dim) if spec.query_key_norm else None
        self.key_norm = norm(spec, spec.head_dim) if spec.query_key_norm else None

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, length, heads, head_dim), keys and values (batch, length, kv_heads, head_dim)."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        """hidden (batch, length, hidden); mask, added to the scores, broadcasts to (batch, heads, length, length)."""
        query, key, value = self.project(hidden)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = self.positions.rotate(query.transpose(1, 2), tables)
        key = self._repeat(self.positions.rotate(key.transpose(1, 2), tables))
        value = self._repeat(value.transpose(1, 2))
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale
        weights = self._softmax(self.positions.bias(scores, tables) + mask)
        mixed = torch.matmul(weights, value).transpose(1, 2)
        return self.output(mixed.reshape(hidden.shape[0], hidden.shape[1], -1))

    def _softmax(self, scores: Tensor) -> Tensor:
        if self.softmax_float32:
            weights = torch.softmax(scores, dim=-1, dtype=wide_dtype(scores.dtype)).to(scores.dtype)
        else:
            weights = torch.softmax(scores, dim=-1)
        return weights if self.dropout is None else self.dropout(weights)

    def _repeat(self, x: Tensor) -> Tensor:
        """(batch, kv_heads, length, head_dim) → (batch, heads, …): each head serves its group of queries."""
        if self.repeats == 1:
            return x
        batch, _, length, size = x.shape
        return x.unsqueeze(2).expand(-1, -1, self.repeats, -1, -1).reshape(batch, -1, length, size)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim)


class SeparateAttention(Attention):
    """Queries, keys and values from one matrix each."""

    def __init__(self, spec: DecoderSpec, positions: Positions, output_std: float) -> None:
        super().__init__(spec, positions, output_std)
        bias, std = spec.bias.qkv, spec.initializer.std
        self.query = Linear(spec.hidden, spec.heads * spec.head_dim, bias=bias, std=std)
        self.key = Linear(spec.hidden, spec.kv_heads * spec.head_dim, bias=bias, std=std)
        self.value = Linear(spec.hidden, spec.kv_heads * spec.head_dim, bias=bias, std=std)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads(self.query(hidden)), self._heads(self.key(hidden)), self._heads(self.value(hidden))


class FusedAttention(Attention):
    """Queries, keys and values from one matrix."""

    def __init__(self, spec: DecoderSpec, positions: Positions, output_std: float) -> None:
        super().__init__(spec, positions, output_std)
        outputs = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.query_key_value = Linear(spec.hidden, outputs, bias=spec.bias.qkv, std=spec.initializer.std)


class GroupedAttention(FusedAttention):
    """Rows laid out (kv_head, [its queries, key, value], head_dim): BLOOM, ChatGLM, and Falcon with its groups."""

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden.shape
        grouped = self.query_key_value(hidden).view(batch, length, -1, self.repeats + 2, self.head_dim)
        query = grouped[..., : self.repeats, :].reshape(batch, length, -1, self.head_dim)
        return query, grouped[..., self.repeats, :], grouped[..., self.repeats + 1, :]


class ConcatenatedAttention(FusedAttention):
    """Rows laid out all queries, all keys, all values: ChatGLM2 and MPT."""

    def __init__(self, spec: DecoderSpec, positions: Positions, output_std: float) -> None:
        super().__init__(spec, positions, output_std)
        keys = spec.kv_heads * spec.head_dim
        self.sizes = [spec.heads * spec.head_dim, keys, keys]

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.query_key_value(hidden).split(self.sizes, dim=-1)
        return self._heads(query), self._heads(key), self._heads(value)


_KINDS = {"separate": SeparateAttention, "grouped": GroupedAttention, "concatenated": ConcatenatedAttention}


def attention(spec: DecoderSpec, positions: Positions, output_std: float) -> Attention:
    """The attention of the spec's layout of q, k and v."""
    return _KINDS[spec.qkv](spec, positions, output_std)
