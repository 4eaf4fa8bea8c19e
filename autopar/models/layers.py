"""Linear layers and embeddings that know the deviation of their initial weights."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """`nn.Linear` whose ``reset_parameters`` draws from normal(0, std) and zeroes the bias."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, std: float) -> None:
        self.std = std  # before the constructor of nn.Linear, which calls reset_parameters
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` whose ``reset_parameters`` draws from normal(0, std)."""

    def __init__(self, entries: int, size: int, *, std: float) -> None:
        self.std = std
        super().__init__(entries, size)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
