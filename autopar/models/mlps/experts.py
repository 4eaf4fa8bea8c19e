"""A mixture of experts: a router chooses a few gated MLPs for every token (Shazeer et al. 2017; Mixtral)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopar.models.dtypes import wide_dtype
from autopar.models.layers import Linear
from autopar.models.mlp import activation
from autopar.models.mlps import gated
from autopar.models.parts import part
from autopar.spec.model import GATED, DecoderSpec, Experts


class ExpertWeights(nn.Module):
    """gate and up (experts, ffn, hidden), down (experts, hidden, ffn): one gated MLP each."""

    def __init__(self, spec: DecoderSpec, experts: int, ffn: int, output_std: float) -> None:
        super().__init__()
        self.activation, self.activation_name = activation(spec), GATED.get(spec.activation, spec.activation)
        self.std, self.output_std = spec.initializer.std, output_std
        self.gate = nn.Parameter(torch.empty(experts, ffn, spec.hidden))
        self.up = nn.Parameter(torch.empty(experts, ffn, spec.hidden))
        self.down = nn.Parameter(torch.empty(experts, spec.hidden, ffn))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate, std=self.std)
        nn.init.normal_(self.up, std=self.std)
        nn.init.normal_(self.down, std=self.output_std)


class MixtureMLP(nn.Module):
    """Σ score · expert(x) over the chosen experts, and the shared expert where there is one."""

    def __init__(self, spec: DecoderSpec, ffn: int, output_std: float) -> None:
        super().__init__()
        assert spec.moe is not None, "mlp.choice takes experts only where the spec has them"
        self.moe: Experts = spec.moe
        inner = spec.moe.ffn or ffn
        self.router = Linear(spec.hidden, spec.moe.experts, bias=False, std=spec.initializer.std)
        self.experts = ExpertWeights(spec, spec.moe.experts, inner, output_std)
        self.mixed = part("dispatch", spec.moe.dispatch)
        self.shared = gated.make(spec, spec.moe.shared, output_std) if spec.moe.shared else None
        self.shared_router = (
            Linear(spec.hidden, 1, bias=False, std=spec.initializer.std) if spec.moe.shared_gate else None
        )

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, size = hidden.shape
        tokens = hidden.reshape(batch * length, size)
        scores, chosen = self.route(tokens)
        out = self.mixed(self.experts, tokens, scores.to(tokens.dtype), chosen)
        if self.shared is not None:
            shared = self.shared(tokens)
            out = out + (shared if self.shared_router is None else torch.sigmoid(self.shared_router(tokens)) * shared)
        return out.view(batch, length, size)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the chosen experts, (tokens, top) each."""
        logits = self.router(tokens)
        logits = logits.to(wide_dtype(logits.dtype))
        every = torch.softmax(logits, dim=-1) if self.moe.score == "softmax" else torch.sigmoid(logits)
        scores, chosen = torch.topk(every, self.moe.top, dim=-1)
        if self.moe.normalize:
            scores = scores / scores.sum(dim=-1, keepdim=True)
        return (scores if self.moe.scale == 1 else scores * self.moe.scale), chosen


make = MixtureMLP
