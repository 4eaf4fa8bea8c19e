"""adapter: bottlenecks inside every block (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00052)."""

from __future__ import annotations

from typing import ClassVar, Literal

import pydantic
import torch
from torch import fx

from autopar.errors import PassError
from autopar.ir.adapters import Saved
from autopar.ir.edit import Layer, freeze, select
from autopar.ir.initial import Initial
from autopar.ir.ops import Linear, view
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from passes.peft.parts import Added, Maker, paths, record, replacing

aten = torch.ops.aten
ACTIVATIONS = {n: getattr(aten, n).default for n in ("gelu", "relu", "silu", "tanh")}
LAST = {"attention": "output", "feedforward": "down"}
"""The role of the last linear layer of each half of a block."""
STD = 1e-2
"""Houlsby et al. 2019, section 3.6: weights within 0.01 are near enough to the identity."""


class BottleneckAdapter(Pass):
    """``h`` becomes ``h + scale · (U act(D x + b) + c)``, with D (size, hidden) and U (hidden, size) trained.

    h is what a half of the block hands to its residual sum. ``houlsby`` (x = h): after attention and after the
    feed-forward. ``pfeiffer`` (x = h): after the feed-forward alone. ``parallel`` (He et al. 2022, arXiv:2110.04366):
    beside the feed-forward, x being its input. ``targets``: the layers that make h, where the model has no roles.
    U begins at zero, so the first step is the base model's.
    """

    name: ClassVar[str] = "adapter"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    size: int = pydantic.Field(16, ge=1)
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    style: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    scale: float = 1.0
    targets: tuple[str, ...] | None = pydantic.Field(None, min_length=1)

    def rewrite(self, program: Program) -> None:
        chosen = select(program, self.name, self.wanted(program), (Linear,))
        freeze(program)
        tensors: dict[str, Saved] = {}
        add = Added(program)
        for layer in chosen:
            names = self.put(add, layer)
            tensors |= {f"base_model.model.{p}.{n}": Saved(parts=(f"{p}.{n}",)) for p in layer.paths for n in names}
        config = {
            **self.model_dump(mode="json", exclude={"targets"}),
            "target_modules": paths(chosen),
        }
        record(program, self, "BOTTLENECK", config, tensors, ("size", "activation", "style", "scale"))

    def wanted(self, program: Program) -> tuple[str, ...]:
        if self.targets is not None:
            return self.targets
        roles = tuple(LAST.values()) if self.style == "houlsby" else (LAST["feedforward"],)
        if missing := [r for r in roles if r not in program.roles.values()]:
            raise PassError(f"adapter: this model has no role '{missing[0]}'; name the layers in `targets`")
        return roles

    def put(self, add: Added, layer: Layer) -> list[str]:
        graph, width = dict(add.program.graphs())[layer.graph], int(layer.view.node.meta["val"].shape[-1])
        node = layer.view.node
        source = half_input(layer) if self.style == "parallel" else node
        into = int(source.meta["val"].shape[-1])
        zero = Initial("constant")
        parts = {
            "adapter_down.weight": ((self.size, into), Initial("normal", STD)),
            "adapter_down.bias": ((self.size,), zero),
            "adapter_up.weight": ((width, self.size), zero),
            "adapter_up.bias": ((width,), zero),
        }
        held = [add(layer, name, *part) for name, part in parts.items()]
        with replacing(graph, node, layer.path) as (make, made):
            made.append(make(aten.add.Tensor, node, self.bottleneck(make, source, held)))
        return list(parts)

    def bottleneck(self, make: Maker, x: fx.Node, held: list[fx.Node]) -> fx.Node:
        low = make(ACTIVATIONS[self.activation], make(aten.linear.default, x, *held[:2]))
        high = make(aten.linear.default, low, *held[2:])
        return high if self.scale == 1.0 else make(aten.mul.Tensor, high, self.scale)


def half_input(layer: Layer) -> fx.Node:
    """What the half of a block that ends in ``layer`` reads: the input of the first linear layer before it."""
    assert isinstance(layer.view, Linear)
    parent, first, stack, seen = layer.path.rpartition(".")[0], layer.view, [layer.view.x], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        before = view(node)
        if isinstance(before, Linear) and str(node.meta.get("path", "")).startswith(f"{parent}."):
            return before.x
        stack.extend(node.all_input_nodes)
    raise PassError(f"adapter: no linear layer stands before {first.node.name} in {parent or 'its module'}")
