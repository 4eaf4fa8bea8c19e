"""What a mixture of experts costs: the chosen experts' work, split with the experts, and what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import autopar
from autopar.cost.compute import model_flops
from autopar.cost.operators import kept_by
from autopar.cost.precision import Precision
from autopar.cost.values import op_name, parameter, reads, tensor, tensors
from autopar.cost.work import FORWARD, INPUTS, WEIGHTS, work
from autopar.ir.program import Program
from autopar.models.batch import example_batch
from autopar.models.load import build
from autopar.sharding.placement import P, R, S

HIDDEN, FFN, EXPERTS, TOP, BATCH, LENGTH = 32, 48, 8, 2, 2, 64
SOURCE = {"family": "mixtral", "layers": 2, "hidden": HIDDEN, "ffn": FFN, "heads": 4, "kv_heads": 2, "vocab": 61}
SOURCE |= {"moe": {"experts": EXPERTS, "top": TOP}}
PAIRS = BATCH * LENGTH * TOP
FORWARD_FLOPS = 2.0 * PAIRS * 3 * HIDDEN * FFN


def program(meta: bool = True) -> tuple[nn.Module, Program]:
    model = build(SOURCE, meta=meta)
    traced = autopar.trace(model, example_batch(model, BATCH, LENGTH, source=SOURCE))
    return model, traced.at(batch=BATCH, length=LENGTH)


def mixture_of(static: Program) -> fx.Node:
    (node,) = [n for n in static.blocks["block_0"].nodes if op_name(n) == "routed_experts"]
    return node


def test_flops_are_those_of_the_chosen_experts() -> None:
    assert model_flops(mixture_of(program()[1])) == 3 * FORWARD_FLOPS


WHOLE = (R,) * 7
BY_EXPERT = (R, R, R, S(0), S(0), S(0), S(0))
INSIDE = (R, R, R, R, S(1), S(1), S(2))


@pytest.mark.parametrize(("inputs", "out", "degree"), [(WHOLE, R, 1), (BY_EXPERT, P, 4), (INSIDE, P, 4)])
def test_a_device_does_its_share(inputs, out, degree) -> None:
    done = work(mixture_of(program()[1]), inputs, (out,), degree, Precision())
    assert [done.flops(side) for side in (FORWARD, INPUTS, WEIGHTS)] == [FORWARD_FLOPS / degree] * 3


def test_what_is_predicted_to_be_kept_is_what_autograd_keeps() -> None:
    model, static = program(meta=False)
    layer, node = model.blocks[0].mlp, mixture_of(static)
    kept, given = kept_by(node), reads(node)
    sizes = [tensor(v).numel() * tensor(v).element_size() for v in given]
    assert all(parameter(given[i]) is not None for i in kept.like)
    predicted = kept.extra + kept.ratio * sum(sizes[i] for i in kept.like) + sum(sizes[i] for i in kept.operands)
    tokens = torch.randn(BATCH * LENGTH, HIDDEN, requires_grad=True)
    scores, chosen = layer.route(tokens)
    own, found = {p.data_ptr() for p in model.parameters()}, {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = layer.mixed(layer.experts, tokens, scores, chosen)
    really = sum(t.untyped_storage().nbytes() for p, t in found.items() if p not in own)
    assert out.shape == tuple(tensors(node)[0].shape)
    assert really <= predicted <= 1.02 * really
