"""prefix_tuning: trained keys and values before those of the tokens, in every attention (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic
import torch
from torch import fx

from autopar.errors import PassError
from autopar.ir.adapters import Affine, Saved
from autopar.ir.edit import add_parameter, freeze
from autopar.ir.initial import Initial, kaiming_uniform
from autopar.ir.ops import Attention, view
from autopar.ir.program import OUTER, Program
from autopar.ir.rewrite import Numerics, Pass
from passes.peft.behind import fuse_attention, stand_behind
from passes.peft.parts import Maker, instances, pass_in, record

aten = torch.ops.aten
NAMES = ("prefix_keys", "prefix_values")
DECISIVE = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
STD = 0.02
"""The usual initial spread of a transformer's weights (Radford et al. 2019)."""


@dataclass(frozen=True)
class Core:
    """An attention of a graph; ``path`` of its module, ``heads`` and ``widths`` of its keys and values."""

    graph: str
    path: str
    seen: Attention
    heads: int
    widths: tuple[int, int]

    @property
    def sides(self) -> list[tuple[int, str]]:
        """Width and name of its keys' prefix and of its values'."""
        return list(zip(self.widths, NAMES, strict=True))


class PrefixTuning(Pass):
    """``tokens`` trained keys and values stand before those of the tokens in every attention; everything else is frozen.

    Every token sees them; its own position counts them (rotary angles, ALiBi, learned positions follow), as with peft's
    past key-values. One prefix for each key head, or for each query head (``per_query_head``: what peft trains where a
    model repeats its keys before it caches them, as Falcon does). ``projection``: the prefixes are made by a perceptron
    with one hidden layer of that size from vectors that all layers share. Written-out attention becomes the fused one.
    """

    name: ClassVar[str] = "prefix_tuning"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    tokens: int = pydantic.Field(20, ge=1)
    projection: int | None = pydantic.Field(None, ge=1)
    per_query_head: bool = False

    def rewrite(self, program: Program) -> None:
        fuse_attention(program, self.name)
        found = cores(program, self.name, self.per_query_head)
        freeze(program)
        stand_behind(program, self.tokens, self.name)
        if self.projection is None:
            for core in found:
                self.extend(program, core, [self.held(program, core, *side) for side in core.sides])
            saved = Saved(parts=tuple(in_order(program, found, list(NAMES))), dim=1)
        else:
            saved = self.projected(program, found, self.projection)
        record(program, self, "PREFIX_TUNING", self.config(program, found), {"prompt_embeddings": saved}, DECISIVE)

    def config(self, program: Program, found: list[Core]) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.tokens,
            "token_dim": found[0].heads * found[0].widths[0],
            "num_attention_heads": found[0].heads,
            "num_layers": sum(len(instances(program, core.graph)) for core in found),
            "num_transformer_submodules": 1,
            "prefix_projection": self.projection is not None,
            "encoder_hidden_size": self.projection,
        }

    def held(self, program: Program, core: Core, width: int, name: str) -> fx.Node:
        """A prefix as a parameter of its own, (tokens, heads · width)."""
        dtype = core.seen.key.meta["val"].dtype
        shape = (self.tokens, core.heads * width)
        return add_parameter(program, core.graph, f"{core.path}.{name}", shape, dtype, Initial("normal", STD))

    def projected(self, program: Program, found: list[Core], hidden: int) -> Saved:
        """The shared half of the perceptron before all blocks, its last layer in rows that each attention keeps."""
        dtype, width = found[0].seen.key.meta["val"].dtype, found[0].heads * found[0].widths[0]
        own = {n: f"prefix.{self.name}.{n}" for n in ("embedding.weight", "transform.0.weight", "transform.0.bias")}
        shapes = [(self.tokens, width), (hidden, width), (hidden,)]
        starts = [Initial("normal", 1.0), kaiming_uniform(width), kaiming_uniform(width)]
        nodes = [
            add_parameter(program, OUTER, n, s, dtype, i) for n, s, i in zip(own.values(), shapes, starts, strict=True)
        ]
        first = next(n for n in program.graph.nodes if n.op != "placeholder")
        with program.graph.inserting_before(first):
            make = Maker(program.graph, "")
            shared = make(aten.tanh.default, make(aten.linear.default, *nodes))
        for name in dict.fromkeys(core.graph for core in found):
            here = pass_in(program, name, shared, "prefix")
            for core in [c for c in found if c.graph == name]:
                self.extend(
                    program,
                    core,
                    [self.made(program, core, here, w, n) for w, n in zip(core.widths, NAMES, strict=True)],
                )
        names = list(own.values())
        last = [tuple(in_order(program, found, [f"{n}.{kind}" for n in NAMES])) for kind in ("weight", "bias")]
        through = (Affine(weights=(names[1],), biases=(names[2],)), Affine(weights=last[0], biases=last[1]))
        return Saved(parts=(names[0],), through=through, activation="tanh")

    def made(self, program: Program, core: Core, shared: fx.Node, width: int, name: str) -> fx.Node:
        """A prefix as a linear layer of what all share."""
        dtype, into, out = core.seen.key.meta["val"].dtype, int(shared.meta["val"].shape[-1]), core.heads * width
        path, start = f"{core.path}.{name}", kaiming_uniform(int(shared.meta["val"].shape[-1]))
        weight = add_parameter(program, core.graph, f"{path}.weight", (out, into), dtype, start)
        bias = add_parameter(program, core.graph, f"{path}.bias", (out,), dtype, start)
        graph = dict(program.graphs())[core.graph]
        with graph.inserting_before(core.seen.node):
            return Maker(graph, core.path)(aten.linear.default, shared, weight, bias)

    def extend(self, program: Program, core: Core, prefixes: list[fx.Node]) -> None:
        """Put the prefixes before an attention's keys and values."""
        graph, node = dict(program.graphs())[core.graph], core.seen.node
        with graph.inserting_before(node):
            make = Maker(graph, core.path)
            sides = [self.repeated(make, core, side) for side in (core.seen.key, core.seen.value)]
            longer = [
                make(aten.cat.default, [shaped(make, prefix, side, core.heads), side], -2)
                for prefix, side in zip(prefixes, sides, strict=True)
            ]
        for made in longer:
            made.meta["adapter"] = self.name
        node.args = (node.args[0], *longer, *node.args[3:])

    def repeated(self, make: Maker, core: Core, side: fx.Node) -> fx.Node:
        """Keys or values, for every query head its own."""
        have = side.meta["val"].shape[-3] if side.meta["val"].dim() == 4 else 1
        if not self.per_query_head or int(have) == core.heads:
            return side
        return make(aten.repeat_interleave.self_int, side, core.heads // int(have), 1)


def cores(program: Program, who: str, per_query_head: bool) -> list[Core]:
    """Every attention but what adapters added. Raises `PassError` where there is none, or one without a dim for heads."""
    found: list[Core] = []
    for name, graph in program.graphs():
        for node in graph.nodes:
            seen = view(node)
            if isinstance(seen, Attention) and "adapter" not in node.meta:
                found.append(core_of(name, seen, len([c for c in found if c.graph == name]), who, per_query_head))
    if not found:
        raise PassError(f"{who}: the program has no attention it knows; `sdpa_attention` says in its history why")
    return found


def core_of(name: str, seen: Attention, index: int, who: str, per_query_head: bool) -> Core:
    key, value, query = (n.meta["val"] for n in (seen.key, seen.value, seen.query))
    path = str(seen.node.meta.get("path", "")) or "attention"
    if key.dim() not in (3, 4):
        raise PassError(f"{who}: keys of {path} have {key.dim()} dims, not (batch, heads, length, width)")
    heads = int((query if per_query_head else key).shape[1]) if key.dim() == 4 else 1
    return Core(
        name, path if index == 0 else f"{path}.{index}", seen, heads, (int(key.shape[-1]), int(value.shape[-1]))
    )


def shaped(make: Maker, prefix: fx.Node, side: fx.Node, heads: int) -> fx.Node:
    """(tokens, heads · width) as (batch, heads, tokens, width)."""
    value, tokens = side.meta["val"], prefix.meta["val"].shape[0]
    if value.dim() == 3:
        return make(aten.expand.default, make(aten.unsqueeze.default, prefix, 0), [value.shape[0], -1, -1])
    split = make(aten.transpose.int, make(aten.reshape.default, prefix, [tokens, heads, -1]), 0, 1)
    return make(aten.expand.default, make(aten.unsqueeze.default, split, 0), [value.shape[0], -1, -1, -1])


def in_order(program: Program, found: list[Core], names: list[str]) -> list[str]:
    """The parameters of every attention in the order in which the program runs them."""
    order: list[str] = []
    outer = [c for c in found if c.graph == OUTER]
    for node in program.graph.nodes:
        if node.op == "call_module":
            here = [c for c in found if c.graph == str(node.target)]
            order += [f"{node.meta['path']}.{c.path}.{n}" for c in here for n in names]
        order += [f"{c.path}.{n}" for c in outer if c.seen.node is node for n in names]
    return order
