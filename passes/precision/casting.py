"""Casts put into one graph so that every operator computes in the dtype the table gives it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from autopar.ir.attention import cores
from autopar.ir.causal import ancestors
from autopar.ir.ops import operands
from autopar.ir.program import OUTER, Program
from autopar.ir.shapes import retype, retype_call
from passes.precision.table import CASTS, COMPUTE, OWN_STATISTICS, PROMOTING, SOFTMAX, WIDE, name_of, statistic

aten = torch.ops.aten


class Casting:
    """Walks one graph in order. Every floating value is one of four things:

    *table*: depends on no parameter and no floating input (positions, masks, ALiBi): computed as written, cast where an
    activation meets it. *compute*: an activation in the compute dtype. *wide*: float32, and so is what is made of it
    alone (the mean, + eps, rsqrt of a norm). *mixed*: float32, made of both, or a stored parameter: wide operators read
    it as it is, all others through a cast.
    """

    def __init__(self, program: Program, name: str, active: dict[fx.Node, bool], compute: torch.dtype) -> None:
        self.program, self.name, self.active, self.compute = program, name, active, compute
        self.graph = program.graph if name == OUTER else program.blocks[name]
        self.wide = torch.promote_types(compute, torch.float32)
        self.mixed: set[fx.Node] = set()
        self.changed: set[fx.Node] = set()
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.softmaxes = {n for c in cores(self.graph) for n in c.nodes if name_of(n) in SOFTMAX}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                self.placeholder(node)
            elif node.op == "call_module":
                self.call(node)
            elif node.op == "call_function" and self.active[node]:
                self.function(node)
        self.results()

    # ---------------------------------------------------------------- kinds of values

    def kind(self, node: fx.Node) -> str:
        if not self.active[node]:
            return "table"
        if node in self.mixed:
            return "mixed"
        return "compute" if node.meta["val"].dtype == self.compute else "wide"

    def placeholder(self, node: fx.Node) -> None:
        """A block gets its activations in the compute dtype; parameters and the batch come as they are."""
        if not floating(node):
            return
        if node.meta["kind"] == "parameter" or self.name == OUTER:
            if node.meta["val"].dtype != self.compute and self.active[node]:
                self.mixed.add(node)
        elif self.active[node] and node.meta["val"].dtype != self.compute:
            node.meta["val"] = node.meta["val"].to(self.compute)
            self.changed.add(node)

    def call(self, node: fx.Node) -> None:
        """Arguments as the block's placeholders have them, which were cast before."""
        places = [n for n in self.program.blocks[str(node.target)].nodes if n.op == "placeholder"]
        node.args = tuple(
            self.cast(a, p.meta["val"].dtype, node) if floating(a) else a  # type: ignore[arg-type]
            for a, p in zip(node.args, places, strict=True)
        )
        retype_call(self.program, node)
        self.changed.add(node)

    def results(self) -> None:
        """Blocks hand out activations in the compute dtype, the program its loss in float32."""
        out = self.graph.output_node()
        wanted = self.wide if self.name == OUTER else self.compute
        out.args = (
            tuple(self.cast(v, wanted, out) if floating(v) and self.active[v] else v for v in out.args[0]),  # type: ignore
        )

    # ---------------------------------------------------------------- operators

    def function(self, node: fx.Node) -> None:
        name, given = name_of(node), [n for n in operands(node) if floating(n) and not carried(n)]
        if name in OWN_STATISTICS:
            self.statistics(node, given)
        elif name in WIDE or statistic(node):
            self.read(node, given, self.wide)
        elif name in COMPUTE:
            self.read(node, given, self.compute)
        elif name not in CASTS:
            self.follow(node, name, given)
        self.options(node, name)
        if any(n in self.changed for n in node.all_input_nodes):
            before = dtypes(node)
            retype(self.program, node)
            if dtypes(node) != before:
                self.changed.add(node)

    def statistics(self, node: fx.Node, given: list[fx.Node]) -> None:
        """A norm with running statistics: they and its weights stay wide, and so does all where they are something else."""
        kept = {n.meta["val"].dtype for n in given[1:] if self.kind(n) == "table"} - {self.wide}
        weights = next(iter(kept), self.wide)
        self.read(node, given[:1], weights if kept else self.compute)
        self.read(node, [n for n in given[1:] if self.kind(n) != "table"], weights)

    def follow(self, node: fx.Node, name: str, given: list[fx.Node]) -> None:
        """An operator with no dtype of its own: that of its operands; an activation's where it meets a table."""
        kinds = {n: self.kind(n) for n in given}
        narrow = [n for n in given if kinds[n] in ("mixed", "compute")]
        both = bool(narrow) and "wide" in kinds.values()
        casts = given if both and name not in PROMOTING else [n for n in given if kinds[n] != "wide"]
        if narrow:
            self.read(node, casts, self.compute)
        if both and name in PROMOTING:
            self.mixed.add(node)
            self.changed.add(node)

    def options(self, node: fx.Node, name: str) -> None:
        """Dtypes and numbers among the arguments: a softmax over scores and casts to half precision follow the compute
        dtype; numbers beyond its range (a mask's lowest) become its own lowest."""

        def fitted(value: Any) -> Any:
            if isinstance(value, torch.dtype) and (name in CASTS or node in self.softmaxes):
                half = value in (torch.float16, torch.bfloat16)
                return self.compute if half or node in self.softmaxes else value
            if isinstance(value, float) and math.isfinite(value) and self.narrow(node):
                return max(min(value, torch.finfo(self.compute).max), torch.finfo(self.compute).min)
            return value

        args, kwargs = map_aggregate((node.args, node.kwargs), fitted)  # type: ignore[misc]
        if args != node.args or kwargs != node.kwargs:
            node.args, node.kwargs = args, kwargs
            self.changed.add(node)
            if not any(n in self.changed for n in node.all_input_nodes):
                retype(self.program, node)

    def narrow(self, node: fx.Node) -> bool:
        return any(floating(n) and n.meta["val"].dtype == self.compute for n in node.all_input_nodes)

    # ---------------------------------------------------------------- casts

    def read(self, node: fx.Node, given: list[fx.Node], dtype: torch.dtype) -> None:
        for source in dict.fromkeys(given):
            new = self.cast(source, dtype, node)
            if new is not source:
                node.replace_input_with(source, new)

    def cast(self, source: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
        """``source`` in ``dtype`` for ``reader``: itself, the cast that is there already, or a new one."""
        if source.meta["val"].dtype == dtype:
            return source
        if (source, dtype) not in self.casts:
            with self.graph.inserting_before(reader):
                inner = self.clamped(source, dtype, reader)
                self.casts[source, dtype] = self.made(aten.to.dtype, (inner, dtype), source, reader, dtype)
        return self.casts[source, dtype]

    def clamped(self, source: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
        """A table whose numbers lie beyond a dtype's range (a mask's lowest) held within it: finite stays finite."""
        if self.active[source] or not beyond(self.program, self.name, source, torch.finfo(dtype).max):
            return source
        bounds = (torch.finfo(dtype).min, torch.finfo(dtype).max)
        return self.made(aten.clamp.default, (source, *bounds), source, reader, source.meta["val"].dtype)

    def made(self, target: Any, args: tuple[Any, ...], like: fx.Node, reader: fx.Node, dtype: torch.dtype) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {
            "path": reader.meta.get("path", ""),
            "requires_grad": like.meta["requires_grad"],
            "val": like.meta["val"].to(dtype),
        }
        self.active[node] = self.active[like]
        self.changed.add(node)
        return node


def floating(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def carried(node: fx.Node) -> bool:
    """Whether a node is state that its readers write into: it is read as it is."""
    return node.op == "placeholder" and node.meta.get("carried", False)


def dtypes(node: fx.Node) -> list[torch.dtype]:
    value = node.meta["val"]
    return [v.dtype for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor)]


def beyond(program: Program, name: str, node: fx.Node, largest: float) -> bool:
    """Whether a finite number of a larger size than ``largest`` goes into a table."""
    found: list[bool] = []

    def look(value: Any) -> Any:
        found.append(isinstance(value, float) and math.isfinite(value) and abs(value) > largest)
        return value

    for source in ancestors(node):
        if source.op == "call_function":
            map_aggregate((source.args, source.kwargs), look)
        elif source.meta["kind"] in ("buffer", "constant") and source.meta["name"] in program.tensors:
            tensor = program.tensors[source.meta["name"]]
            if tensor.is_floating_point() and not tensor.is_meta:  # without values nothing can be said
                found.append(bool((tensor[torch.isfinite(tensor)].abs() > largest).any()))
        elif name != OUTER:
            index = [n for n in program.blocks[name].nodes if n.op == "placeholder"].index(source)
            given = {a for c in program.calls() if c.target == name and isinstance(a := c.args[index], fx.Node)}
            found += [beyond(program, OUTER, g, largest) for g in given]
    return any(found)
