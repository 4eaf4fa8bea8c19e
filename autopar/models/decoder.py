"""A decoder made of the components that a DecoderSpec names: token ids in, logits out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopar.models.block import block
from autopar.models.layers import Embedding, Linear
from autopar.models.norms import norm
from autopar.models.positions import positions
from autopar.spec.model import DecoderSpec


class Decoder(nn.Module):
    """The decoder of a spec. It holds parameters only: position tables and masks are computed from sizes."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        std = spec.initializer.std
        self.embedding = Embedding(spec.vocab, spec.hidden, std=std)
        self.positions = Embedding(spec.max_length, spec.hidden, std=std) if spec.positions == "learned" else None
        self.embedding_norm = norm(spec) if spec.embedding_norm else None
        self.dropout = nn.Dropout(spec.dropout.embedding) if spec.dropout.embedding else None
        self.attention_positions = positions(spec)
        self.blocks = nn.ModuleList(block(spec, self.attention_positions) for _ in range(spec.layers))
        self.norm = norm(spec) if spec.final_norm else None
        self.head = Linear(spec.hidden, spec.vocab, bias=spec.bias.head, std=std)
        if spec.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, length, vocab).

        input_ids (batch, length). position_ids (batch, length), by default 0, 1, …; (batch, 2, length) for `rope_2d`.
        attention_mask: (batch, length), 0 at padding, beside the causal mask; (batch, 1, length, length) replaces it.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        hidden = self._embed(input_ids, position_ids)
        tables = self.attention_positions.tables(position_ids, hidden.dtype)
        mask = additive_mask(hidden, attention_mask)
        for layer in self.blocks:
            hidden = layer(hidden, mask, tables)
        return self.head(hidden if self.norm is None else self.norm(hidden))

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        if self.positions is not None:
            hidden = hidden + self.positions(position_ids)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        return hidden if self.dropout is None else self.dropout(hidden)


def additive_mask(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """0 where a query may see a key, elsewhere the dtype's lowest number; broadcasts to (batch, 1, length, length)."""
    length, lowest = hidden.shape[1], torch.finfo(hidden.dtype).min
    if attention_mask is None:
        return torch.full((length, length), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)
    seen = attention_mask.to(torch.bool)
    if attention_mask.dim() == 2:
        causal = torch.ones((length, length), dtype=torch.bool, device=hidden.device).tril()
        seen = causal & seen[:, None, None, :]
    return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, lowest)
