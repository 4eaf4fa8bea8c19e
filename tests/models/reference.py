"""Hugging Face models that compute in float64 throughout, and their weights in our decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopar.models.decoder import Decoder, decoder
from autopar.models.weights import ours_of
from autopar.spec.reference import read_config


class Wide(TorchFunctionMode):
    """Read every narrower precision that code asks for explicitly (norms, rotary tables, softmax, biases) as float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.float, torch.Tensor.bfloat16):
            return args[0].double()
        narrow = (torch.float32, torch.bfloat16)
        widen = lambda v: torch.float64 if isinstance(v, torch.dtype) and v in narrow else v  # noqa: E731
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


def build(model_type: str, *, attention: str = "eager", **config: Any) -> nn.Module:
    """A causal language model of that type in float64, weights drawn from a wide normal."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            made = AutoConfig.for_model(model_type, **config)
            model = AutoModelForCausalLM.from_config(
                made, attn_implementation=attention, experts_implementation="eager", dtype=torch.float64
            )
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.train()


def translated(theirs: Any) -> Decoder:
    """Our decoder with the config and the weights of theirs, in float64."""
    model = decoder(read_config(theirs.config.to_dict(), "config")).double()
    model.load_state_dict(ours(model, dict(theirs.named_parameters())))
    return model.train()


def ours(model: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's tensors (weights or their gradients) under our names."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return ours_of(model.spec, shapes, tensors.items(), "reference")
