"""fp8: linear layers in 8-bit floating point, emulated where the hardware has none."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import fx

import autopar.kernels.fp8  # noqa: F401 (registers the operator)
from autopar.errors import PassError
from autopar.ir.edit import Layer, add_state, layers, select
from autopar.ir.initial import Initial
from autopar.ir.ops import ROUNDED, Linear, view
from autopar.ir.program import OUTER, Advance, Program
from autopar.ir.rewrite import Numerics, Pass
from autopar.kernels.fp8_delayed import BACKWARD, FORWARD, state_shape

CURRENT = torch.ops.autopar.fp8_linear.default
DELAYED = torch.ops.autopar.fp8_linear_delayed.default
STEP = 16  # widths that the hardware's 8-bit products take are multiples of this
STATE = "fp8_state"
HISTORY = 1024  # steps: Transformer Engine's amax_history_len


class Fp8(Pass):
    """Linear layers in 8 bits (Micikevicius et al. 2022, arXiv:2209.05433), by one of two recipes.

    ``current``: both factors are rounded to float8_e4m3fn, scaled by rows as they run; so does the product that gives the
    gradient of a layer's input; the gradient of the weights stays in the compute dtype (the rowwise recipe of torchao with
    weight gradients in high precision). Where a product is split along the width it sums over, each device scales its own
    part.

    ``delayed``: one scale for each tensor, from its largest magnitudes in the last ``history`` steps (``amax``: max of them, or
    the most_recent), ``2**margin`` below the largest number of the dtype; gradients are rounded to float8_e5m2 and all three
    products take rounded factors. Options and defaults are those of Transformer Engine's ``recipe.DelayedScaling``
    (``amax_history_len``, ``amax_compute_algo``, ``margin``, ``Format.HYBRID``). The largest magnitude is that of the whole
    tensor over all devices and micro-batches of a step, so that every plan rounds alike; before the first step scales are 1.

    ``targets``: roles or globs of module names; left out: every linear layer of the blocks whose widths are multiples of 16
    (the head and what is outside the blocks stay, as is usual).
    """

    name: ClassVar[str] = "fp8"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    recipe: Literal["current", "delayed"] = "current"
    targets: tuple[str, ...] = ()
    history: int | None = pydantic.Field(None, ge=1)  # delayed: 1024
    margin: float | None = None  # delayed: 0
    amax: Literal["max", "most_recent"] | None = None  # delayed: max

    @pydantic.model_validator(mode="after")
    def goes_with_the_recipe(self) -> Fp8:
        odd = [n for n in ("amax", "history", "margin") if getattr(self, n) is not None]
        if self.recipe == "current" and odd:
            raise ValueError(f"{odd[0]} goes with recipe: delayed; recipe: current looks at no earlier step")
        return self

    def rewrite(self, program: Program) -> None:
        if self.targets:
            chosen = select(program, self.name, self.targets, (Linear,))
            for layer in chosen:
                refuse_odd(layer)
        else:
            plain = [x for x in layers(program, (Linear,)) if x.graph != OUTER and not in_8_bits(x)]
            chosen = [x for x in plain if not any(w % STEP for w in widths(x))]
            if not chosen:
                program.history.append(
                    f"fp8: no linear layer of the blocks is left whose widths are multiples of {STEP}"
                )
        for layer in chosen:
            graph = dict(program.graphs())[layer.graph]
            if self.recipe == "delayed":
                rounded(graph, layer.view.node, DELAYED, self.state(program, layer), FORWARD, BACKWARD)
            else:
                rounded(graph, layer.view.node, CURRENT, FORWARD)

    def state(self, program: Program, layer: Layer) -> fx.Node:
        """What a layer carries from step to step."""
        options = (("margin", float(self.margin or 0)), ("latest", self.amax == "most_recent"))
        name = f"{layer.path}.{STATE}"
        advance = Advance("autopar::fp8_advance_", options)
        return add_state(
            program, layer.graph, name, state_shape(self.history or HISTORY), Initial("constant", 0.0), advance
        )


def in_8_bits(layer: Layer) -> bool:
    target = layer.view.node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in ROUNDED


def refuse_odd(layer: Layer) -> None:
    if in_8_bits(layer):
        raise PassError(f"fp8: {layer.paths[0]} is in 8 bits already")
    if any(w % STEP for w in widths(layer)):
        out, inner = widths(layer)
        raise PassError(
            f"fp8: {layer.paths[0]} is {inner} → {out}; 8-bit products take widths that are multiples of {STEP}"
        )


def widths(layer: Layer) -> tuple[int, ...]:
    return tuple(int(s) for s in layer.view.weight.meta["val"].shape)


def rounded(graph: fx.Graph, linear: fx.Node, target: Any, *more: Any) -> None:
    seen = view(linear)  # anew: its input may be a layer that was rounded before
    assert isinstance(seen, Linear), linear
    with graph.inserting_before(linear):
        new = graph.call_function(target, (seen.x, seen.weight, seen.bias, *more))
    new.meta = dict(linear.meta)
    linear.replace_all_uses_with(new)
    graph.erase_node(linear)
