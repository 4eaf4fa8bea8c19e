"""One matrix, its rows laid out (kv_head, [its queries, key, value], head_dim): BLOOM, ChatGLM, GPT-NeoX, Falcon."""

from __future__ import annotations

from torch import Tensor

from autopar.models.attention import FusedAttention


class GroupedAttention(FusedAttention):
    """Each group of queries beside its key and value."""

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden.shape
        grouped = self.query_key_value(hidden).view(batch, length, -1, self.repeats + 2, self.head_dim)
        query = grouped[..., : self.repeats, :].reshape(batch, length, -1, self.head_dim)
        return query, grouped[..., self.repeats, :], grouped[..., self.repeats + 1, :]


make = GroupedAttention
