"""bitfit: only the biases are trained (Ben Zaken et al. 2022, arXiv:2106.10199)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from autopar.errors import PassError
from autopar.ir.adapters import Saved, trained
from autopar.ir.edit import Layer, freeze, layers, matches, select, unfreeze
from autopar.ir.initial import Initial
from autopar.ir.ops import Linear
from autopar.ir.program import OUTER, Program
from autopar.ir.rewrite import Numerics, Pass
from passes.peft.parts import Added, record, replacing, widths

aten = torch.ops.aten


class Bitfit(Pass):
    """Every bias of the model is trained, or those of the ``targets`` (roles or globs of module names); the rest is frozen.

    ``add``: the targeted linear layers (without targets: all in repeated blocks) that have no bias get one that begins
    at zero. By default only where there is none at all to train, as in Llama.
    """

    name: ClassVar[str] = "bitfit"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    targets: tuple[str, ...] = ()
    add: bool | None = None

    def rewrite(self, program: Program) -> None:
        chosen = [] if not self.targets else self.selected(program)
        there = [n for n in program.parameters if n.endswith(".bias") and self.meant(program, n.removesuffix(".bias"))]
        there = [n for n in there if n not in trained(program)]
        freeze(program)
        unfreeze(program, there)
        added: list[str] = []
        if self.add or (self.add is None and not there):
            added = self.give(program, chosen or self.everywhere(program))
        if not there and not added:
            raise PassError(
                "bitfit: no bias is left to train (there is none, or it is trained already); `add: true` gives layers one"
            )
        tensors = {f"base_model.model.{n}": Saved(parts=(n,)) for n in (*there, *added)}
        record(program, self, "BITFIT", {"target_modules": list(self.targets) or None}, tensors, ())

    def meant(self, program: Program, path: str) -> bool:
        return not self.targets or any(matches(program, path, t) for t in self.targets)

    def selected(self, program: Program) -> list[Layer]:
        """The targeted linear layers. A target may also mean norms alone; one that means nothing is refused by name."""
        biased = {n.rpartition(".")[0] for n in program.parameters if n.endswith(".bias")}
        linear = {p for layer in layers(program, (Linear,)) for p in layer.paths}

        def norms_alone(target: str) -> bool:
            ours = [m for m in biased | linear if matches(program, m, target)]
            return bool(ours) and not linear & set(ours)

        wanted = [t for t in self.targets if not norms_alone(t)]
        return select(program, self.name, wanted, (Linear,)) if wanted else []

    @staticmethod
    def everywhere(program: Program) -> list[Layer]:
        found = layers(program, (Linear,))
        return [layer for layer in found if layer.graph != OUTER] or found

    def give(self, program: Program, chosen: list[Layer]) -> list[str]:
        """A bias for every layer that has none; returns their names."""
        add, there = Added(program), set(program.parameters)
        for layer in chosen:
            assert isinstance(layer.view, Linear)
            if layer.view.bias is None and not there & {f"{p}.bias" for p in layer.paths}:
                bias = add(layer, "bias", (widths(layer)[1],), Initial("constant"))
                self.put(dict(program.graphs())[layer.graph], layer, bias)
        return [n for n in program.parameters if n not in there]

    @staticmethod
    def put(graph: fx.Graph, layer: Layer, bias: fx.Node) -> None:
        with replacing(graph, layer.view.node, layer.path) as (make, made):
            made.append(make(aten.add.Tensor, layer.view.node, bias))
