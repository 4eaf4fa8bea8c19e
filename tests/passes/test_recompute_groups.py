"""What a pass says may run again: groups of operators or modules by name; the solver keeps to it."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import autopar
from autopar.errors import PassError, PlanError
from autopar.ir.groups import GROUPS, groups
from autopar.ir.program import Program
from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.plan.plan import Selected
from tests.distributed.cases import source_of
from tests.lower.emitted import planned


@cache
def traced(family: str) -> Program:
    source = source_of(family)
    model = build(source, meta=False, dtype=torch.float32, seed=1)
    return autopar.trace(model, example_batch(model, 4, 16, source=source))


def selected(family: str, mode: str = "custom_5", **options: object) -> Selected:
    program = autopar.rewrite(traced(family), [{"recompute": options}])
    (made,) = (
        s for block in planned(program, 4, 16, recompute=mode).plan.recompute_groups.values() for s in block.values()
    )
    return made


def test_operators_of_a_llama_block_by_group() -> None:
    program = autopar.rewrite(traced("llama"))
    found = {n.name: sorted(g) for n, g in groups(program.blocks["block_0"]).items()}
    assert found["scaled_dot_product_attention"] == ["attention"]
    assert found["silu"] == found["mul_8"] == ["activation"]
    assert found["rsqrt"] == found["mul_1"] == found["rsqrt_1"] == found["mul_7"] == ["norm"]
    assert found["linear"] == found["linear_6"] == ["product"]
    assert found["add_3"] == found["add_5"] == ["sum"]
    assert found["add_1"] == found["cat"] == ["rotary"]
    assert {g for kinds in found.values() for g in kinds} <= set(GROUPS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "falcon-40b", "glm"])
@pytest.mark.parametrize("group", ["norm", "activation", "attention"])
def test_only_the_groups_that_a_pass_names_run_again(family: str, group: str) -> None:
    program = autopar.rewrite(traced(family))
    known = {n.name: g for n, g in groups(program.blocks["block_0"]).items()}
    made = selected(family, groups=[group])
    assert made.again and all(group in known[name] for name in made.again)


def test_modules_are_named_by_globs() -> None:
    made = selected("llama", groups=["model.layers.*.mlp"])
    assert set(made.again) == {"silu", "mul_8", "linear_4", "linear_5"}
    assert set(made.again) == set(selected("llama", groups=["mlp*"]).again)


def test_nothing_may_run_again() -> None:
    program = autopar.rewrite(traced("llama"), [{"recompute": {"groups": []}}])
    assert not planned(program, 4, 16).plan.recompute_groups
    with pytest.raises(
        PlanError, match="pins.recompute: full runs .* again, and the recompute pass says only nothing may"
    ):
        planned(program, 4, 16, recompute="full")


def test_a_pin_that_needs_more_than_may_run_again_is_refused() -> None:
    program = autopar.rewrite(traced("llama"), [{"recompute": {"groups": ["norm"]}}])
    with pytest.raises(PlanError, match="selective runs scaled_dot_product_attention of block_0 again"):
        planned(program, 4, 16, recompute="selective")


def test_a_group_that_is_none_and_no_module_is_refused_by_name() -> None:
    with pytest.raises(PassError, match="recompute: 'norms' is no group and matches no module; did you mean 'norm'"):
        autopar.rewrite(traced("llama"), [{"recompute": {"groups": ["norms"]}}])
