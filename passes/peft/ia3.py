"""ia3: learned vectors that scale keys, values and the feed-forward's inner activations (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from typing import ClassVar

import pydantic
import torch

from autopar.errors import PassError
from autopar.ir.adapters import Adapter, Saved, forget
from autopar.ir.edit import Layer, freeze, matches, select
from autopar.ir.initial import Initial
from autopar.ir.ops import Linear
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from passes.peft.parts import Added, Maker, paths, record, replacing, turned, widths

aten = torch.ops.aten
WHERE = (("key", "value"), ("query_key_value",))
"""Where the vectors go by default: on keys and values (section 3.3 of the paper), on all three where they are one matrix."""
INNER = ("down",)


class Ia3(Pass):
    """The output of the ``targets`` is scaled by a trained vector that begins at one; of ``feedforward`` layers the input.

    Both are roles or globs of module names. By default keys and values (the fused projection where there is one), and the
    input of the feed-forward's last layer.
    """

    name: ClassVar[str] = "ia3"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    targets: tuple[str, ...] | None = pydantic.Field(None, min_length=1)
    feedforward: tuple[str, ...] | None = None

    def rewrite(self, program: Program) -> None:
        targets, feedforward = self.chosen(program)
        layers = select(program, self.name, (*targets, *feedforward), (Linear,))
        freeze(program)
        scaled = {p for layer in layers for p in layer.paths if any(matches(program, p, t) for t in feedforward)}
        tensors: dict[str, Saved] = {}
        add = Added(program)
        for layer in layers:
            inner = layer.paths[0] in scaled
            self.scale_input(add, layer) if inner else self.scale_output(add, layer)
            tensors |= {f"base_model.model.{p}.ia3_l": Saved(parts=(f"{p}.ia3_l",)) for p in layer.paths}
        config = {
            "target_modules": paths(layers),
            "feedforward_modules": sorted(scaled),
            "fan_in_fan_out": any(turned(layer) for layer in layers),
        }
        record(program, self, "IA3", config, tensors, ())

    def chosen(self, program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
        roles = set(program.roles.values())
        targets = self.targets or next((w for w in WHERE if set(w) <= roles), None)
        if targets is None:
            raise PassError("ia3: this model has no roles 'key' and 'value'; name its layers in `targets`")
        given = tuple(r for r in INNER if r in roles) if self.targets is None else ()
        return targets, given if self.feedforward is None else self.feedforward

    def scale_output(self, add: Added, layer: Layer) -> None:
        node = layer.view.node
        vector = add(layer, "ia3_l", (widths(layer)[1], 1), Initial("constant", 1.0))
        with replacing(dict(add.program.graphs())[layer.graph], node, layer.path) as (make, made):
            made.append(make(aten.mul.Tensor, node, make(aten.reshape.default, vector, [-1])))
            made[-1].meta["adapter"] = self.name

    def scale_input(self, add: Added, layer: Layer) -> None:
        assert isinstance(layer.view, Linear)
        node, x = layer.view.node, layer.view.x
        vector = add(layer, "ia3_l", (1, widths(layer)[0]), Initial("constant", 1.0))
        graph = dict(add.program.graphs())[layer.graph]
        with graph.inserting_before(node):
            make = Maker(graph, layer.path)
            scaled = make(aten.mul.Tensor, x, make(aten.reshape.default, vector, [-1]))
        scaled.meta["adapter"] = self.name
        node.args = (scaled, *node.args[1:])

    def merge(self, program: Program, adapter: Adapter) -> None:
        """Rows of W (and the bias) are scaled, of feed-forward layers the columns."""
        for name in adapter.parameters:
            path = name.removesuffix(".ia3_l")
            vector = program.tensors[name].detach()
            inner = vector.shape[0] == 1 and path in adapter.config["feedforward_modules"]
            turn = adapter.config["fan_in_fan_out"]
            self.fold(program, f"{path}.weight", vector.T if turn else vector)
            if not inner and f"{path}.bias" in program.parameters:
                self.fold(program, f"{path}.bias", vector.reshape(-1))
        for _, graph in program.graphs():
            for node in [n for n in graph.nodes if n.meta.get("adapter") == self.name]:
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        forget(program, adapter, adapter.parameters)

    def fold(self, program: Program, name: str, factor: torch.Tensor) -> None:
        parameter, tensor = program.parameters[name], program.tensors[name]
        if tensor.is_meta:
            raise PassError(f"{self.name}: {name} has no value here (meta); merge a program of a loaded model")
        program.tensors[name] = torch.nn.Parameter((tensor.detach() * factor).to(tensor.dtype), parameter.trainable)
