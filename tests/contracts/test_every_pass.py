"""What every pass promises, asked of every pass that is found, on every family."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from autopar.errors import PassError
from autopar.ir.edit import layers
from autopar.ir.ops import Linear
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass, applied, discover, load
from autopar.ir.verify import verify
from tests.contracts.families import (
    FAMILIES,
    LENGTH,
    PASSES,
    WITHOUT_ATTENTION,
    base,
    computed,
    eager,
    error,
    program,
    traced,
)

CLOSE = 1e-10  # float64 has 1e-16; sums of some hundred terms in another order lose a few digits


def instance(name: str, what: Program) -> Pass:
    """The pass as its options stand by default; where its targets are not there, on a linear layer that is."""
    kind = discover()[name]
    if "targets" not in kind.model_fields:
        return kind()
    linears = layers(what, (Linear,))
    roles = {what.roles.get(p) for layer in linears for p in layer.paths}
    wanted = kind().targets  # type: ignore[attr-defined]
    fits = any(roles) if wanted is None else set(wanted) <= roles  # None: what the family's roles suggest
    return kind() if fits else kind(targets=(linears[0].paths[0],))  # type: ignore[call-arg]


def before(name: str, family: str) -> Program:
    return traced(family) if name == "canonicalize" else program(family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_verifies_leaves_its_input_alone_and_keeps_its_promise_of_numerics(name: str, family: str) -> None:
    what = before(name, family)
    text, tables, history = str(what), (dict(what.parameters), dict(what.tensors)), list(what.history)
    item = instance(name, what)
    try:
        after = applied(item, what)
    except PassError as problem:  # tokens, or attention, are what the method is about
        assert family in WITHOUT_ATTENTION and str(problem).startswith(f"{name}: "), problem
        return
    verify(after)
    assert str(what) == text and what.history == history
    assert (what.parameters, what.tensors) == tables
    assert after.history[: len(history)] == history and after.history[-1].startswith(f"{name}(")
    loss, gradients = computed(after, family)
    assert torch.isfinite(loss) and gradients
    if item.numerics is Numerics.CHANGES:
        return
    wanted = eager(family) if name == "canonicalize" else base(family)
    if item.numerics is Numerics.EXACT:
        assert torch.equal(loss, wanted[0]) and all(torch.equal(g, wanted[1][n]) for n, g in gradients.items())
    assert error((loss, gradients), wanted) < CLOSE


@pytest.mark.parametrize("family", ["llama", "hf_bloom", "conv"])
@pytest.mark.parametrize("name", PASSES)
def test_a_rewritten_program_takes_other_sizes(name: str, family: str) -> None:
    what = before(name, family)
    try:
        after = applied(instance(name, what), what)
    except PassError:
        assert family in WITHOUT_ATTENTION
        return
    static = after.at(batch=3, length=None if family == "conv" else LENGTH + 3)
    verify(static)
    sizes = {s for _, g in static.graphs() for n in g.nodes if n.op != "output" for s in shapes(n.meta["val"])}
    assert all(type(s) is int for s in sizes), "symbols are left"


def shapes(value: object) -> list[object]:
    if isinstance(value, (tuple, list)):
        return [s for v in value for s in shapes(v)]
    return list(value.shape) if isinstance(value, torch.Tensor) else []


@cache
def alone(name: str) -> Program:
    """A llama after one pass; passes leave their input as it is, which another test asks of them."""
    return applied(instance(name, program("llama")), program("llama"))


@pytest.mark.parametrize("second", PASSES)
@pytest.mark.parametrize("first", PASSES)
def test_passes_follow_each_other_in_any_order_or_say_which_is_right(first: str, second: str) -> None:
    what = alone(first)
    try:
        what = applied(instance(second, what), what)
    except PassError as problem:
        if f"{second}: put it before {first}" in str(problem):
            return
        kinds = [discover()[n] for n in (first, second)]  # the same method, or a kind of it
        assert (issubclass(*kinds) or issubclass(*kinds[::-1])) and "already" in str(problem), problem
        return
    loss, gradients = computed(what, "llama")
    assert torch.isfinite(loss) and gradients


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_run_again_changes_nothing_where_it_promises_the_same_mathematics(name: str) -> None:
    if discover()[name].numerics is Numerics.CHANGES:
        pytest.skip("adds to the model each time")
    once = applied(instance(name, program("hf_llama")), program("hf_llama"))
    assert str(applied(instance(name, once), once)) == str(once)


@pytest.mark.parametrize("name", PASSES)
def test_options_survive_a_job_file(name: str) -> None:
    item = instance(name, program("llama"))
    entry = json.loads(json.dumps({name: item.model_dump(mode="json")}))
    assert load(entry) == item


@pytest.mark.parametrize("name", PASSES)
def test_an_unknown_option_is_refused_by_name(name: str) -> None:
    with pytest.raises(PassError, match=f"{name}: unknown option 'no_such_option'"):
        load({name: {"no_such_option": 1}})


@pytest.mark.parametrize("name", [n for n in PASSES if "targets" in discover()[n].model_fields])
def test_an_unknown_target_is_refused_by_name(name: str) -> None:
    with pytest.raises(PassError, match="no_such_layer"):
        applied(load({name: {"targets": ["no_such_layer"]}}), program("hf_llama"))


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_says_what_it_does(name: str) -> None:
    kind = discover()[name]
    assert kind.__doc__ and isinstance(kind.numerics, Numerics) and kind.name == name
