"""A decoder made of the parts that a DecoderSpec names: token ids in, logits out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.models.block import block
from autopar.models.layers import Embedding, Linear
from autopar.models.masks import Seen
from autopar.models.norm import norm
from autopar.models.position import positions
from autopar.spec.model import DecoderSpec

IGNORED = -100


class Decoder(nn.Module):
    """The decoder of a spec. It holds parameters only: position tables and masks are computed from sizes."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        std = spec.initializer.std
        self.attention_positions = positions(spec)
        self.embedding = Embedding(spec.vocab, spec.hidden, std=std)
        self.positions = self.attention_positions.embedding(spec)
        self.embedding_norm = norm(spec) if spec.embedding_norm else None
        self.dropout = nn.Dropout(spec.dropout.embedding) if spec.dropout.embedding else None
        self.blocks = nn.ModuleList(block(spec, self.attention_positions, i) for i in range(spec.layers))
        self.norm = norm(spec) if spec.final_norm else None
        self.head = Linear(spec.hidden, spec.vocab, bias=spec.bias.head, std=std)
        if spec.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        prefix_length: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, length, vocab).

        input_ids (batch, length). position_ids (batch, length), by default 0, 1, …; (batch, 2, length) for `rope_2d`.
        attention_mask: (batch, length), 0 at padding, beside the causal mask; (batch, 1, length, length) replaces it.
        document_ids (batch, length): tokens see tokens of their own document alone. prefix_length (batch,): so many first
        tokens of a row are seen by the whole row.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        hidden = self._embed(input_ids, position_ids)
        tables = self.attention_positions.tables(position_ids, hidden)
        seen = Seen(attention_mask, document_ids, prefix_length)
        masks = {w: seen.additive(hidden, w) for w in dict.fromkeys(map(self.spec.windowed, range(self.spec.layers)))}
        for i, layer in enumerate(self.blocks):
            hidden = layer(hidden, masks[self.spec.windowed(i)], tables)
        return self._logits(hidden if self.norm is None else self.norm(hidden))

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden, spec = self.embedding(input_ids), self.spec
        if spec.embedding_gradient < 1:
            hidden = hidden * spec.embedding_gradient + hidden.detach() * (1 - spec.embedding_gradient)
        if spec.embedding_scale != 1:
            hidden = hidden * (spec.hidden**0.5 if spec.embedding_scale == "sqrt_hidden" else spec.embedding_scale)
        hidden = self.attention_positions.added(self.positions, position_ids, hidden)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        return hidden if self.dropout is None else self.dropout(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        if self.spec.logit_scale != 1:
            logits = logits * self.spec.logit_scale
        cap = self.spec.head_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap


class ZLossDecoder(Decoder):
    """A decoder whose objective has a z-loss: with labels it returns ``(loss_sum, count)`` instead of logits."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        prefix_length: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits; or Σ (cross-entropy + z_loss · (log Z)²) over the labels that are not −100, and their number.

        labels (batch, length): position i predicts label i + 1.
        """
        logits = super().forward(input_ids, position_ids, attention_mask, document_ids, prefix_length)
        if labels is None:
            return logits
        labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=IGNORED)
        counted = labels != IGNORED
        squares = torch.logsumexp(logits, dim=-1).square() * counted
        return loss + self.spec.z_loss * squares.sum(), counted.sum()


def decoder(spec: DecoderSpec) -> Decoder:
    """The decoder of a spec, in training mode."""
    return ZLossDecoder(spec) if spec.z_loss else Decoder(spec)
