"""lora: low-rank adapters beside frozen linear layers and embeddings (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from typing import ClassVar

import pydantic
import torch
from torch import fx

from autopar.ir.edit import Layer, add_parameter, freeze, select
from autopar.ir.initial import Initial, kaiming_uniform
from autopar.ir.ops import Embedding, Linear
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from autopar.ir.shapes import infer

aten = torch.ops.aten


class Lora(Pass):
    """``W x`` becomes ``W x + scale · B A dropout(x)``, scale = alpha / rank (alpha / √rank if ``rank_stabilized``).

    ``targets`` are roles (`query`, `value`, …) or globs of module names. Everything but A and B is frozen. A starts as a
    linear layer's weight does, B at zero, so the first step is the base model's.
    """

    name: ClassVar[str] = "lora"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    rank: int = pydantic.Field(8, ge=1)
    alpha: float = pydantic.Field(16.0, gt=0)
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = pydantic.Field(("query", "value"), min_length=1)
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def rewrite(self, program: Program) -> None:
        chosen = select(program, self.name, self.targets)
        freeze(program)
        for layer in chosen:
            graph = dict(program.graphs())[layer.graph]
            if isinstance(layer.view, Linear):
                self.beside_linear(program, graph, layer, layer.view)
            else:
                self.beside_embedding(program, graph, layer, layer.view)

    def beside_linear(self, program: Program, graph: fx.Graph, layer: Layer, base: Linear) -> None:
        width_in, width_out = int(base.x.meta["val"].shape[-1]), int(base.node.meta["val"].shape[-1])
        dtype = base.weight.meta["val"].dtype
        down = add_parameter(
            program, layer.graph, f"{layer.path}.lora_A.weight", (self.rank, width_in), dtype, kaiming_uniform(width_in)
        )
        up = add_parameter(
            program, layer.graph, f"{layer.path}.lora_B.weight", (width_out, self.rank), dtype, Initial("constant")
        )
        with graph.inserting_after(base.node):
            add = graph.call_function(aten.add.Tensor, (base.node, base.node))
        base.node.replace_all_uses_with(add, delete_user_cb=lambda user: user is not add)
        with graph.inserting_before(add):
            x = base.x
            if self.dropout > 0:
                x = self.call(graph, layer, aten.dropout.default, x, self.dropout, True)
            low = self.call(graph, layer, aten.linear.default, x, down)
            high = self.call(graph, layer, aten.linear.default, low, up)
            scaled = self.call(graph, layer, aten.mul.Tensor, high, self.scale)
        add.args = (base.node, scaled)
        add.meta = {**base.node.meta}
        infer(add)

    def beside_embedding(self, program: Program, graph: fx.Graph, layer: Layer, base: Embedding) -> None:
        rows, width = (int(s) for s in base.weight.meta["val"].shape)
        dtype = base.weight.meta["val"].dtype
        down = add_parameter(
            program, layer.graph, f"{layer.path}.lora_embedding_A", (self.rank, rows), dtype, Initial("constant")
        )
        up = add_parameter(
            program, layer.graph, f"{layer.path}.lora_embedding_B", (width, self.rank), dtype, Initial("normal", 1.0)
        )
        with graph.inserting_after(base.node):
            add = graph.call_function(aten.add.Tensor, (base.node, base.node))
        base.node.replace_all_uses_with(add, delete_user_cb=lambda user: user is not add)
        with graph.inserting_before(add):
            table = self.call(graph, layer, aten.t.default, down)
            low = self.call(graph, layer, aten.embedding.default, table, base.ids)
            high = self.call(graph, layer, aten.linear.default, low, up)
            scaled = self.call(graph, layer, aten.mul.Tensor, high, self.scale)
        add.args = (base.node, scaled)
        add.meta = {**base.node.meta}
        infer(add)

    @staticmethod
    def call(graph: fx.Graph, layer: Layer, target: object, *args: object) -> fx.Node:
        new = graph.call_function(target, args)  # type: ignore[arg-type]
        new.meta = {"path": layer.path, "requires_grad": True}
        return infer(new)
