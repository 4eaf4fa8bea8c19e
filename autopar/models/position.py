"""What positions are to a decoder: added to the embedding, turned into queries and keys, or added to scores."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from autopar.models.parts import part
from autopar.spec.model import DecoderSpec

Tables = tuple[Tensor, ...]


class Positions(ABC):
    """What a decoder computes from its positions once, and what each attention does with it. Holds no tensors."""

    def embedding(self, spec: DecoderSpec) -> nn.Module | None:
        """The module with the parameters of positions that are added to the embedding of the tokens, or None."""
        return None

    def added(self, module: nn.Module | None, ids: Tensor, hidden: Tensor) -> Tensor:
        """hidden (batch, length, hidden), the embedded tokens, with their positions in them; ``module``: `embedding`'s."""
        return hidden

    @abstractmethod
    def tables(self, ids: Tensor, like: Tensor) -> Tables:
        """Tensors that every block reads, from positions ``ids`` (1 or batch, length), in the dtype of ``like``."""

    def rotate(self, x: Tensor, tables: Tables) -> Tensor:
        """Queries or keys (batch, heads, length, head_dim) with their positions in them."""
        return x

    def bias(self, scores: Tensor, tables: Tables) -> Tensor:
        """Scores (batch, heads, length, length) with their positions in them."""
        return scores


def positions(spec: DecoderSpec) -> Positions:
    """The spec's positions."""
    made: Positions = part("positions", spec.positions)(spec)
    return made
