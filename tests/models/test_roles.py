"""Roles are found in our decoders and in Hugging Face's models, by the family's globs alone."""

from __future__ import annotations

import pytest
from torch import nn

from autopar.models.load import build
from autopar.models.shrink import shrink
from autopar.spec.family import all_roles, families, load_family, roles

SEPARATE = {"query", "key", "value", "output", "up", "down", "embedding", "head", "norm"}
FUSED = {"query_key_value", "output", "up", "down", "embedding", "head", "norm"}
EXPECTED = {
    "llama": SEPARATE | {"gate"},
    "qwen3": SEPARATE | {"gate"},
    "gemma2": SEPARATE | {"gate"},
    "phi3": FUSED - {"up"} | {"gate_up"},
    "glm": SEPARATE - {"up"} | {"gate_up"},
    "mixtral": SEPARATE - {"up"} | {"router", "gate_up"},
    "gpt2": FUSED | {"positions"},
    "gpt_neox": FUSED,
    "gptj": SEPARATE,
    "opt": SEPARATE | {"positions"},
    "phi": SEPARATE,
    "falcon": FUSED,
    "bloom": FUSED,
    "mpt": FUSED,
    "t5": SEPARATE | {"positions"},
    "bart": SEPARATE | {"positions"},
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_every_parameter_of_a_covered_type_has_its_role(model_type):
    model = build(shrink({"hf": model_type, "config": {}}), meta=True)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = roles(names, model_type)
    assert set(found) == set(names), sorted(set(names) - set(found))
    assert set(found.values()) == EXPECTED[model_type]
    assert roles(names) == found  # also when the type is not told


DECLARED = [name for name in families() if load_family(name).defaults]


@pytest.mark.parametrize("family", DECLARED)
def test_every_parameter_of_a_declared_model_has_its_role(family):
    fields = dict(layers=2, hidden=16, heads=2, ffn=32, vocab=11)
    model = build({"family": family, **fields}, meta=True)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = roles(names, family)
    assert set(found) == set(names)
    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            assert found[f"{name}.weight"] == name.rpartition(".")[2]


def test_a_module_is_found_by_its_path_and_every_instance_alike():
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 7, 31)]
    assert roles(paths, "llama") == dict.fromkeys(paths, "query")
    assert roles(["encoder.flux"], "llama") == {}


def test_no_family_names_a_role_that_no_other_part_knows():
    assert {"query", "key", "value", "query_key_value", "output", "gate", "up", "gate_up", "down"} <= set(all_roles())
