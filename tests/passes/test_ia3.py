"""ia3 against Hugging Face peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autopar
from autopar.errors import PassError
from tests.passes.minimal import Decoder, ids
from tests.passes.peft_cases import adapted, assert_same, loss_of, opened, ours, theirs, traced


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "falcon", "glm"])
def test_the_saved_vectors_are_the_same_model_in_peft_and_merged(kind: str, tmp_path: Path) -> None:
    program = adapted(kind, {"ia3": {}})
    result = ours(program)
    program.save_adapter(tmp_path)
    assert_same(program, result, theirs(opened(kind, tmp_path)))
    again = adapted(kind, {"ia3": {}}, seed=9).load_adapter(tmp_path)
    assert torch.equal(loss_of(again), result.loss)
    merged = program.merge()
    assert "ia3" not in str(merged)
    assert torch.allclose(loss_of(merged), result.loss, rtol=1e-12, atol=0)


def test_the_default_targets_are_keys_values_and_the_feed_forwards_inner_activations() -> None:
    program = adapted("llama", {"ia3": {}})
    first = [n for n in program.adapters[0].parameters if ".layers.0." in n]
    assert {n.split(".", 3)[3]: program.parameters[n].shape for n in first} == {
        "self_attn.k_proj.ia3_l": (24, 1),
        "self_attn.v_proj.ia3_l": (24, 1),
        "mlp.down_proj.ia3_l": (1, 64),
    }
    fewer = autopar.rewrite(traced("llama"), [{"ia3": {"targets": ["value"], "feedforward": []}}])
    assert len(fewer.adapters[0].parameters) == 3


def test_a_model_without_roles_asks_for_targets() -> None:
    with pytest.raises(PassError, match="ia3: this model has no roles 'key' and 'value'; name its layers in `targets`"):
        autopar.rewrite(autopar.trace(Decoder(), ids()), [{"ia3": {}}])
