"""Learned positions, one vector for each, added to the embedding (GPT)."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from autopar.models.layers import Embedding
from autopar.models.position import Positions, Tables
from autopar.spec.model import DecoderSpec


@final
class Learned(Positions):
    """A table of max_length vectors."""

    def embedding(self, spec: DecoderSpec) -> nn.Module:
        return Embedding(spec.max_length, spec.hidden, std=spec.initializer.std)

    def added(self, module: nn.Module | None, ids: Tensor, hidden: Tensor) -> Tensor:
        assert module is not None, "made by `embedding`"
        return hidden + module(ids)

    def tables(self, ids: Tensor, like: Tensor) -> Tables:
        return ()


def make(spec: DecoderSpec) -> Learned:
    """Of any length up to max_length."""
    return Learned()
