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


# ------------------------------------------------------------------ what looks like attention, and what does not


class Alike(nn.Module):
    """One layer of a token model, as its subclass writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 10)
        self.choice, self.keys = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(8, 16))
        self.experts, self.memory = nn.Parameter(torch.randn(4, 16, 16)), nn.Parameter(torch.randn(8, 16))
        self.filter = nn.Conv1d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.layer(self.inner(x))).mean(1)

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, experts, width)"""
        return torch.einsum("bld,edf->blef", x, self.experts)


class PlainRouter(Alike):
    def layer(self, x):  # noqa: ANN001, ANN201
        return ((x @ self.choice).softmax(-1).unsqueeze(2) @ self.outputs(x)).squeeze(2)


class EinsumRouter(Alike):
    def layer(self, x):  # noqa: ANN001, ANN201
        weights = torch.einsum("bld,de->ble", x, self.choice).softmax(-1)
        return torch.einsum("ble,blef->blf", weights, self.outputs(x))


class FlatRouter(Alike):
    """Tokens of all sequences in one row, experts' outputs beside."""

    def layer(self, x):  # noqa: ANN001, ANN201
        flat = x.reshape(-1, 16)
        weights = torch.matmul(flat, self.choice / 4.0).softmax(-1, dtype=torch.float32)
        outputs = (flat.unsqueeze(0) @ self.experts).transpose(0, 1)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), outputs).reshape(x.shape)


class Memory(Alike):
    """Keys and values that are parameters: what a token remembers does not depend on other tokens."""

    def layer(self, x):  # noqa: ANN001, ANN201
        return (x @ self.keys.t() / 4.0).softmax(-1) @ self.memory


class BatchedMemory(Alike):
    def layer(self, x):  # noqa: ANN001, ANN201
        keys = self.keys.unsqueeze(0).expand(x.shape[0], -1, -1)
        return torch.bmm(torch.bmm(x, keys.transpose(1, 2)).softmax(-1), self.memory.unsqueeze(0).expand_as(keys))


class ConvolvedGate(Alike):
    """A product some nodes before the gate, which is a convolution."""

    def layer(self, x):  # noqa: ANN001, ANN201
        y = torch.relu(x @ self.inner.weight)
        weights = self.filter(y.transpose(1, 2)).transpose(1, 2).softmax(-1)
        return torch.einsum("ble,blef->blf", weights, self.outputs(x))


class SoftGates(Alike):
    """Gates between two experts, no product of scores at all."""

    def layer(self, x):  # noqa: ANN001, ANN201
        gates = torch.stack([self.q(x).mean(-1), self.k(x).mean(-1)], -1).softmax(-1)
        return (gates.unsqueeze(2) @ torch.stack([self.q(x), self.v(x)], 2)).squeeze(2)


ALIKE = [PlainRouter, EinsumRouter, FlatRouter, Memory, BatchedMemory, ConvolvedGate, SoftGates]


def of(layer: type[Alike]) -> tuple[list[torch.fx.Node], list[torch.fx.Node]]:
    """The nodes in cores, and the softmaxes, of a model of one layer."""
    batch = {"x": torch.randn(2, 6, 16), "labels": torch.zeros(2, dtype=torch.long)}
    graph = autopar.trace(layer(), batch).graph
    softmaxes = [n for n in graph.nodes if n.op == "call_function" and n.target in SOFTMAX]
    return [n for c in cores(graph) for n in c.nodes], softmaxes


@pytest.mark.parametrize("layer", ALIKE, ids=lambda c: c.__name__)
def test_what_chooses_among_parameters_is_no_attention(layer: type[Alike]) -> None:
    inside, softmaxes = of(layer)
    assert len(softmaxes) == 1 and not inside


class SingleHead(Alike):
    def layer(self, x):  # noqa: ANN001, ANN201
        return (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)


class ScaledQuery(Alike):
    def layer(self, x):  # noqa: ANN001, ANN201
        q, k, v = (f(x).view(x.shape[0], -1, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return ((q * 0.5) @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2).reshape(x.shape)


class MaskedByWhere(Alike):
    def layer(self, x):  # noqa: ANN001, ANN201
        scores = self.q(x) @ self.k(x).mT / 4.0
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return torch.where(seen, scores, torch.finfo(x.dtype).min).softmax(-1, dtype=torch.float32) @ self.v(x)


class Einsums(Alike):
    def layer(self, x):  # noqa: ANN001, ANN201
        q, k, v = (f(x).view(x.shape[0], -1, 4, 4) for f in (self.q, self.k, self.v))
        weights = torch.einsum("blhd,bshd->bhls", q, k).mul(0.5).softmax(-1)
        return torch.einsum("bhls,bshd->blhd", weights, v).reshape(x.shape)


class TurnedEinsums(Alike):
    """Keys first: the softmax is over the second index of the scores."""

    def layer(self, x):  # noqa: ANN001, ANN201
        weights = torch.einsum("bsd,bld->bsl", self.k(x), self.q(x)).softmax(1)
        return torch.einsum("bsl,bsd->bld", weights, self.v(x))


class Baddbmm(Alike):
    def layer(self, x):  # noqa: ANN001, ANN201
        bias = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], 1, -1)
        return torch.bmm(
            torch.baddbmm(bias, self.q(x), self.k(x).transpose(1, 2), beta=1.0, alpha=0.25).softmax(-1), self.v(x)
        )


class GroupedFiveDims(Alike):
    """Four query heads over two key heads, which are never repeated."""

    def layer(self, x):  # noqa: ANN001, ANN201
        b, length, _ = x.shape
        q = self.q(x).view(b, length, 2, 2, 4).permute(0, 2, 3, 1, 4)
        k, v = (f(x)[..., :8].view(b, length, 2, 1, 4).permute(0, 2, 3, 1, 4) for f in (self.k, self.v))
        return ((q @ k.mT * 0.5).softmax(-1) @ v).permute(0, 3, 1, 2, 4).reshape(b, length, 16)


class LearnedQueries(Alike):
    """Perceiver's: the queries are parameters, what they look at is data."""

    def layer(self, x):  # noqa: ANN001, ANN201
        return ((self.keys @ self.k(x).mT).softmax(-1) @ self.v(x)).mean(1, keepdim=True)


class OneInput(Alike):
    """Queries, keys and values are the same tensor."""

    def layer(self, x):  # noqa: ANN001, ANN201
        return (x @ x.mT).softmax(-1) @ x


TRUE = [
    SingleHead,
    ScaledQuery,
    MaskedByWhere,
    Einsums,
    TurnedEinsums,
    Baddbmm,
    GroupedFiveDims,
    LearnedQueries,
    OneInput,
]


@pytest.mark.parametrize("layer", TRUE, ids=lambda c: c.__name__)
def test_attention_is_found_however_it_is_spelled(layer: type[Alike]) -> None:
    inside, softmaxes = of(layer)
    assert len(softmaxes) == 1 and softmaxes[0] in inside
    products = [n for n in inside if any(w in str(n.target) for w in ("matmul", "bmm", "einsum"))]
    assert len(products) == 2 and inside[-1] in products
    assert not any("linear" in str(n.target) for n in inside)
