"""transformers' mixtures of experts: traced as one operator, equal to their own way of computing them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import autopar
from autopar.models.hosted_experts import experts_by

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
TYPES = {
    "mixtral": dict(num_key_value_heads=2, num_local_experts=4),
    "qwen2_moe": dict(
        num_key_value_heads=2, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24
    )
    | dict(num_experts_per_tok=2, decoder_sparse_step=1),
    "qwen3_moe": dict(
        num_key_value_heads=2, num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2, head_dim=8
    ),
    "olmoe": dict(num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
}


def model_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **TYPES[kind])).double().train()


def batch_of(sequences: int = 3, length: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(64, (sequences, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def operators(program: autopar.Program) -> set[str]:
    return {str(n.target) for _, graph in program.graphs() for n in graph.nodes}


@pytest.mark.parametrize("kind", TYPES)
def test_a_users_own_mixture_is_traced_and_equals_transformers(kind: str) -> None:
    model, batch = model_of(kind), batch_of()
    assert model.config._experts_implementation == "grouped_mm"
    program = autopar.trace(model, batch)
    assert model.config._experts_implementation == "grouped_mm", "the user's model is as it was"
    traced = program.module()
    loss, count = traced(**batch)
    ours = gradients(loss, traced)
    with experts_by(model):
        logits = model(input_ids=batch["input_ids"]).logits
    assert model.config._experts_implementation == "grouped_mm"
    flat = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    wanted = torch.nn.functional.cross_entropy(*flat, reduction="sum")
    theirs = gradients(wanted, model)
    assert count == 21 and ours.keys() == theirs.keys()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)  # their norms are in float32
    whole = sum(g.square().sum() for g in theirs.values()).sqrt()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name] / whole, gradient / whole, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [k for k in TYPES if k != "gpt_oss"])
def test_plain_experts_are_one_operator(kind: str) -> None:
    found = operators(autopar.trace(model_of(kind), batch_of()))
    assert "autopar.routed_experts.default" in found and not any("grouped_mm" in f or "histc" in f for f in found)


def test_experts_with_biases_and_a_gate_of_their_own_stay_transformers() -> None:
    found = operators(autopar.trace(model_of("gpt_oss"), batch_of()))
    assert "autopar.routed_experts.default" not in found and "aten.bmm.default" in found


class FixedSizes(torch.nn.Module):
    """A mixture that asks for the length as a number, so that every size is traced on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of("mixtral")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = torch.tensor([list(range(input_ids.shape[1]))])
        return self.inner(input_ids=input_ids, position_ids=places.to(input_ids.device)).logits


def test_experts_are_one_operator_at_every_size_that_is_traced_on_its_own() -> None:
    program = autopar.trace(FixedSizes(), batch_of())
    assert not program.sizes, "it has no symbols"
    for sequences, length in ((2, 8), (4, 16)):
        other = program.at(batch=sequences, length=length)
        assert "autopar.routed_experts.default" in operators(other)
