"""Prompt tuning, prefix tuning and LLaMA-Adapter against Hugging Face peft, in both spellings of attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar.errors import CheckpointError, PassError
from autopar.ir.program import Program
from tests.passes.peft_cases import (
    MODELS,
    adapted,
    assert_same,
    batch_of,
    float64,
    loss_of,
    model_of,
    opened,
    ours,
    theirs,
    traced,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")
EAGER = {"llama", "falcon_alibi"}  # written-out attention; the others as transformers prefers it (BLOOM has no other)


def compared(kind: str, passes: dict[str, Any], folder: Path) -> Program:
    attention = "eager" if kind in EAGER else None
    program = adapted(kind, passes, attention=attention)
    result = ours(program)
    program.save_adapter(folder)
    assert_same(program, result, theirs(opened(kind, folder, attention)))
    return program


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_prompt_is_the_same_model_in_peft(kind: str, tmp_path: Path) -> None:
    program = compared(kind, {"prompt_tuning": {"tokens": 4}}, tmp_path)
    again = adapted(kind, {"prompt_tuning": {"tokens": 4}}, seed=9, attention="eager" if kind in EAGER else None)
    assert torch.equal(loss_of(again.load_adapter(tmp_path)), loss_of(program))


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_prefix_is_the_same_model_in_peft(kind: str, tmp_path: Path) -> None:
    heads = {"per_query_head": True} if kind == "falcon" else {}  # transformers repeats Falcon's keys before it caches
    compared(kind, {"prefix_tuning": {"tokens": 4, **heads}}, tmp_path)


@pytest.mark.parametrize("layers", [None, 2])
def test_a_saved_llama_adapter_is_the_same_model_in_peft(layers: int | None, tmp_path: Path) -> None:
    compared("llama", {"llama_adapter": {"tokens": 4, "layers": layers}}, tmp_path)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_perceptrons_that_make_prompts_have_pefts_gradients_and_end_as_its_files(method: str, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, PromptEncoderConfig, get_peft_model

    common: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "encoder_hidden_size": 7}
    prefix = method == "prefix_tuning"
    config = PrefixTuningConfig(**common, prefix_projection=True) if prefix else PromptEncoderConfig(**common, encoder_reparameterization_type="MLP")  # fmt: skip
    program = adapted("glm", {method: {"tokens": 3, "projection" if prefix else "encoder": 7}})
    [saved] = program.adapters[0].tensors.values()
    with float64():
        peft = get_peft_model(copy.deepcopy(model_of("glm")), config).double()
        encoder = dict(peft.prompt_encoder.default.named_parameters())
        groups = [saved.parts, *(names for layer in saved.through for names in (layer.weights, layer.biases))]
        for parameter, names in zip(encoder.values(), groups, strict=True):
            parameter.data.copy_(torch.cat([program.tensors[n].detach() for n in names]))
    mine, other = ours(program), theirs(peft)
    assert torch.allclose(mine.loss, other.loss, rtol=1e-11, atol=0) and mine.trained == other.trained
    for parameter, names in zip(encoder.values(), groups, strict=True):
        made = torch.cat([mine.gradients[n] for n in names])
        assert float((made - parameter.grad).norm()) <= 1e-9 * float(parameter.grad.norm()), names
    program.save_adapter(tmp_path)
    with float64():
        assert torch.allclose(
            opened("glm", tmp_path)(**batch_of(), use_cache=False).loss, mine.loss, rtol=1e-11, atol=0
        )
    with pytest.raises(CheckpointError, match="reparameterizing layers"):
        program.load_adapter(tmp_path)
    plain = adapted("glm", {method: {"tokens": 3}})
    assert torch.allclose(loss_of(plain.load_adapter(tmp_path)), mine.loss, rtol=1e-11, atol=0)


def test_padding_and_virtual_tokens_go_together(tmp_path: Path) -> None:
    mask = torch.ones(3, 10, dtype=torch.int64)
    mask[0, :4] = 0
    batch = {**batch_of(), "attention_mask": mask}
    with float64():
        base = autopar.rewrite(autopar.trace(model_of("bloom"), batch))
    for i, passes in enumerate(({"prompt_tuning": {"tokens": 3}}, {"prefix_tuning": {"tokens": 3}})):
        program = adapted("bloom", passes)
        program.save_adapter(tmp_path / str(i))
        with float64():
            padded = autopar.rewrite(base, [passes]).load_adapter(tmp_path / str(i))
        mine, other = ours(padded, batch), theirs(opened("bloom", tmp_path / str(i)), batch)
        assert torch.allclose(mine.loss, other.loss, rtol=1e-11, atol=0)


def test_llama_adapter_begins_as_the_base_model_on_other_families() -> None:
    for kind in ("gpt2", "bloom", "falcon", "glm"):
        with float64():
            program = autopar.rewrite(traced(kind), [{"llama_adapter": {"tokens": 3, "layers": 1, "gates": "head"}}])
        assert torch.allclose(loss_of(program), loss_of(traced(kind)), rtol=1e-12, atol=0)


def test_prompts_of_the_adapter_stay_without_position_behind_a_prefix() -> None:
    passes: list[dict[str, Any]] = [{"prefix_tuning": {"tokens": 3}}, {"llama_adapter": {"tokens": 4}}]
    one, other = adapted("llama", *passes), adapted("llama", *passes[::-1])
    for name in one.tensors:
        other.tensors[name] = one.tensors[name]
    assert torch.allclose(loss_of(one), loss_of(other), rtol=1e-12, atol=0)


def test_what_has_no_tokens_no_attention_or_no_free_length_is_refused() -> None:
    for passes in ({"prompt_tuning": {}}, {"prefix_tuning": {}}, {"llama_adapter": {}}):
        linear = autopar.trace(torch.nn.Linear(4, 3), {"input": torch.randn(5, 4), "labels": torch.randint(3, (5,))})
        with pytest.raises(PassError, match=r"no sequence of tokens|no attention"):
            autopar.rewrite(linear, [passes])
    with pytest.raises(
        PassError, match=r"prompt_tuning: this program has fixed sizes; apply the pass before `.at\(\)`"
    ):
        autopar.rewrite(traced("llama").at(batch=2, length=6), [{"prompt_tuning": {}}])
    with pytest.raises(PassError, match="9 layers are asked for, the model has 3"):
        autopar.rewrite(traced("llama"), [{"llama_adapter": {"layers": 9}}])
