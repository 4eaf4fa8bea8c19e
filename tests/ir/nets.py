"""Small models of other kinds than a stack of layers: vectors, images, several inputs, an encoder-decoder."""

from __future__ import annotations

import torch
from torch import nn
from toys import VOCAB, WIDTH


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *[m for _ in range(5) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())], nn.Linear(WIDTH, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Conv(nn.Module):
    def __init__(self, norm: str = "group") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        made = {"group": lambda: nn.GroupNorm(2, 8), "batch": lambda: nn.BatchNorm2d(8)}[norm]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), made(), nn.ReLU()) for _ in range(4))
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.pool(x).mean((2, 3)))


class TwoInputs(nn.Module):
    """Features and tokens through torch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, WIDTH), nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.a(features).unsqueeze(1) + self.b(tokens)))


class Seq2Seq(nn.Module):
    """torch's own encoder-decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Transformer(WIDTH, 2, 3, 3, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(source), self.embed(target)))


class Averaging(nn.Module):
    """Keeps a moving average in a buffer, changed in place in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 5)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.copy_(0.9 * self.mean + 0.1 * x.detach().mean(0))
        return self.linear(x - self.mean)
