"""A minimal decoder for golden texts, and small models for single questions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autopar.ir.program import Program
from autopar.ir.promote import Promoted
from autopar.ir.rewrite import load, rewrite
from autopar.ir.text import graph_text
from autopar.ir.trace import trace


class Block(nn.Module):
    """A written-out rms norm, written-out causal attention of two heads, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.qkv = nn.Linear(8, 24, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x.view(*x.shape).contiguous().to(torch.float32)
        normed = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        parts = torch.matmul(normed, self.qkv.weight.t()).view(x.shape[0], x.shape[1], 2, 12).transpose(1, 2)
        q, k, v = parts.chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / 2.0 + mask
        return x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        length = x.shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        return x @ self.embedding.weight.T


def ids(length: int = 6, vocab: int = 16) -> dict[str, torch.Tensor]:
    made = torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": made, "labels": made.clone()}


def block_text(*passes: dict[str, Any]) -> str:
    """The minimal block after passes, at batch 2 and length 6."""
    torch.manual_seed(0)
    program = rewrite(trace(Decoder(), ids()), passes)
    return graph_text(program.at(batch=2, length=6).blocks["block_0"])


def outer_text(*passes: dict[str, Any]) -> str:
    program = rewrite(trace(Decoder(), ids()), passes)
    return graph_text(program.at(batch=2, length=6).graph)


def both(model: nn.Module, name: str, **options: Any) -> tuple[Program, Program, float]:
    """A model's program before and after a pass, and the largest relative error of loss and gradients in float64."""
    model, batch = model.double(), ids()
    with Promoted():
        before = rewrite(trace(model, batch))
        after = rewrite(before, [load({name: options})])
        results = [backward(p.module(), batch) for p in (before, after)]
    return before, after, worst(*results)


def backward(module: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for parameter in module.parameters():
        parameter.grad = None
    loss, _ = module(**batch)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}}


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    floor = 1e-6 * max(float(t.norm()) for t in b.values())
    return max(float((a[n] - b[n]).norm()) / max(float(b[n].norm()), floor) for n in a)


def targets(program: Program) -> list[str]:
    return [str(n.target) for _, g in program.graphs() for n in g.nodes if n.op == "call_function"]
