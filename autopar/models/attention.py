"""Causal self-attention, written out: scores, scale, mask, softmax, mixture of values."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from autopar.models.dtypes import wide_dtype
from autopar.models.layers import Linear
from autopar.models.norm import norm
from autopar.models.parts import part
from autopar.models.position import Positions, Tables
from autopar.spec.model import DecoderSpec


class Attention(nn.Module):
    """Attention of ``spec.heads`` queries over ``spec.kv_heads`` keys and values; the projections are subclasses."""

    def __init__(self, spec: DecoderSpec, positions: Positions, output_std: float) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.repeats = spec.heads // spec.kv_heads
        self.scale = spec.attention_scale or spec.head_dim**-0.5
        self.softmax_float32 = spec.softmax_float32
        self.soft_cap = spec.soft_cap
        self.clip = spec.qkv_clip
        self.positions = positions
        self.output = Linear(spec.heads * spec.head_dim, spec.hidden, bias=spec.bias.output, std=output_std)
        self.dropout = nn.Dropout(spec.dropout.attention) if spec.dropout.attention else None
        self.norm_heads = spec.query_key_norm == "head"
        normed = spec.query_key_norm != "none"
        size = spec.head_dim if self.norm_heads else None
        self.query_norm = norm(spec, size or spec.heads * spec.head_dim) if normed else None
        self.key_norm = norm(spec, size or spec.kv_heads * spec.head_dim) if normed else None

    @abstractmethod
    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, length, heads, head_dim), keys and values (batch, length, kv_heads, head_dim)."""

    def forward(self, hidden: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        """hidden (batch, length, hidden); mask, added to the scores, broadcasts to (batch, heads, length, length)."""
        query, key, value = self._projected(hidden)
        query = self.positions.rotate(query.transpose(1, 2), tables)
        key = self._repeat(self.positions.rotate(key.transpose(1, 2), tables))
        value = self._repeat(value.transpose(1, 2))
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale
        if self.soft_cap is not None:
            scores = torch.tanh(scores / self.soft_cap) * self.soft_cap
        weights = self._softmax(self.positions.bias(scores, tables) + mask)
        mixed = torch.matmul(weights, value).transpose(1, 2)
        return self.output(mixed.reshape(hidden.shape[0], hidden.shape[1], -1))

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, clipped and normed as the spec says."""
        query, key, value = self.project(hidden)
        if self.clip is not None:
            query, key, value = (x.clamp(-self.clip, self.clip) for x in (query, key, value))
        if self.query_norm is None or self.key_norm is None:
            return query, key, value
        if self.norm_heads:
            return self.query_norm(query), self.key_norm(key), value
        return self._heads(self.query_norm(query.flatten(2))), self._heads(self.key_norm(key.flatten(2))), value

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


class FusedAttention(Attention):
    """Queries, keys and values from one matrix."""

    def __init__(self, spec: DecoderSpec, positions: Positions, output_std: float) -> None:
        super().__init__(spec, positions, output_std)
        outputs = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.query_key_value = Linear(spec.hidden, outputs, bias=spec.bias.of("query"), std=spec.initializer.std)


def attention(spec: DecoderSpec, positions: Positions, output_std: float) -> Attention:
    """The attention of the spec's layout of q, k and v."""
    made: Attention = part("projections", spec.qkv)(spec, positions, output_std)
    return made
