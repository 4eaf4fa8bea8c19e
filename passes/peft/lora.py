"""lora: low-rank adapters beside frozen linear layers and embeddings (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from typing import ClassVar

import pydantic
import torch
from torch import fx

from autopar.errors import PassError
from autopar.ir.adapters import Adapter, Saved, forget
from autopar.ir.edit import Layer, freeze, select
from autopar.ir.initial import Initial, kaiming_uniform, norms
from autopar.ir.ops import Embedding, Linear
from autopar.ir.program import Program
from autopar.ir.rewrite import Numerics, Pass
from passes.peft.parts import Added, Maker, paths, record, replacing, turned, widths

aten = torch.ops.aten
DECISIVE = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
IN_FILES = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}
"""What peft calls a tensor in its files, where not as in the model."""


class Lora(Pass):
    """``W x`` becomes ``W x + scale · B A dropout(x)``, scale = alpha / rank (alpha / √rank if ``rank_stabilized``,
    Kalajdzievski 2023, arXiv:2312.03732).

    ``targets`` are roles or globs of module names; left out: query and value, or the one layer that makes them together with
    the keys. Everything but A and B is frozen. A starts as a
    linear layer's weight does, B at zero, so the first step is the base model's. ``dora`` (Liu et al. 2024,
    arXiv:2402.09353) trains the norm of every row of W + scale · B A apart from its direction; as there, section 4.3, the
    norm it is divided by counts as constant.
    """

    name: ClassVar[str] = "lora"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    rank: int = pydantic.Field(8, ge=1)
    alpha: float = pydantic.Field(16.0, gt=0)
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = pydantic.Field(None, min_length=1)
    rank_stabilized: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def rewrite(self, program: Program) -> None:
        chosen = select(program, self.name, self.wanted(program), (Linear,) if self.dora else (Linear, Embedding))
        freeze(program)
        tensors: dict[str, Saved] = {}
        add = Added(program)
        for layer in chosen:
            graph = dict(program.graphs())[layer.graph]
            if isinstance(layer.view, Linear):
                names = self.beside_linear(add, graph, layer, layer.view)
            else:
                names = self.beside_embedding(add, graph, layer, layer.view)
            tensors |= {
                f"base_model.model.{p}.{IN_FILES.get(n, n)}": Saved(parts=(f"{p}.{n}",))
                for p in layer.paths
                for n in names
            }
        record(program, self, "LORA", self.config(chosen), tensors, DECISIVE)

    def wanted(self, program: Program) -> tuple[str, ...]:
        """The targets, or where they are left out what Hu et al. adapt (section 7.1)."""
        if self.targets is not None:
            return self.targets
        roles = set(program.roles.values())
        together = "query_key_value" in roles and not {"query", "value"} & roles
        return ("query_key_value",) if together else ("query", "value")

    def config(self, chosen: list[Layer]) -> dict[str, object]:
        """peft's `LoraConfig`."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": paths(chosen),
            "use_rslora": self.rank_stabilized,
            "use_dora": self.dora,
            "bias": "none",
            "fan_in_fan_out": any(turned(layer) for layer in chosen),
        }

    # ------------------------------------------------------------------ linear layers

    def beside_linear(self, add: Added, graph: fx.Graph, layer: Layer, base: Linear) -> list[str]:
        into, out = widths(layer)
        down = add(layer, "lora_A.weight", (self.rank, into), kaiming_uniform(into))
        up = add(layer, "lora_B.weight", (out, self.rank), Initial("constant"))
        names = ["lora_A.weight", "lora_B.weight"]
        parts = [down, up]
        if self.dora:
            parts.append(self.magnitude(add, layer, out))
            names.append("lora_magnitude_vector.weight")
        with replacing(graph, base.node, layer.path) as (make, made):
            x = make(aten.dropout.default, base.x, self.dropout, True) if self.dropout else base.x
            low = make(aten.linear.default, make(aten.linear.default, x, down), up)
            delta = make(aten.mul.Tensor, low, self.scale)
            if self.dora:
                delta = self.redirected(make, base, x, delta, parts)
            made.append(make(aten.add.Tensor, base.node, delta))
            made[-1].meta["adapter"] = self.name
        return names

    def magnitude(self, add: Added, layer: Layer, out: int) -> fx.Node:
        """The trained norms of the weight's rows; they begin as what they are."""

        def norm(path: str) -> Initial:
            weight = add.program.parameters[".".join(filter(None, (path, layer.path, "weight")))]
            return norms(weight.alias_of or weight.name, rows=not turned(layer))

        return add(layer, "lora_magnitude_vector.weight", (out,), norm)

    def redirected(self, make: Maker, base: Linear, x: fx.Node, delta: fx.Node, parts: list[fx.Node]) -> fx.Node:
        """(m/‖W + scale · B A‖ − 1) · W x + m/‖W + scale · B A‖ · scale · B A x: what DoRA adds to the base layer."""
        down, up, magnitude = parts
        product = make(aten.mul.Tensor, make(aten.matmul.default, up, down), self.scale)
        square = make(aten.pow.Tensor_Scalar, make(aten.add.Tensor, base.weight, product), 2)
        norm = make(aten.detach.default, make(aten.sqrt.default, make(aten.sum.dim_IntList, square, [1])))
        ratio = make(aten.div.Tensor, magnitude, norm)
        if self.dropout:
            straight = make(aten.linear.default, x, base.weight)
        else:
            straight = base.node if base.bias is None else make(aten.sub.Tensor, base.node, base.bias)
        turned_ = make(aten.mul.Tensor, straight, make(aten.sub.Tensor, ratio, 1))
        return make(aten.add.Tensor, turned_, make(aten.mul.Tensor, delta, ratio))

    # ------------------------------------------------------------------ embeddings

    def beside_embedding(self, add: Added, graph: fx.Graph, layer: Layer, base: Embedding) -> list[str]:
        rows, width = (int(s) for s in base.weight.meta["val"].shape)
        down = add(layer, "lora_embedding_A", (self.rank, rows), Initial("constant"))
        up = add(layer, "lora_embedding_B", (width, self.rank), Initial("normal", 1.0))
        with replacing(graph, base.node, layer.path) as (make, made):
            low = make(aten.embedding.default, make(aten.t.default, down), base.ids)
            delta = make(aten.mul.Tensor, make(aten.linear.default, low, up), self.scale)
            made.append(make(aten.add.Tensor, base.node, delta))
            made[-1].meta["adapter"] = self.name
        return ["lora_embedding_A", "lora_embedding_B"]

    # ------------------------------------------------------------------ merging

    def merge(self, program: Program, adapter: Adapter) -> None:
        """W becomes W + scale · B A, with DoRA each row in the trained norm; computed in float32 at least."""
        modules = dict.fromkeys(n.rpartition(".lora_")[0] for n in adapter.parameters)
        folded = {p: self.folded(program, p, adapter) for p in modules}
        for path, value in folded.items():
            name = f"{path}.weight"
            parameter = program.parameters[name]
            if parameter.alias_of is not None or any(p.alias_of == name for p in program.parameters.values()):
                raise PassError(f"{self.name}: {name} is tied to another layer, which merging would change too")
            program.tensors[name] = torch.nn.Parameter(value.to(parameter.dtype), parameter.trainable)
        for _, graph in program.graphs():
            for node in [n for n in graph.nodes if n.meta.get("adapter") == self.name]:
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        forget(program, adapter, adapter.parameters)

    def folded(self, program: Program, path: str, adapter: Adapter) -> torch.Tensor:
        tensors = program.tensors
        weight = tensors[f"{path}.weight"].detach()
        if weight.is_meta:
            raise PassError(f"{self.name}: {path}.weight has no value here (meta); merge a program of a loaded model")
        wide = torch.promote_types(weight.dtype, torch.float32)
        if f"{path}.lora_embedding_A" in adapter.parameters:
            a, b = (tensors[f"{path}.lora_embedding_{k}"].detach().to(wide) for k in "AB")
            return weight.to(wide) + self.scale * (b @ a).T
        a, b = (tensors[f"{path}.lora_{k}.weight"].detach().to(wide) for k in "AB")
        turn = weight.shape != (b.shape[0], a.shape[1]) or adapter.config["fan_in_fan_out"]
        value = (weight.T if turn else weight).to(wide) + self.scale * (b @ a)
        if self.dora:
            magnitude = tensors[f"{path}.lora_magnitude_vector.weight"].detach().to(wide)
            value = value * (magnitude / value.norm(dim=1)).unsqueeze(1)
        return value.T.contiguous() if turn else value
