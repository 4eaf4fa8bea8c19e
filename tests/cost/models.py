"""Small programs for tests of costs and of the solver, traced once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autopar.cluster import Cluster
from autopar.ir.program import Program
from autopar.ir.trace import trace


class Block(nn.Module):
    """A GPT block with written-out attention and dropout, as Korthikanti et al. count it."""

    def __init__(self, hidden: int, heads: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused, self.p = heads, fused, dropout
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        q, k, v = (f(x).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = torch.matmul(q, k.transpose(-1, -2)) * (h // self.heads) ** -0.5
            mixed = torch.matmul(F.dropout(scores.softmax(-1), self.p), v)
        return self.o(mixed.transpose(1, 2).reshape(b, s, h))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.dropout(self.attention(self.norm1(x)), self.p)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.p)


class GPT(nn.Module):
    def __init__(
        self,
        layers: int,
        hidden: int,
        heads: int,
        vocab: int,
        dropout: float = 0.0,
        fused: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout, fused) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def frozen(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Freeze every parameter whose name holds none of ``names``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(n in name for n in names))
    return model


@lru_cache(maxsize=32)
def gpt(
    layers: int = 4, hidden: int = 1024, heads: int = 16, vocab: int = 4096, length: int = 512, dropout: float = 0.0,
    fused: bool = False, tied: bool = False, train_only: tuple[str, ...] = (),
) -> Program:  # fmt: skip
    """A traced GPT of this shape."""
    with torch.device("meta"):
        model: nn.Module = GPT(layers, hidden, heads, vocab, dropout, fused, tied)
    if train_only:
        model = frozen(model, train_only)
    ids = torch.empty((2, length), dtype=torch.long, device="meta")
    return trace(model, {"input_ids": ids, "labels": ids})


def cluster(devices: int = 8, hosts: int = 1, **device: Any) -> Cluster:
    """A100-like devices: round numbers, so that tests can compute by hand."""
    base = {"name": "test", "memory": "80 GiB", "bandwidth": "2 TB/s", "kernel_latency": "4 us",
            "flops_per_second": {"bfloat16": 3e14, "float32": 2e13}}  # fmt: skip
    return Cluster.load(
        {
            "name": "test-cluster",
            "device": {**base, **device},
            "devices_per_host": devices,
            "hosts": hosts,
            "links": [
                {"span": "host", "bandwidth": "300 GB/s", "latency": "3 us"},
                {"span": "cluster", "bandwidth": "25 GB/s", "latency": "8 us"},
            ],
        }
    )
