"""Builders as a user would write them, for `{python: "builders:…"}`."""

from __future__ import annotations

import torch
from torch import nn

made_up = 3


def mlp(size: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))


def tokens() -> nn.Module:
    return nn.Embedding(7, 4)


def numbers() -> list[int]:
    return [1, 2]


def broken() -> nn.Module:
    raise RuntimeError("the flux is off")


tokens.example_batch = lambda sequences, length: {"input": torch.zeros(sequences, length, dtype=torch.long)}


def example_batch(sequences: int, length: int) -> dict[str, torch.Tensor]:
    return {"input": torch.ones(sequences, length, 8)}
