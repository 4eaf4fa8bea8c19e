"""What kernels cost: the model's own FLOPs stay, what is kept and moved shrinks."""

from __future__ import annotations

from functools import cache

import pytest

from autopar.cost.compute import model_flops
from autopar.cost.operators import kept_by
from autopar.cost.precision import Precision
from autopar.cost.values import numel, op_name, reads, tensor, tensors
from autopar.cost.work import INPUTS, work
from autopar.ir.program import Program
from autopar.ir.rewrite import rewrite
from autopar.sharding.placement import R
from tests.contracts.families import program

KERNELS = [{"flash_attention": {}}, {"fused_norm": {}}, {"fused_rotary": {}}, {"fused_glu": {}}, {"fused_loss": {}}]
LENGTH = 256


@cache
def static(fused: bool) -> Program:
    return rewrite(program("llama"), KERNELS if fused else [{"sdpa_attention": {}}]).at(batch=2, length=LENGTH)


def nodes(what: Program) -> list:
    return [n for _, g in what.graphs() for n in g.nodes if n.op == "call_function"]


def kept(what: Program) -> float:
    """Elements that autograd keeps, each operator for itself."""
    total = 0.0
    for node in nodes(what):
        found = kept_by(node)
        total += sum(numel(tuple(tensor(reads(node)[i]).shape)) for i in (*found.operands, *found.like))
        total += sum(numel(tuple(tensors(node)[i].shape)) for i in found.outputs)
    return total


def test_the_models_own_flops_are_the_same() -> None:
    plain, fused = (sum(model_flops(n) for n in nodes(static(f))) for f in (False, True))
    assert fused == pytest.approx(plain) and fused > 0


def test_less_is_kept_and_nothing_of_the_size_of_logits_or_scores() -> None:
    assert kept(static(True)) < 0.7 * kept(static(False))
    largest = max(numel(tuple(t.shape)) for n in nodes(static(True)) for t in tensors(n))
    assert largest < 2 * LENGTH * 64 and largest < 2 * 4 * LENGTH * LENGTH


def test_the_fused_loss_makes_its_logits_again_in_the_backward() -> None:
    (node,) = [n for n in nodes(static(True)) if op_name(n) == "linear_cross_entropy"]
    places = (R,) * len(reads(node))
    done = work(node, places, (R,), 1, Precision())
    logits = 2.0 * 2 * LENGTH * 32 * 64  # tokens · width · classes
    assert done.flops(0) == logits and done.flops(INPUTS) == 2 * logits
    assert sum(c.flops for c in done.calls) == 4 * logits


def of(passes: list[dict]) -> Program:
    return rewrite(program("hf_llama"), passes).at(batch=2, length=LENGTH)


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_layers_in_8_bits_have_the_models_flops_at_the_8_bit_rate_but_where_the_recipe_keeps_more(recipe: str) -> None:
    plain, rounded = of([]), of([{"fp8": {"recipe": recipe}}])
    assert sum(map(model_flops, nodes(rounded))) == sum(map(model_flops, nodes(plain))) > 0
    name = "fp8_linear" if recipe == "current" else "fp8_linear_delayed"
    node = next(n for n in nodes(rounded) if op_name(n) == name)
    done = work(node, (R,) * len(reads(node)), (R,), 1, Precision())
    products = [c for c in done.calls if c.flops]
    assert [c.dtype for c in products] == ["float8", "float8", None if recipe == "current" else "float8"]
    assert len({c.flops for c in products}) == 1 and any(not c.flops and c.bytes for c in done.calls)
    assert kept_by(node).operands == (0, 1), "the layer's input and weight, as of any linear layer"


def test_flex_attention_costs_what_flash_attention_does() -> None:
    flash, flex = of([{"flash_attention": {}}]), of([{"flex_attention": {}}])
    assert sum(map(model_flops, nodes(flex))) == sum(map(model_flops, nodes(flash)))
    found = []
    for what, name in ((flash, "flash_attention"), (flex, "flex_attention")):
        (node,) = [n for n in nodes(what) if op_name(n) == name]
        done = work(node, (R,) * len(reads(node)), (R,) * len(tensors(node)), 1, Precision())
        found.append((done.flops(0), done.flops(INPUTS), kept_by(node)))
    assert found[0] == found[1] and found[0][0] < model_flops_of_scores()


def model_flops_of_scores() -> float:
    """Both products of one causal attention as written: heads · length² · two widths, twice."""
    (node,) = [n for n in nodes(of([{"flash_attention": {}}])) if op_name(n) == "flash_attention"]
    b, h, length, width = tensor(reads(node)[0]).shape
    return 2.0 * b * h * length * length * 2 * width
