"""Tiny models of many families, as programs in float64, each traced once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autopar.ir.objective import Objective
from autopar.ir.program import Program
from autopar.ir.promote import Promoted
from autopar.ir.rewrite import discover
from autopar.ir.rewrite import rewrite as run
from autopar.ir.trace import trace
from autopar.models.load import build

BATCH, LENGTH, VOCAB = 2, 8, 64
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2}
DRY = {"attention_dropout": 0.0, "hidden_dropout": 0.0}


class Net(nn.Module):
    """Convolutions, a batch norm with running statistics, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.stem(pixels))).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 5))


def huggingface(kind: str, **config: Any) -> Callable[[], nn.Module]:
    """A causal language model with attention written out (transformers' "eager")."""
    return lambda: build(
        {"hf": kind, "config": {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **config}}, meta=False
    )


def declared(family: str, **sizes: Any) -> Callable[[], nn.Module]:
    made = {"family": family, "layers": 2, "hidden": 32, "ffn": 48, "heads": 4, "vocab": VOCAB, **sizes}
    return lambda: build(made, meta=False)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": declared("llama", kv_heads=2),
    "gpt": declared("gpt"),
    "bloom": declared("bloom"),
    "falcon": declared("falcon", kv_heads=1),
    "chatglm2": declared("chatglm2", kv_heads=2),
    "hf_llama": huggingface("llama", **LLAMA),
    "hf_falcon": huggingface("falcon", multi_query=True, parallel_attn=True, **DRY),
    "hf_falcon_alibi": huggingface("falcon", alibi=True, multi_query=False, parallel_attn=False, **DRY),
    "hf_bloom": huggingface("bloom", n_head=4, n_layer=2, **DRY),
    "hf_gpt2": huggingface("gpt2", n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "hf_glm": huggingface("glm", head_dim=8, **LLAMA),
    "mlp": mlp,
    "conv": Net,
}
WITHOUT_ATTENTION = ("mlp", "conv")


def batch(name: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    if name == "mlp":
        return {"input": torch.randn(BATCH, 6, generator=draw).double(), "labels": torch.tensor([1, 4])}
    if name == "conv":
        return {"pixels": torch.randn(BATCH, 3, 6, 6, generator=draw).double(), "labels": torch.tensor([1, 4])}
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=draw)
    return {"input_ids": ids, "labels": ids.clone()}


def given(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(name).items()}


@cache
def model(name: str, dtype: torch.dtype) -> nn.Module:
    """One model for every use. Never built under `Promoted`, which would give it other buffers (rotary frequencies)."""
    torch.manual_seed(0)
    made = FAMILIES[name]().to(dtype)
    if name.startswith("hf_"):
        made.config._attn_implementation = "eager"
    return made.train()


@cache
def traced(name: str, dtype: torch.dtype = torch.float64) -> Program:
    """As tracing leaves it: no pass has run."""
    made = model(name, dtype)
    with Promoted() if dtype == torch.float64 else torch.enable_grad():
        return trace(made, given(name, dtype))


@cache
def program(name: str, dtype: torch.dtype = torch.float64) -> Program:
    """Canonicalized."""
    return run(traced(name, dtype))


Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def computed(what: Program, name: str, dtype: torch.dtype = torch.float64) -> Result:
    """Loss and the gradient of every trainable parameter that has one."""
    wide = dtype == torch.float64 and what.precision is None  # a program with casts of its own keeps them
    return run_backward(what.module(), lambda m: m(**given(name, dtype)), wide)


@cache
def base(name: str) -> Result:
    """What the canonicalized program computes in float64, before any other pass."""
    return computed(program(name), name)


def eager(name: str) -> Result:
    """The same of the model itself, never traced."""
    objective = Objective(model(name, torch.float64))
    loss, gradients = run_backward(objective, lambda m: m(given(name, torch.float64)), True)
    return loss, {n.removeprefix("model."): g for n, g in gradients.items()}


def run_backward(module: nn.Module, forward: Callable[[nn.Module], Any], wide: bool) -> Result:
    for parameter in module.parameters():
        parameter.grad = None
    with Promoted() if wide else torch.enable_grad():
        loss, _ = forward(module)
        loss.backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def error(a: Result, b: Result) -> float:
    """The largest relative error: of the loss, and of a gradient ‖a − b‖ / max(‖b‖, 1e-6 · the largest gradient)."""
    assert a[1].keys() == b[1].keys()
    floor = 1e-6 * max(float(g.norm()) for g in b[1].values())
    worst = max(float((g - b[1][n]).norm() / max(float(b[1][n].norm()), floor)) for n, g in a[1].items())
    return max(worst, float((a[0] - b[0]).abs() / b[0].abs()))


PASSES = sorted(discover())
