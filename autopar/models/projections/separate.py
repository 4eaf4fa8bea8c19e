"""Queries, keys and values from one matrix each."""

from __future__ import annotations

from torch import Tensor

from autopar.models.attention import Attention
from autopar.models.layers import Linear
from autopar.models.position import Positions
from autopar.spec.model import DecoderSpec


class SeparateAttention(Attention):
    """Llama, Qwen, and GPT as most write it."""

    def __init__(self, spec: DecoderSpec, positions: Positions, output_std: float) -> None:
        super().__init__(spec, positions, output_std)
        bias, std = spec.bias, spec.initializer.std
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.query = Linear(spec.hidden, queries, bias=bias.of("query"), std=std)
        self.key = Linear(spec.hidden, keys, bias=bias.of("key"), std=std)
        self.value = Linear(spec.hidden, keys, bias=bias.of("value"), std=std)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads(self.query(hidden)), self._heads(self.key(hidden)), self._heads(self.value(hidden))


make = SeparateAttention
