"""fp8: linear layers in 8-bit floating point, emulated where the hardware has none."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import fx

import autopar.kernels.fp8  # noqa: F401 (registers the operator)
from autopar.errors import PassError
from autopar.ir.edit import Layer, layers, select
from autopar.ir.ops import Linear, view
from autopar.ir.program import OUTER, Program
from autopar.ir.rewrite import Numerics, Pass

FP8 = torch.ops.autopar.fp8_linear.default
STEP = 16  # widths that the hardware's 8-bit products take are multiples of this


class Fp8(Pass):
    """Linear layers round both factors to float8_e4m3fn, scaled by rows as they run (``recipe: current``); so does the
    product that gives the gradient of a layer's input; the gradient of the weights stays in the compute dtype (Micikevicius
    et al. 2022, arXiv:2209.05433; the rowwise recipe of torchao with weight gradients in high precision).

    ``targets``: roles or globs of module names; left out: every linear layer of the blocks whose widths are multiples of 16
    (the head and what is outside the blocks stay, as is usual). Where a product is split along the width it sums over,
    each device scales its own part. ``delayed`` scaling, from the largest numbers of earlier steps, is not to be had: it
    needs state that travels between steps and devices, and by rows the scale of the moment costs little.
    """

    name: ClassVar[str] = "fp8"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    recipe: Literal["current"] = "current"
    targets: tuple[str, ...] = ()

    def rewrite(self, program: Program) -> None:
        if self.targets:
            chosen = select(program, self.name, self.targets, (Linear,))
            for layer in chosen:
                self.refuse_odd(layer)
        else:
            plain = [x for x in layers(program, (Linear,)) if x.graph != OUTER and x.view.node.target is not FP8]
            chosen = [x for x in plain if not any(w % STEP for w in widths(x))]
            if not chosen:
                program.history.append(
                    f"fp8: no linear layer of the blocks is left whose widths are multiples of {STEP}"
                )
        for layer in chosen:
            rounded(dict(program.graphs())[layer.graph], layer.view.node)

    def refuse_odd(self, layer: Layer) -> None:
        if layer.view.node.target is FP8:
            raise PassError(f"fp8: {layer.paths[0]} is in 8 bits already")
        if any(w % STEP for w in widths(layer)):
            out, inner = widths(layer)
            raise PassError(
                f"fp8: {layer.paths[0]} is {inner} → {out}; 8-bit products take widths that are multiples of {STEP}"
            )


def widths(layer: Layer) -> tuple[int, ...]:
    return tuple(int(s) for s in layer.view.weight.meta["val"].shape)


def rounded(graph: fx.Graph, linear: fx.Node) -> None:
    seen = view(linear)  # anew: its input may be a layer that was rounded before
    assert isinstance(seen, Linear), linear
    with graph.inserting_before(linear):
        new = graph.call_function(FP8, (seen.x, seen.weight, seen.bias, torch.float8_e4m3fn))
    new.meta = dict(linear.meta)
    linear.replace_all_uses_with(new)
    graph.erase_node(linear)
