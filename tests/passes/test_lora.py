"""lora against Hugging Face peft, and what it says to wrong targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autopar
from autopar.errors import PassError
from autopar.ir.promote import Promoted

SMALL = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=61)
FAMILIES = {
    "llama": ({**SMALL, "num_key_value_heads": 2}, ["q_proj", "v_proj"], ["query", "value"]),
    "gpt2": (dict(n_embd=48, n_layer=3, n_head=4, vocab_size=61), ["c_attn"], ["query_key_value"]),
    "bloom": (dict(hidden_size=48, n_layer=3, n_head=4, vocab_size=61), ["query_key_value"], ["query_key_value"]),
    "falcon": (
        dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_kv_heads=2, vocab_size=61,
             new_decoder_architecture=True),
        ["query_key_value", "dense"],
        ["query_key_value", "output"],
    ),
    "glm": ({**SMALL, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0}, ["q_proj", "v_proj"], ["query", "value"]),
}  # fmt: skip


def model_of(kind: str, config: dict[str, object]) -> nn.Module:
    from autopar.models.load import build

    config = {**config, **{k: 0.0 for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if kind == "gpt2"}}
    return build({"hf": kind, "config": config}, meta=False).double()


def batch_of(vocab: int = 61) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (3, 10), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(FAMILIES))
def test_logits_loss_and_adapter_gradients_equal_pefts(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    config, theirs, ours = FAMILIES[kind]
    model, batch = model_of(kind, config), batch_of()
    torch.set_default_dtype(torch.float64)
    try:
        with Promoted():
            program = autopar.rewrite(
                autopar.trace(model, batch),
                [{"lora": {"rank": 4, "alpha": 6, "targets": ours, "rank_stabilized": True}}],
            )
            module = program.module()
            peft = get_peft_model(
                model, LoraConfig(r=4, lora_alpha=6, target_modules=theirs, use_rslora=True, lora_dropout=0.0)
            )
            peft = peft.double()
            values = {n: p for n, p in peft.named_parameters() if p.requires_grad}
            fill(module, values)
            loss, count = module(**batch)
            (loss / count).backward()
            reference = peft(**batch, use_cache=False).loss
            reference.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(loss / count, reference, rtol=1e-12, atol=0)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(p.numel() for p in values.values())
    for name, parameter in trained.items():
        grad = values[peft_name(name)].grad
        assert (parameter.grad - grad).norm() <= 1e-9 * grad.norm() + 1e-15, name
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad and p.grad is not None]
    assert frozen == []


def peft_name(name: str) -> str:
    path, kind, _ = name.rsplit(".", 2)
    return f"base_model.model.{path}.{kind}.default.weight"


def fill(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """The same adapter in both: random, B included, so that A's gradient is not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
                values[peft_name(name)].copy_(parameter)


def test_a_target_of_one_layer_adapts_that_layer_alone() -> None:
    model = model_of("llama", FAMILIES["llama"][0])
    program = autopar.rewrite(
        autopar.trace(model, batch_of()), [{"lora": {"rank": 2, "targets": ["model.layers.1.mlp.up_proj"]}}]
    )
    trainable = [n for n, p in program.parameters.items() if p.trainable]
    assert trainable == ["model.layers.1.mlp.up_proj.lora_A.weight", "model.layers.1.mlp.up_proj.lora_B.weight"]
    assert len(program.blocks) == 2


def test_an_embedding_can_be_adapted_and_starts_as_the_base_model() -> None:
    model, batch = model_of("llama", FAMILIES["llama"][0]), batch_of()
    base = autopar.rewrite(autopar.trace(model, batch))
    program = autopar.rewrite(base, [{"lora": {"rank": 2, "targets": ["embedding"]}}])
    assert torch.equal(base.module()(**batch)[0], program.module()(**batch)[0])
    module = program.module()
    module(**batch)[0].backward()
    grads = {n: float(p.grad.norm()) for n, p in module.named_parameters() if p.grad is not None}
    assert set(grads) == {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"}
    assert grads["model.embed_tokens.lora_embedding_A"] > 0


def test_an_unknown_target_is_refused_with_the_roles_there_are() -> None:
    program = autopar.trace(model_of("llama", FAMILIES["llama"][0]), batch_of())
    with pytest.raises(
        PassError, match=r"lora: no linear layer or embedding has the role or the name 'q_porj'.*query.*value"
    ):
        autopar.rewrite(program, [{"lora": {"targets": ["q_porj"]}}])


@pytest.mark.parametrize("options", [{"rank": 0}, {"targets": []}, {"dropout": 1.5}, {"rnak": 8}])
def test_impossible_options_are_refused_by_name(options: dict[str, object]) -> None:
    program = autopar.trace(model_of("llama", FAMILIES["llama"][0]), batch_of())
    with pytest.raises(PassError, match=f"lora: .*{next(iter(options)).replace('rnak', 'rank')}"):
        autopar.rewrite(program, [{"lora": options}])


def test_a_tied_head_is_adapted_apart_from_its_embedding() -> None:
    config = {**FAMILIES["llama"][0], "tie_word_embeddings": True}
    program = autopar.rewrite(
        autopar.trace(model_of("llama", config), batch_of()), [{"lora": {"rank": 2, "targets": ["lm_head"]}}]
    )
    trainable = [n for n, p in program.parameters.items() if p.trainable]
    assert trainable == ["lm_head.lora_A.weight", "lm_head.lora_B.weight"]
