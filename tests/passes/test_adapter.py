"""Bottleneck adapters against the model run as it is, with hooks that add them by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopar
from autopar.errors import PassError
from autopar.ir.program import Program
from tests.passes.minimal import Decoder, ids
from tests.passes.peft_cases import adapted, loss_of, model_of, ours, theirs, traced

LAST = {  # kind → the modules that a half of a block ends in, and its feed-forward
    "llama": (("self_attn.o_proj", "mlp.down_proj"), "mlp"),
    "falcon": (("self_attention.dense", "mlp.dense_4h_to_h"), "mlp"),
    "bloom": (("self_attention.dense", "mlp.dense_4h_to_h"), "mlp"),
    "gpt2": (("attn.c_proj", "mlp.c_proj"), "mlp"),
    "glm": (("self_attn.o_proj", "mlp.down_proj"), "mlp"),
}


def by_hand(kind: str, program: Program, style: str, act: Any) -> nn.Module:
    """The eager model; its parameters carry the adapters under the program's names."""
    model = copy.deepcopy(model_of(kind)).requires_grad_(False)
    ends, feedforward = LAST[kind]
    for path, module in list(model.named_modules()):
        if path.endswith(ends if style == "houlsby" else ends[1]) and f"{path}.adapter_up.weight" in program.parameters:
            parts = [
                program.tensors[f"{path}.adapter_{n}"] for n in ("down.weight", "down.bias", "up.weight", "up.bias")
            ]
            held = [nn.Parameter(p.detach().clone()) for p in parts]
            for name, p in zip(("down", "down_bias", "up", "up_bias"), held, strict=True):
                module.register_parameter(f"adapter_{name}", p)

            def bottleneck(x: torch.Tensor, held: list[nn.Parameter] = held) -> torch.Tensor:
                return F.linear(act(F.linear(x, held[0], held[1])), held[2], held[3])

            hook(model, path, feedforward, style, bottleneck)
    return model


def hook(model: nn.Module, path: str, feedforward: str, style: str, bottleneck: Any) -> None:
    last = model.get_submodule(path)
    if style != "parallel":
        last.register_forward_hook(lambda _m, _i, out: out + bottleneck(out))
        return
    seen: list[torch.Tensor] = []
    half = model.get_submodule(path[: path.rindex(f".{feedforward}.") + len(feedforward) + 1])
    half.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    last.register_forward_hook(lambda _m, _i, out: out + bottleneck(seen.pop()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "style"), [(k, s) for k in LAST for s in ("houlsby", "pfeiffer", "parallel")][::2])
def test_loss_and_gradients_equal_the_model_with_hooks(kind: str, style: str) -> None:
    program = adapted(kind, {"adapter": {"size": 5, "style": style, "activation": "silu"}})
    reference = theirs(by_hand(kind, program, style, F.silu))
    names = {"down": "down.weight", "down_bias": "down.bias", "up": "up.weight", "up_bias": "up.bias"}
    found = {f"{p}.adapter_{names[k]}": g for n, g in reference.gradients.items() for p, k in [n.split(".adapter_")]}
    result = ours(program)
    assert torch.allclose(result.loss, reference.loss, rtol=1e-11, atol=0)
    assert result.trained == reference.trained == (2 if style == "houlsby" else 1) * 3 * (2 * 5 * 48 + 5 + 48)
    for name, grad in found.items():
        assert float((result.gradients[name] - grad).norm()) <= 1e-9 * float(grad.norm()) + 1e-15, name


def test_an_adapter_begins_as_the_base_model_and_survives_a_file(tmp_path: Path) -> None:
    begun = autopar.rewrite(traced("llama"), [{"adapter": {"size": 4}}])
    assert torch.equal(loss_of(begun), loss_of(traced("llama")))
    program = adapted("llama", {"adapter": {"size": 4}})
    program.save_adapter(tmp_path)
    again = adapted("llama", {"adapter": {"size": 4}}, seed=9).load_adapter(tmp_path)
    assert torch.equal(loss_of(again), loss_of(program))
    with pytest.raises(PassError, match="adapter: its parameters cannot be folded"):
        program.merge()


def test_several_adapters_are_saved_in_a_folder_each(tmp_path: Path) -> None:
    passes = [{"adapter": {"size": 4}}, {"lora": {"rank": 2}}, {"prompt_tuning": {"tokens": 2}}]
    program = adapted("llama", *passes)
    program.save_adapter(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "lora", "prompt_tuning"}
    again = adapted("llama", *passes, seed=9).load_adapter(tmp_path)
    assert torch.equal(loss_of(again), loss_of(program))


def test_a_model_without_roles_asks_for_targets() -> None:
    with pytest.raises(PassError, match="adapter: this model has no role 'output'"):
        autopar.rewrite(autopar.trace(Decoder(), ids()), [{"adapter": {}}])
