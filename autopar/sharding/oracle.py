"""The oracle proves a strategy by trying it: split the inputs as it says, run every shard, glue, compare.

Everything happens in one process, in float64: values by the placements of a strategy, gradients by the law of an edge
(`autopar.sharding.redistribute`). Random values without zeros and distinct lengths keep accidental symmetry away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from autopar.sharding.call import tensors
from autopar.sharding.example import Example
from autopar.sharding.placement import P, Placement, glue, local
from autopar.sharding.redistribute import grad_placement, wanted
from autopar.sharding.rule import addends, local_args, strategies
from autopar.sharding.strategy import Strategy

RELATIVE, ABSOLUTE = 1e-9, 1e-9


def check(example: Example, degree: int, seed: int = 0) -> list[str]:
    """What is wrong with the strategies of an example's call on ``degree`` devices; empty when all are right."""
    found = strategies(example.node, degree, {example.node: example.patterns})
    return [f"{example} as {s} on {degree}: {why}" for s in found for why in prove(example, s, degree, seed)]


def prove(example: Example, strategy: Strategy, degree: int, seed: int = 0) -> list[str]:
    """What one strategy gets wrong: output values, gradients of operands, or an operator that fails on shards."""
    generator = torch.Generator().manual_seed(seed)
    node, specs = example.made
    whole = [s.draw(generator) for s in specs]
    shards = [_split(p, x, degree, generator) for p, x in zip(strategy.inputs, whole, strict=True)]
    flows = [s.differentiable for s in specs]
    leaves = [x.requires_grad_(f) for x, f in zip(whole, flows, strict=True)]
    local_leaves = [[x.detach().clone().requires_grad_(f) for x in s] for s, f in zip(shards, flows, strict=True)]
    expected = tensors(call(node, leaves, node.args, node.kwargs))
    try:
        made = run(node, strategy, local_leaves, degree)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return [f"fails on shards: {str(error).splitlines()[0]}"]
    wrong = []
    for i, (placement, want) in enumerate(zip(strategy.outputs, expected, strict=True)):
        if why := _differs(placement, [m[i] for m in made], want):
            wrong.append(f"output {i} {why}")
    return wrong or _prove_gradients(strategy, leaves, local_leaves, expected, made, degree, generator)


def call(node: fx.Node, values: Sequence[torch.Tensor], args: Any, kwargs: Any) -> Any:
    """The operator of a node with values for its operands (in order of `operands`), and given other arguments."""
    feed = iter(values)
    args, kwargs = fx.map_arg((tuple(args), dict(kwargs)), lambda n: next(feed))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def run(node: fx.Node, strategy: Strategy, shards: list[list[torch.Tensor]], degree: int) -> list[list[torch.Tensor]]:
    """The outputs of every device: ``shards[operand][device]`` → ``[device][output]``, collectives inside simulated."""
    if strategy.special:
        from autopar.sharding.rules.special import SPECIAL

        return SPECIAL[strategy.special](node, shards, degree)
    args, kwargs = local_args(node, strategy, degree)
    shared = addends(node, strategy)
    made = []
    for rank in range(degree):
        values = [each[rank] / degree if i in shared else each[rank] for i, each in enumerate(shards)]
        made.append(tensors(call(node, values, args, kwargs)))
    return made


def _split(placement: Placement, whole: torch.Tensor, degree: int, generator: torch.Generator) -> list[torch.Tensor]:
    if placement != P:
        return [local(placement, whole, r, degree) for r in range(degree)]
    if not (whole.is_floating_point() or whole.is_complex()):
        return [local(placement, whole, r, degree) for r in range(degree)]
    parts = [torch.rand(whole.shape, generator=generator, dtype=whole.dtype) + 0.5 for _ in range(degree - 1)]
    return [*parts, whole - sum(parts)]


def _differs(placement: Placement, shards: list[torch.Tensor], want: torch.Tensor) -> str:
    try:
        have = glue(placement, shards)
    except RuntimeError as error:
        return f"cannot be glued as {placement}: {str(error).splitlines()[0]}"
    if have.shape != want.shape:
        return f"has shape {tuple(have.shape)}, not {tuple(want.shape)}"
    if placement.kind == "R" and any(not torch.equal(s, shards[0]) for s in shards):
        return "is not the same on every device"
    exact = torch.complex128 if want.is_complex() else torch.float64
    have, want = have.detach().to(exact), want.detach().to(exact)
    if not torch.allclose(have, want, RELATIVE, ABSOLUTE, equal_nan=True):
        return f"is off by {float((have - want).abs().max()):.3g}"
    return ""


def _prove_gradients(
    strategy: Strategy,
    leaves: list[torch.Tensor],
    local_leaves: list[list[torch.Tensor]],
    expected: list[torch.Tensor],
    made: list[list[torch.Tensor]],
    degree: int,
    generator: torch.Generator,
) -> list[str]:
    """Gradients of every operand against the law, for random gradients of the outputs."""
    flows = [i for i, e in enumerate(expected) if e.requires_grad]
    if not flows:
        return []
    ones = [torch.rand(expected[i].shape, generator=generator, dtype=expected[i].dtype) + 0.5 for i in flows]
    want = torch.autograd.grad(
        [expected[i] for i in flows], [x for x in leaves if x.requires_grad], ones, allow_unused=True
    )
    outs, grads = [], []
    for rank in range(degree):
        for i, one in zip(flows, ones, strict=True):
            outs.append(made[rank][i])
            grads.append(local(wanted(strategy.outputs[i]), one, rank, degree))
    mine = [i for i, x in enumerate(leaves) if x.requires_grad]
    have = torch.autograd.grad(
        outs, [local_leaves[i][r] for i in mine for r in range(degree)], grads, allow_unused=True
    )
    wrong = []
    for at, (i, expect) in enumerate(zip(mine, want, strict=True)):
        parts = [
            torch.zeros_like(local_leaves[i][r]) if g is None else g
            for r, g in enumerate(have[at * degree : (at + 1) * degree])
        ]
        placement = grad_placement(strategy.inputs[i], strategy.replicated)
        expect = torch.zeros_like(leaves[i]) if expect is None else expect
        if why := _differs(placement, parts, expect):
            wrong.append(f"gradient of operand {i} {why}")
    return wrong
