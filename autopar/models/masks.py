"""Which keys a query sees: causal, within a window, a prefix seen whole, documents apart, padding unseen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What the batch says of it, beside the causal rule; None where it says nothing.

    attention: (batch, length), 0 at padding; (batch, 1, length, length) replaces every other rule. documents (batch,
    length): only keys of the query's own number are seen. prefix (batch,): keys before it are seen by all.
    """

    attention: Tensor | None = None
    documents: Tensor | None = None
    prefix: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.attention is None and self.documents is None and self.prefix is None

    def additive(self, hidden: Tensor, window: int | None = None) -> Tensor:
        """0 where a query may see a key, elsewhere the lowest number of hidden's dtype; (length, length) or with
        (batch, 1, …) before. ``window``: how many keys a query sees, itself included (a prefix is seen whole)."""
        length, lowest = hidden.shape[1], torch.finfo(hidden.dtype).min
        if self.plain and window is None:
            return torch.full((length, length), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)
        seen = self.boolean(hidden, window)
        return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, lowest)

    def boolean(self, hidden: Tensor, window: int | None = None) -> Tensor:
        """True where a query (dim −2) sees a key (dim −1)."""
        if self.attention is not None and self.attention.dim() == 4:
            return self.attention.to(torch.bool)
        length = hidden.shape[1]
        seen = torch.ones((length, length), dtype=torch.bool, device=hidden.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        if self.prefix is not None:
            places = torch.arange(length, device=hidden.device)
            seen = seen | (places < self.prefix[:, None])[:, None, None, :]
        if self.documents is not None:
            seen = seen & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        if self.attention is not None:
            seen = seen & self.attention.to(torch.bool)[:, None, None, :]
        return seen
