"""A declared decoder takes its family's defaults, and what is wrong in it is named."""

from __future__ import annotations

import pytest

from autopar.errors import SpecError
from autopar.spec.model import resolve

LLAMA = dict(family="llama", layers=4, hidden=256, ffn=512, heads=4, kv_heads=2, vocab=1000)


def test_given_fields_lie_over_the_familys_and_the_rest_follows():
    spec = resolve({**LLAMA, "rope": {"theta": 5e5}, "norm_eps": 1e-5})
    assert (spec.norm, spec.activation, spec.positions, spec.tied) == ("rmsnorm", "swiglu", "rope", False)
    assert (spec.head_dim, spec.rope.theta, spec.rope.style, spec.norm_eps) == (64, 5e5, "half", 1e-5)
    gpt = resolve(dict(family="gpt", layers=2, hidden=64, heads=4, vocab=100, bias={"qkv": False}))
    assert (gpt.ffn, gpt.kv_heads, gpt.bias.qkv, gpt.bias.up) == (256, 4, False, True)


def test_a_resolved_spec_resolves_to_itself():
    spec = resolve({**LLAMA, "tied": True})
    assert resolve(spec.model_dump()) == spec


MISTAKES = {
    "unknown family": (dict(family="lama"), "unknown family 'lama'; did you mean 'llama'"),
    "heads do not divide hidden": (dict(heads=5), "heads: 5"),
    "kv heads do not divide heads": (dict(kv_heads=3), "kv_heads: 3"),
    "no heads": (dict(heads=0), "heads must be at least 1"),
    "negative vocabulary": (dict(vocab=-5), "vocab must be at least 1, not -5"),
    "missing hidden": (dict(hidden=None), "'hidden'"),
    "missing ffn of a gated MLP": (dict(ffn=None), "'ffn'"),
    "misspelled field": (dict(ffm=3), "'ffm'"),
    "misspelled nested field": (dict(rope={"teta": 3}), "did you mean 'theta'"),
    "text for a number": (dict(layers="many"), "layers must be a whole number"),
    "unknown norm": (dict(norm="rms"), "did you mean 'rmsnorm'"),
    "odd rotation": (dict(head_dim=15), "head_dim: 15"),
    "a gate where there is none": (dict(activation="gelu", fused_gate_up=True), "gelu has no gate"),
    "a family of roles only": (dict(family="bert"), "family 'bert' only names roles"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    fields, words = MISTAKES[mistake]
    given = {key: value for key, value in {**LLAMA, **fields}.items() if value is not None}
    with pytest.raises(SpecError) as caught:
        resolve(given)
    assert words in str(caught.value)


def test_no_family_at_all_is_named():
    with pytest.raises(SpecError, match="'family'"):
        resolve({"layers": 3})
