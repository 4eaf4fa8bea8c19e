"""lora and dora against Hugging Face peft, and what they say to wrong targets."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import autopar
from autopar.api import compile_job
from autopar.errors import CheckpointError, PassError
from autopar.ir.rewrite import load, rewrite
from autopar.models.load import build
from autopar.runtime.seeded import Seeded
from autopar.sharding.placement import R
from autopar.spec.job import Job
from tests.contracts.families import program as family_program
from tests.passes.peft_cases import (
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

TARGETS = {
    "llama": ["query", "value"],
    "gpt2": ["query_key_value", "down"],  # weights stored (in, out)
    "bloom": ["query_key_value"],
    "falcon": ["query_key_value", "output"],
    "glm": ["query", "value"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", TARGETS)
def test_the_saved_adapter_is_the_same_model_in_peft_and_merged(kind: str, method: str, tmp_path: Path) -> None:
    options = {"rank": 4, "alpha": 6, "targets": TARGETS[kind], "rank_stabilized": kind == "llama"}
    program = adapted(kind, {method: options})
    result = ours(program)
    program.save_adapter(tmp_path)
    assert_same(program, result, theirs(opened(kind, tmp_path)))
    merged = program.merge()
    assert not merged.adapters and not merged.initial and "lora" not in str(merged)
    assert torch.allclose(loss_of(merged), result.loss, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_trained_is_opened(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(model_of("llama"))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_dora=True, init_lora_weights=False)
    with float64():
        peft = get_peft_model(model, config).double()
        peft.save_pretrained(tmp_path)
        wanted = peft(**batch_of()).loss
    options = {"rank": 4, "alpha": 6, "dora": True, "targets": ["query", "value"]}
    program = adapted("llama", {"lora": options}).load_adapter(tmp_path)
    assert torch.allclose(loss_of(program), wanted, rtol=1e-12, atol=0)
    with pytest.raises(CheckpointError, match="lora_alpha is 6, the program's lora has 7.0"):
        adapted("llama", {"lora": {**options, "alpha": 7}}).load_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="missing .*k_proj"):
        adapted("llama", {"lora": {**options, "targets": ["query", "key", "value"]}}).load_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="peft_type is 'LORA', the program's ia3 has 'IA3'"):
        adapted("llama", {"ia3": {}}).load_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        program.load_adapter(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no adapter"):
        traced("llama").save_adapter(tmp_path)


def test_dora_begins_as_the_base_model_with_or_without_dropout() -> None:
    base = loss_of(traced("llama"))
    with float64():
        program = autopar.rewrite(traced("llama"), [{"dora": {"rank": 4, "targets": ["query", "gate"]}}])
        dropped = autopar.rewrite(traced("llama"), [{"dora": {"rank": 4, "dropout": 0.5, "targets": ["query"]}}])
    assert torch.allclose(loss_of(program), base, rtol=1e-12, atol=0)
    assert torch.allclose(loss_of(dropped), base, rtol=1e-12, atol=0)  # what is dropped is scaled by m/‖W‖ − 1 = 0


def test_doras_first_norms_come_from_the_weights_that_a_job_names(tmp_path: Path) -> None:
    model = {"family": "llama", "layers": 1, "hidden": 16, "ffn": 24, "heads": 2, "vocab": 32}
    job = Job.model_validate({"model": model, "cluster": {"name": "local-cpu", "devices_per_host": 1}, "batch": {"sequences": 2, "length": 4},
                              "passes": [{"dora": {"rank": 2, "targets": ["query"]}}]})  # fmt: skip
    compile_job(job, tmp_path)
    [(name, norms)] = [(n, t) for n, t in load_file(tmp_path / "added.safetensors").items() if "magnitude" in n]
    weight = name.replace("lora_magnitude_vector.weight", "weight")
    source = Seeded(lambda: build(job.model, meta=True), job.train.seed)
    assert torch.allclose(norms, source.read(weight, R, 0, 1).float().norm(dim=1))


def test_a_target_of_one_layer_adapts_that_layer_alone() -> None:
    program = autopar.rewrite(traced("llama"), [{"lora": {"rank": 2, "targets": ["model.layers.1.mlp.up_proj"]}}])
    trainable = [n for n, p in program.parameters.items() if p.trainable]
    assert trainable == ["model.layers.1.mlp.up_proj.lora_A.weight", "model.layers.1.mlp.up_proj.lora_B.weight"]
    assert len(program.blocks) == 2


def test_an_embedding_can_be_adapted_and_starts_as_the_base_model() -> None:
    base, batch = traced("llama"), batch_of()
    program = autopar.rewrite(base, [{"lora": {"rank": 2, "targets": ["embedding"]}}])
    assert torch.equal(base.module()(**batch)[0], program.module()(**batch)[0])
    module = program.module()
    module(**batch)[0].backward()
    grads = {n: float(p.grad.norm()) for n, p in module.named_parameters() if p.grad is not None}
    assert set(grads) == {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"}
    assert grads["model.embed_tokens.lora_embedding_A"] > 0


def test_an_unknown_target_is_refused_with_the_roles_there_are() -> None:
    program = traced("llama")
    with pytest.raises(
        PassError, match=r"lora: no linear layer or embedding has the role or the name 'q_porj'.*query.*value"
    ):
        autopar.rewrite(program, [{"lora": {"targets": ["q_porj"]}}])


@pytest.mark.parametrize("options", [{"rank": 0}, {"targets": []}, {"dropout": 1.5}, {"rnak": 8}])
def test_impossible_options_are_refused_by_name(options: dict[str, object]) -> None:
    program = traced("llama")
    with pytest.raises(PassError, match=f"lora: .*{next(iter(options)).replace('rnak', 'rank')}"):
        autopar.rewrite(program, [{"lora": options}])


WRONG = [
    ({"lora": {"rnak": 8}}, "lora: unknown option 'rnak'; did you mean 'rank'?; options: rank, alpha, dropout,"),
    ({"lora": {"rank": "eight"}}, "lora: rank must be a whole number, not 'eight'"),
    ({"lora": {"rank": 2.5}}, "lora: rank must be a whole number, not 2.5"),
    ({"lora": {"rank": 0}}, "lora: rank must be at least 1, not 0"),
    ({"lora": {"alpha": None}}, "lora: alpha must be a number, not"),
    ({"lora": {"dropout": 1.5}}, "lora: dropout must be less than 1.0, not 1.5"),
    ({"lora": {"dora": "maybe"}}, "lora: dora must be true or false, not 'maybe'"),
    ({"lora": {"targets": "query"}}, "lora: targets must be a list, not 'query'"),
    ({"lora": {"targets": []}}, "lora: targets must have at least 1 entry, not 0"),
    ({"lora": {"targets": ["query", 1]}}, "lora: an entry of targets must be text, not 1"),
    ({"lora": 8}, "lora: its options must be a mapping of rank, alpha, dropout, targets, rank_stabilized, dora, not 8"),
    ({"lora": [1]}, "lora: its options must be a mapping of"),
    ({"adapter": {"style": "houslby"}}, "adapter: style is 'houslby', which is unknown; did you mean 'houlsby'?"),
    ({"mixed_precision": {"compute": "bfloat61"}}, "mixed_precision: compute: no such dtype; did you mean 'bfloat16'?"),
]


@pytest.mark.parametrize(("entry", "said"), WRONG, ids=lambda v: str(v)[:50])
def test_wrong_options_are_answered_by_what_would_be_right(entry: dict[str, object], said: str) -> None:
    with pytest.raises(PassError) as caught:
        load(entry)
    assert str(caught.value).startswith(said), caught.value
    assert "Input should" not in str(caught.value) and "Tuple" not in str(caught.value)


def test_a_tied_head_is_adapted_apart_from_its_embedding() -> None:
    model = copy.deepcopy(model_of("llama", tie_word_embeddings=True))
    program = autopar.rewrite(autopar.trace(model, batch_of()), [{"lora": {"rank": 2, "targets": ["lm_head"]}}])
    trainable = [n for n, p in program.parameters.items() if p.trainable]
    assert trainable == ["lm_head.lora_A.weight", "lm_head.lora_B.weight"]
    with pytest.raises(PassError, match="is tied to another layer"):
        program.merge()


def test_without_targets_the_layer_that_makes_queries_and_values_together_is_adapted() -> None:
    for family, wanted in (("hf_bloom", "query_key_value"), ("hf_llama", "q_proj")):
        after = rewrite(family_program(family), [{"lora": {}}])
        adapted = {n.rsplit(".", 3)[1] for n in after.parameters if n.endswith("lora_A.weight")}
        assert wanted in adapted and adapted <= {"query_key_value", "q_proj", "v_proj"}


def test_a_second_adapter_of_the_same_name_is_refused_in_the_passs_name() -> None:
    with pytest.raises(PassError, match=r"^lora: the model has a parameter '.*lora_A.weight' already"):
        rewrite(family_program("hf_llama"), [{"lora": {}}, {"lora": {}}])
