"""Tiny models of five families, and what Hugging Face peft and a program make of the same adapter on them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autopar
from autopar.ir.program import Program
from autopar.ir.promote import Promoted

VOCAB, LAYERS = 61, 3
SMALL = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCAB)
DRY = dict(attention_dropout=0.0, hidden_dropout=0.0)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SMALL, "num_key_value_heads": 2}),
    "gpt2": ("gpt2", dict(n_embd=48, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "bloom": ("bloom", dict(hidden_size=48, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, **DRY)),
    "falcon": ("falcon", dict(hidden_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_kv_heads=2, vocab_size=VOCAB,
                              new_decoder_architecture=True, **DRY)),
    "falcon_alibi": ("falcon", dict(hidden_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCAB,
                                    new_decoder_architecture=False, multi_query=False, parallel_attn=False, alibi=True, **DRY)),
    "glm": ("glm", {**SMALL, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0}),
}  # fmt: skip


def model_of(kind: str, attention: str | None = None, **changes: Any) -> nn.Module:
    """The one model of a kind, in float64."""
    return made(kind, attention, tuple(changes.items()))


@cache
def made(kind: str, attention: str | None, changes: tuple[tuple[str, Any], ...]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    name, sizes = MODELS[kind]
    config = AutoConfig.for_model(name, **{"bos_token_id": 1, "eos_token_id": 2, **sizes, **dict(changes)})
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # random bits depend on it
    try:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().train()
    finally:
        torch.set_default_dtype(default)


def batch_of(length: int = 10) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (3, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


@contextmanager
def float64() -> Iterator[None]:
    """The casts to float32 that models write out are to float64 here, and so are new tensors."""
    torch.set_default_dtype(torch.float64)
    try:
        with Promoted():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@cache
def traced(kind: str, attention: str | None = None) -> Program:
    with float64():
        return autopar.rewrite(autopar.trace(model_of(kind, attention), batch_of()))


def adapted(kind: str, *passes: dict[str, Any], attention: str | None = None, seed: int = 3) -> Program:
    """The program after passes, what is trained drawn at random (so that no gradient is zero)."""
    with float64():
        program = autopar.rewrite(traced(kind, attention), passes)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in program.parameters.items():
        if parameter.trainable:
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.1
            program.tensors[name] = nn.Parameter(program.tensors[name].detach() + noise)
    return program


@dataclass(frozen=True)
class Result:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    trained: int


def ours(program: Program, batch: dict[str, torch.Tensor] | None = None) -> Result:
    """Mean loss, gradients, and that nothing else has one."""
    with float64():
        module = program.module()
        for p in module.parameters():
            p.grad = None
        total, count = module(**(batch or batch_of()))
        (total / count).backward()
    named = dict(module.named_parameters())
    frozen = [n for n, p in named.items() if not program.parameters[n].trainable and p.grad is not None]
    assert frozen == []
    gradients = {n: p.grad.clone() for n, p in named.items() if program.parameters[n].trainable and p.grad is not None}
    return Result((total / count).detach(), gradients, sum(named[n].numel() for n in gradients))


def loss_of(program: Program) -> torch.Tensor:
    """The mean loss alone."""
    with float64():
        total, count = program.module()(**batch_of())
    return (total / count).detach()


def opened(kind: str, folder: Path, attention: str | None = None) -> nn.Module:
    """The adapter folder as `PeftModel.from_pretrained` opens it on the same model."""
    from peft import PeftModel

    config = json.loads((folder / "adapter_config.json").read_text())
    prompt = "num_virtual_tokens" in config  # peft opens these for inference only
    with float64():
        peft = PeftModel.from_pretrained(copy.deepcopy(model_of(kind, attention)), str(folder), is_trainable=not prompt)
        for parameter in peft.prompt_encoder.parameters() if prompt else ():
            parameter.requires_grad_(True)
        return peft.double().train()


def theirs(peft: nn.Module, batch: dict[str, torch.Tensor] | None = None) -> Result:
    with float64():
        loss = peft(**(batch or batch_of()), use_cache=False).loss
        loss.backward()
    gradients = {n: p.grad for n, p in peft.named_parameters() if p.requires_grad and p.grad is not None}
    return Result(loss.detach(), gradients, sum(p.numel() for p in peft.parameters() if p.requires_grad))


def assert_same(program: Program, a: Result, b: Result) -> None:
    """Loss, count and every gradient, ours put together as the adapter's file puts its tensors together."""
    assert a.trained == b.trained
    assert torch.allclose(a.loss, b.loss, rtol=1e-11, atol=0), (a.loss, b.loss)
    left = dict(b.gradients)
    for adapter in program.adapters:
        for key, saved in adapter.tensors.items():
            made = saved.value(a.gradients)
            name = next(n for n in left if file_name(n) == key)
            grad = left.pop(name)
            assert float((made - grad.reshape(made.shape)).norm()) <= 1e-9 * float(grad.norm()) + 1e-15, key
    assert left == {}


def file_name(parameter: str) -> str:
    """A parameter's name in peft's file: without the adapter's own name."""
    if parameter.startswith("prompt_encoder."):
        return "prompt_embeddings"
    return parameter.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
