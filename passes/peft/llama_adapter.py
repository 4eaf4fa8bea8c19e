"""llama_adapter: gated attention on trained prompts in the top layers (Zhang et al. 2023, arXiv:2303.16199)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import fx
from torch.fx.node import map_aggregate

from autopar.errors import PassError
from autopar.ir.adapters import Saved
from autopar.ir.edit import add_parameter, freeze, separate
from autopar.ir.initial import Initial
from autopar.ir.lengthen import END, need_symbols, sequence_dims, set_to, symbols_of, with_sizes
from autopar.ir.ops import Linear, argument, view
from autopar.ir.program import OUTER, Program
from autopar.ir.rewrite import Numerics, Pass
from passes.peft.behind import fuse_attention
from passes.peft.parts import Maker, instances, record, replacing
from passes.peft.prefix_tuning import Core, cores, in_order

aten = torch.ops.aten


class LlamaAdapter(Pass):
    """Attention in the top ``layers`` blocks (all, by default) gains ``gate · attention(q, K prompt, V prompt)``.

    The prompt, ``tokens`` vectors for each layer, goes through the layer's own frozen projections, without position; the
    gate begins at zero, so the first step is the base model's. ``gates``: one for a layer, as in peft, or one for each
    query head, as in the authors' code. Written-out attention becomes the fused one.
    """

    name: ClassVar[str] = "llama_adapter"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    tokens: int = pydantic.Field(10, ge=1)
    layers: int | None = pydantic.Field(None, ge=1)
    gates: Literal["layer", "head"] = "layer"

    def rewrite(self, program: Program) -> None:
        need_symbols(program, self.name)
        fuse_attention(program, self.name)
        cores(program, self.name, False)  # refuses what has no attention
        top = separate_top(program, self.layers, self.name)
        found = [c for c in cores(program, self.name, False) if c.graph in top]
        freeze(program)
        for core in found:
            self.add(program, core)
        paths = in_order(program, found, list(NAMES))
        tensors = {f"base_model.model.{p}": Saved(parts=(p,)) for p in paths}
        modules = {p.rpartition(".")[0].rpartition(".")[2] for p in paths}
        config = {
            "adapter_len": self.tokens,
            "adapter_layers": len(paths) // len(NAMES),
            "target_modules": modules.pop() if len(modules) == 1 else sorted(modules),
        }
        record(program, self, "ADAPTION_PROMPT", config, tensors, ("adapter_len", "adapter_layers"))

    def add(self, program: Program, core: Core) -> None:
        graph, seen = dict(program.graphs())[core.graph], core.seen
        query = seen.query.meta["val"]
        heads = int(query.shape[1]) if self.gates == "head" else 1
        source = Projections(program, graph, core)
        width, dtype = int(source.x.meta["val"].shape[-1]), query.dtype
        prompt = add_parameter(
            program, core.graph, f"{core.path}.{NAMES[0]}", (1, self.tokens, width), dtype, Initial("normal", 1.0)
        )
        gate = add_parameter(program, core.graph, f"{core.path}.{NAMES[1]}", (heads,), dtype, Initial("constant"))
        with graph.inserting_before(seen.node):
            sides = [source.of(bare(side), prompt, self.tokens) for side in (seen.key, seen.value)]
        with replacing(graph, seen.node, core.path) as (make, made):
            key, value = (make(aten.expand.default, s, [query.shape[0], *s.meta["val"].shape[1:]]) for s in sides)
            options: dict[str, Any] = {"scale": seen.scale, "enable_gqa": seen.grouped}
            extra = graph.call_function(seen.node.target, (seen.query, key, value, None, 0.0, False), options)  # type: ignore[arg-type]
            extra.meta = {"path": core.path, "requires_grad": True, "adapter": self.name}
            extra.meta["val"] = seen.node.meta["val"]
            gated = make(aten.mul.Tensor, extra, make(aten.reshape.default, gate, [-1, 1, 1]))
            made.append(make(aten.add.Tensor, seen.node, gated))


NAMES = ("adaption_prompt", "adaption_gate")


def separate_top(program: Program, layers: int | None, who: str) -> set[str]:
    """The graphs of the top layers with attention, treated apart from other instances of their blocks."""
    has = {c.graph for c in cores(program, who, False)}
    calls = [c for c in program.calls() if str(c.target) in has]
    if not calls:
        return {OUTER}
    if layers is not None and layers > len(calls):
        raise PassError(f"{who}: {layers} layers are asked for, the model has {len(calls)}")
    top = calls if layers is None else calls[-layers:]
    for name in list(dict.fromkeys(str(c.target) for c in top)):
        mine = [c for c in top if c.target == name]
        if len(mine) < len(instances(program, name)):
            separate(program, name, mine)
    return {str(c.target) for c in top}


class Projections:
    """The way from what an attention reads to its keys and values, to be gone again with a prompt in place of tokens."""

    def __init__(self, program: Program, graph: fx.Graph, core: Core) -> None:
        self.graph, self.core = graph, core
        self.names = {w: symbols_of(program, w) for w in ("batch", "sequence")}
        self.x = self.read(bare(core.seen.key))
        self.way = downstream(self.x)
        self.done: dict[fx.Node, fx.Node] = {}

    def read(self, node: fx.Node) -> fx.Node:
        """What the first linear layer on the way to a node reads from outside the attention's module."""
        stack, seen = [node], set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            layer = view(node)
            if isinstance(layer, Linear) and not self.inside(layer.x):
                return layer.x
            stack.extend(node.all_input_nodes)
        raise PassError(f"llama_adapter: no linear layer leads to the keys of {self.core.path}")

    def inside(self, node: fx.Node) -> bool:
        path = str(node.meta.get("path", ""))
        return node.op != "placeholder" and (path == self.core.path or path.startswith(f"{self.core.path}."))

    def of(self, node: fx.Node, prompt: fx.Node, tokens: int) -> fx.Node:
        """``node`` as it is computed from the prompt; of values that depend on positions the first one is taken."""
        if node is self.x:
            return prompt
        if node not in self.way:
            return self.first_position(node)
        if node not in self.done:
            virtual = self.virtual()
            sizes = dict.fromkeys(self.names["batch"], 1) | dict.fromkeys(self.names["sequence"], tokens - virtual)
            change = set_to(sizes)
            args, kwargs = map_aggregate(
                (node.args, node.kwargs),
                lambda a: self.of(a, prompt, tokens) if isinstance(a, fx.Node) else with_sizes(a, change),
            )
            self.done[node] = Maker(self.graph, str(node.meta.get("path", "")))(node.target, *args, **kwargs)
        return self.done[node]

    def virtual(self) -> int:
        """By how much the tokens here are more than those of the batch."""
        length = self.x.meta["val"].shape[1].node.expr
        return int(length - sum(s for s in length.free_symbols))

    def first_position(self, node: fx.Node) -> fx.Node:
        """Rotation by the first position is none at all; positions behind virtual tokens are taken before they were cut."""
        while node.target is aten.slice.Tensor and argument(node, 2) and argument(node, 3) == END and self.sized(node):
            node = node.args[0]  # type: ignore[assignment]
        make = Maker(self.graph, str(node.meta.get("path", "")))
        for dim in self.sized(node):
            node = make(aten.slice.Tensor, node, dim, 0, 1)
        return node

    def sized(self, node: fx.Node) -> list[int]:
        return sequence_dims(node, self.names["batch"] | self.names["sequence"])


def bare(side: fx.Node) -> fx.Node:
    """Keys or values without the prefix that another adapter put before them."""
    return side.args[0][1] if "adapter" in side.meta and side.target is aten.cat.default else side  # type: ignore[index]


def downstream(node: fx.Node) -> set[fx.Node]:
    found, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                stack.append(user)
    return found
