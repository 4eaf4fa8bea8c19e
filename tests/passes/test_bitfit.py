"""bitfit against the same model with everything but its biases frozen, run as it is."""

from __future__ import annotations

import copy

import pytest
import torch

import autopar
from autopar.errors import PassError
from tests.passes.peft_cases import adapted, batch_of, float64, model_of, ours, traced


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "bloom", "falcon"])
def test_biases_have_the_gradients_of_the_model_run_as_it_is(kind: str) -> None:
    program = autopar.rewrite(traced(kind), [{"bitfit": {}}])
    model = copy.deepcopy(model_of(kind))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    with float64():
        loss = model(**batch_of(), use_cache=False).loss
        loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    result = ours(program)
    assert torch.allclose(result.loss, loss, rtol=1e-12, atol=0)
    assert result.gradients.keys() == wanted.keys() and len(wanted) > 3
    floor = 1e-6 * max(float(g.norm()) for g in wanted.values())  # keys' biases have no gradient in exact arithmetic
    for name, grad in wanted.items():
        assert float((result.gradients[name] - grad).norm()) <= 1e-9 * max(float(grad.norm()), floor), name


def test_a_model_without_biases_gets_some_that_begin_at_zero() -> None:
    base, program = ours(traced("llama")), autopar.rewrite(traced("llama"), [{"bitfit": {}}])
    result = ours(program)
    assert torch.equal(result.loss, base.loss)
    assert result.trained == 3 * (48 + 24 + 24 + 48 + 64 + 64 + 48)
    with pytest.raises(PassError, match="bitfit: no bias is left to train"):
        autopar.rewrite(traced("llama"), [{"bitfit": {"add": False}}])


def test_targets_choose_biases_of_linear_layers_and_of_norms() -> None:
    chosen = autopar.rewrite(traced("bloom"), [{"bitfit": {"targets": ["query_key_value", "ln_f"]}}])
    names = [n for n, p in chosen.parameters.items() if p.trainable]
    assert names == [
        *(f"transformer.h.{i}.self_attention.query_key_value.bias" for i in range(3)),
        "transformer.ln_f.bias",
    ]
    with pytest.raises(PassError, match="no linear layer has the role or the name 'querry'"):
        autopar.rewrite(traced("bloom"), [{"bitfit": {"targets": ["querry"]}}])


@pytest.mark.parametrize("turned", [False, True])
def test_a_second_method_leaves_what_the_first_trains(turned: bool) -> None:
    passes = [{"bitfit": {}}, {"lora": {"rank": 2, "targets": ["up"]}}, {"prompt_tuning": {"tokens": 3}}]
    program = adapted("bloom", *(passes[::-1] if turned else passes))
    trained = {n for n, p in program.parameters.items() if p.trainable}
    assert trained == {n for a in program.adapters for n in a.parameters} == ours(program).gradients.keys()
    assert len([n for n in trained if n.endswith(".bias")]) == 20 and len([n for n in trained if ".lora_" in n]) == 6
