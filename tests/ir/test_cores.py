"""Attention cores: a softmax over scores whose result is multiplied with values, however it is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autopar
from autopar.ir.attention import SOFTMAX, cores
from autopar.ir.program import Program


class Attention(nn.Module):
    def __init__(self, soft_cap: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.soft_cap = nn.Linear(16, 48), nn.Linear(16, 16), soft_cap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) * 0.25
        scores = 3.0 * torch.tanh(scores / 3.0) if self.soft_cap else scores
        return self.out(scores.softmax(-1) @ v)


class Mixture(nn.Module):
    """Every expert computes every token; the router's softmax weighs them in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        outputs = torch.einsum("bld,edf->blef", x, self.experts)
        return torch.einsum("ble,blef->blf", weights, outputs)


class Model(nn.Module):
    def __init__(self, soft_cap: bool) -> None:
        super().__init__()
        self.attention, self.mixture, self.head = Attention(soft_cap), Mixture(), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return self.head(x + self.mixture(x)).mean(1)


def traced(soft_cap: bool) -> Program:
    return autopar.trace(Model(soft_cap), {"x": torch.randn(2, 6, 16), "labels": torch.zeros(2, dtype=torch.long)})


@pytest.mark.parametrize("soft_cap", [False, True])
def test_a_routers_softmax_is_no_attention(soft_cap: bool) -> None:
    graph = traced(soft_cap).graph
    softmaxes = [n for n in graph.nodes if n.op == "call_function" and n.target in SOFTMAX]
    (core,) = cores(graph)
    assert len(softmaxes) == 2
    assert [n for n in core.nodes if n in softmaxes] == softmaxes[:1]
    assert not any("linear" in str(n.target) or "einsum" in str(n.target) for n in core.nodes)
