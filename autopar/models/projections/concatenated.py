"""One matrix, its rows laid out all queries, all keys, all values: ChatGLM2, MPT, Phi-3."""

from __future__ import annotations

from torch import Tensor

from autopar.models.attention import FusedAttention
from autopar.models.position import Positions
from autopar.spec.model import DecoderSpec


class ConcatenatedAttention(FusedAttention):
    """q | k | v."""

    def __init__(self, spec: DecoderSpec, positions: Positions, output_std: float) -> None:
        super().__init__(spec, positions, output_std)
        keys = spec.kv_heads * spec.head_dim
        self.sizes = [spec.heads * spec.head_dim, keys, keys]

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.query_key_value(hidden).split(self.sizes, dim=-1)
        return self._heads(query), self._heads(key), self._heads(value)


make = ConcatenatedAttention
