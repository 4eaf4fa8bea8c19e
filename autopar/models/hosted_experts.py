"""Mixtures of experts of Hugging Face's transformers: one operator for all of them while a model is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autopar.kernels import routed_experts
from autopar.kernels.glu import ACTIVATIONS, activated

NAME = "autopar"
EXACT = "batched_mm"
"""Of transformers' own implementations the one that traces and takes every dtype."""
SETTING = "_experts_implementation"


@contextlib.contextmanager
def experts_routed(model: nn.Module) -> Iterator[None]:
    """For the time of a trace, experts of ``model`` that `routed_experts` can compute are calls of it, others transformers'
    ``batched_mm``: its default sorts tokens in the graph, which no device could then have a share of."""
    known = {id(vars(m)): activation_of(m) for m in model.modules() if plain(m)}  # a tracer's proxies share the dict

    def forward(self: Any, hidden: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        name = known.get(id(vars(self)))
        if name is None:
            return registry()[EXACT](self, hidden, chosen, scores)
        return routed(self, hidden, chosen, scores, name)

    if not configs(model):
        yield
        return
    registry()[NAME] = forward
    try:
        with experts_by(model, NAME):
            yield
    finally:
        del registry()[NAME]


@contextlib.contextmanager
def experts_by(model: nn.Module, implementation: str = EXACT) -> Iterator[None]:
    """Experts of ``model`` run by an implementation that transformers knows, for a while."""
    found = configs(model)
    before = [getattr(config, SETTING) for config in found]
    try:
        for config in found:
            setattr(config, SETTING, implementation)
        yield
    finally:
        for config, name in zip(found, before, strict=True):
            setattr(config, SETTING, name)


def registry() -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


def configs(model: nn.Module) -> list[Any]:
    """The configs, each once, of modules that are transformers' experts."""
    held = [vars(m)["config"] for m in model.modules() if "is_concatenated" in vars(m)]
    return list({id(c): c for c in held}.values())


def plain(module: nn.Module) -> bool:
    """Whether a module is experts of transformers that are three matrices (two without gate) and an activation."""
    told = vars(module)
    if "is_concatenated" not in told or not callable(getattr(module, "act_fn", None)):
        return False
    default = getattr(type(module)._apply_gate, "__name__", "") == "_default_apply_gate"
    return told["is_concatenated"] and default and not told["has_bias"] and not told["has_post_expert_norm"]


def activation_of(module: Any) -> str | None:
    """What `routed_experts` calls the module's activation, found by its values; None if it has no name there."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    with torch.no_grad():
        values = module.act_fn(x)
    return next((a for a in ACTIVATIONS if torch.allclose(activated(x, a), values, rtol=1e-12, atol=1e-12)), None)


def routed(module: Any, hidden: Tensor, chosen: Tensor, scores: Tensor, activation: str) -> Tensor:
    """The mixture of transformers' experts: gate and up in one matrix, gate first; matrices perhaps transposed."""
    raised = module.gate_up_proj if module.has_gate else module.up_proj
    down = module.down_proj
    if module.is_transposed:
        raised, down = raised.transpose(1, 2), down.transpose(1, 2)
    gate, up = raised.chunk(2, dim=1) if module.has_gate else (None, raised)
    numbers = torch.arange(down.shape[0], device=hidden.device)
    return routed_experts(hidden, scores.to(hidden.dtype), chosen, numbers, gate, up, down, activation)
