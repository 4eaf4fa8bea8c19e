"""The models that are timed, in plain PyTorch: an MLP of residual blocks, and a decoder as Llama's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Sum = Callable[[torch.Tensor], torch.Tensor]


class MLPBlock(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class MLP(nn.Module):
    def __init__(self, blocks: int, width: int, inner: int):
        super().__init__()
        self.blocks = nn.ModuleList(MLPBlock(width, inner) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def squared_error(output: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``(loss_sum, count)`` against ``batch["target"]``."""
    difference = output - batch["target"]
    return difference.square().sum(), torch.tensor(output.numel())


@dataclass(frozen=True)
class Sizes:
    """A decoder's sizes. ``heads`` are query heads, each ``width // heads`` wide."""

    layers: int = 4
    width: int = 256
    inner: int = 704
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 2048

    @property
    def head(self) -> int:
        return self.width // self.heads


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


def rotary(length: int, head: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (length, head)."""
    frequency = 1e4 ** (-torch.arange(0, head, 2, device=device) / head)
    angle = torch.arange(length, device=device)[:, None] * torch.cat([frequency, frequency])
    return angle.cos(), angle.sin()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """Works on as many heads as its weights have: all of them, or one device's."""

    def __init__(self, sizes: Sizes, parts: int = 1):
        super().__init__()
        self.head = sizes.head
        kv = sizes.kv_heads * sizes.head // parts
        self.q = nn.Linear(sizes.width, sizes.width // parts, bias=False)
        self.k = nn.Linear(sizes.width, kv, bias=False)
        self.v = nn.Linear(sizes.width, kv, bias=False)
        self.o = nn.Linear(sizes.width // parts, sizes.width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, self.head).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(found.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, sizes: Sizes, parts: int = 1):
        super().__init__()
        inner = sizes.inner // parts
        self.gate = nn.Linear(sizes.width, inner, bias=False)
        self.up = nn.Linear(sizes.width, inner, bias=False)
        self.down = nn.Linear(inner, sizes.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """``enter`` and ``leave`` stand around the parts that are split over devices (tensor parallelism by hand)."""

    def __init__(self, sizes: Sizes, parts: int = 1, enter: Sum | None = None, leave: Sum | None = None):
        super().__init__()
        self.attention_norm, self.norm = Norm(sizes.width), Norm(sizes.width)
        self.attention, self.feed_forward = Attention(sizes, parts), FeedForward(sizes, parts)
        self.enter, self.leave = enter or same, leave or same

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.leave(self.attention(self.enter(self.attention_norm(x)), cos, sin))
        return x + self.leave(self.feed_forward(self.enter(self.norm(x))))


def same(x: torch.Tensor) -> torch.Tensor:
    return x


class Decoder(nn.Module):
    """Token ids to logits; with ``first`` or ``last`` False, the part of it that a pipeline stage holds."""

    def __init__(self, sizes: Sizes, first: bool = True, last: bool = True):
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width) if first else None
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = Norm(sizes.width) if last else None
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False) if last else None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = input_ids if self.embedding is None else self.embedding(input_ids)
        cos, sin = rotary(x.shape[1], self.sizes.head, x.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        return x if self.head is None or self.norm is None else self.head(self.norm(x))


def text(sequences: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """A batch of random token ids, labels included."""
    ids = torch.randint(vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Position i predicts token i + 1; the last one nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, summed. labels (batch, length) as in the batch."""
    return F.cross_entropy(logits.flatten(0, 1), shifted(labels).flatten(), reduction="sum")
