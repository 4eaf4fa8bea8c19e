"""The source of one stage, and its entry in the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from autopar.errors import TraceError
from autopar.ir.program import OUTER
from autopar.lower.blockcode import BlockWriter
from autopar.lower.callcode import CallWriter
from autopar.lower.code import Body, Names, Writer, indent
from autopar.lower.declare import declaration, dtype_name
from autopar.lower.localize import Localized, Localizer
from autopar.lower.outer import runs
from autopar.lower.reads import read_dtype
from autopar.lower.stages import StageGraph, changes_in_place, free_nodes, memory_of, trains_beside
from autopar.plan.plan import Plan
from autopar.plan.text import zero_of
from autopar.sharding.placement import Placement, local_shape

if TYPE_CHECKING:
    from autopar.lower.emit import Emitter

SMALL = 64
"""Constants of at most this many elements are written out in the code; larger ones become buffers."""


@dataclass
class Emitted:
    """One stage: its source and its entry in the manifest."""

    name: str
    source: str
    entry: dict[str, Any]


class StageWriter:
    """The source of one stage."""

    def __init__(self, emitter: Emitter, stage: StageGraph, local: Localized) -> None:
        self.emitter = emitter
        self.program = emitter.program
        self.plan = emitter.plan
        self.index = stage.index
        self.stage = stage
        self.local = local
        self.parameters: list[dict[str, Any]] = []
        self.buffers: list[dict[str, Any]] = []
        self.bodies: list[Body] = []
        self.recompute = plan_recompute(self.plan, stage.index, len(stage.calls))

    # -------------------------------------------------------------- the file

    def emitted(self) -> Emitted:
        used = list(dict.fromkeys(str(c.target) for c in self.stage.calls))
        classes = [BlockWriter(self, name).source() for name in used]
        main = self.stage_class()
        head = self.header()
        name = f"stage_{self.index}"
        return Emitted(name, "\n\n".join([head, *classes, main]) + "\n", self.entry(name))

    def header(self) -> str:
        plan, mesh = self.plan, self.plan.mesh
        first, last = plan.stages[self.index].blocks
        blocks = f"blocks {first} to {last}" if last >= first else "the whole model"
        lines = [
            f'"""Stage {self.index} of {len(plan.stages)}: {blocks} on {mesh.tp} tensor parallel devices.',
            "",
            f"Plan: pp {mesh.pp} · dp {mesh.dp} · cp {mesh.cp} · tp {mesh.tp}, {zero_of(plan)}, micro-batches of "
            f"{plan.microbatch}, schedule {plan.schedule}.",
            "Sizes are one device's. A comment after a value says how it is placed along tp: S(d) split along dim d,",
            'P a partial sum; no comment, the same on every device."""',
            "",
            "from __future__ import annotations",
            "",
            "import torch",
            "import torch.nn.functional as F",
            "from torch import nn",
        ]
        if any(r in ("selective", "full") for r in self.recompute):
            lines.append("from torch.utils.checkpoint import checkpoint")
        functions = sorted(set().union(*[b.functions for b in self.bodies]))
        if functions:
            lines += ["", f"from collectives import {', '.join(functions)}"]
        if any("again.part(" in line for b in self.bodies for line in b.lines):
            lines += ([] if functions else [""]) + ["from recompute import Again"]
        split = sorted(set().union(*[b.sequences for b in self.bodies]))
        if split:
            lines += ([] if functions else [""]) + [f"from sequences import {', '.join(split)}"]
        if any("kernels." in line for b in self.bodies for line in b.lines):
            lines += ["", "from autopar import kernels"]
        for module, cls in sorted(set().union(*[b.classes for b in self.bodies])):
            lines.append(f"from {module} import {cls}")
        if any("aten." in line for b in self.bodies for line in b.lines):
            lines += ["", "aten = torch.ops.aten"]
        return "\n".join(lines)

    def entry(self, name: str) -> dict[str, Any]:
        boundary = lambda n: {  # noqa: E731
            "name": n.name,
            "shape": list(local_shape(self.emitter.value_place(n), tuple(n.meta["val"].shape), self.emitter.degree)),
            "dtype": dtype_name(n.meta["val"].dtype),
            "requires_grad": bool(n.meta["requires_grad"]),
        }
        return {
            "module": name,
            "units": [f"blocks.{i}" for i in range(len(self.stage.calls))],
            "inputs": [n.meta["name"] for n in self.inputs()],
            "receives": [boundary(n) for n in self.stage.receives],
            "sends": [boundary(n) for n in self.stage.sends],
            "beside": trains_beside(self.stage, self.program),
            "parameters": self.parameters,
            "buffers": self.buffers,
        }

    def inputs(self) -> list[fx.Node]:
        """Batch entries the stage reads; the last one also what its count needs."""
        return [n for n in self.program.graph.nodes if n in set(self.stage.nodes) and n.meta.get("kind") == "input"]

    # -------------------------------------------------------------- the stage's class

    def stage_class(self) -> str:
        names = Names()
        declared = []
        for node in self.stage.nodes:
            if node.op == "placeholder" and node.meta["kind"] != "input" and not self.inside_blocks(node):
                declared += self.declare(node, node.meta["name"], names)
        for node in self.inputs():  # first: these are called by name
            names.give(self.local.nodes[node], node.meta["name"])
        for node in self.stage.receives:
            names.give(self.local.nodes[node], "hidden" if len(self.stage.receives) == 1 else node.name)
        lines = ["class Stage(nn.Module):", f'    """What stage {self.index} holds and does."""', ""]
        group = "torch.distributed.ProcessGroup | None = None"
        over_cp = self.plan.mesh.cp > 1
        lines += [f"    def __init__(self, tp: {group}{f', cp: {group}' if over_cp else ''}) -> None:"]
        lines += [
            "        super().__init__()",
            "        self.tp, self.cp = tp, cp" if over_cp else "        self.tp = tp",
        ]
        lines += [f"        {d}" for d in declared]
        lines += [f"        {line}" for line in self.block_list()]
        lines += ["", f"    def forward({self.signature(names)}):"]
        lines.append(indent(self.forward(names).lines, 8))
        if not self.stage.sends:
            lines += ["", *self.count_method()]
        return "\n".join(lines)

    def inside_blocks(self, node: fx.Node) -> bool:
        """Whether a placeholder is only read by block calls that hold it as their own."""
        uses = [u for u in node.users if u.op == "call_module"]
        own = [
            u
            for u in uses
            if all(a is not node or i in self.emitter.owned[str(u.target)] for i, a in enumerate(u.args))
        ]
        return bool(uses) and len(own) == len(node.users)

    def block_list(self) -> list[str]:
        """The construction of the stage's blocks, runs of equal ones in one line."""
        calls = [
            (f"Block{str(c.target).split('_')[1]}", r) for c, r in zip(self.stage.calls, self.recompute, strict=True)
        ]
        if not calls:
            return []
        groups: list[tuple[tuple[str, str], int]] = []
        for item in calls:
            if groups and groups[-1][0] == item:
                groups[-1] = (item, groups[-1][1] + 1)
            else:
                groups.append((item, 1))
        parts = []
        for (cls, recompute), count in groups:
            groups_ = "tp, cp" if self.plan.mesh.cp > 1 else "tp"
            text = f'{cls}({groups_}, recompute="{recompute}")' if recompute != "none" else f"{cls}({groups_})"
            parts.append(f"*[{text} for _ in range({count})]" if count > 1 else text)
        for i, call in enumerate(self.stage.calls):
            self.own_tensors(call, i)
        return [f"self.blocks = nn.ModuleList([{', '.join(parts)}])"]

    def own_tensors(self, call: fx.Node, index: int) -> None:
        """Manifest entries of the parameters and buffers inside one block instance."""
        block, attributes = self.emitter.blocks[str(call.target)], self.emitter.attributes[str(call.target)]
        places = [n for n in self.program.blocks[str(call.target)].nodes if n.op == "placeholder"]
        for i, place in enumerate(places):
            if i in self.emitter.owned[str(call.target)]:
                name = call.args[i].meta["name"]  # type: ignore[union-attr]
                where = block.places[block.nodes[place]]
                path = f"blocks.{index}.{attributes[place.meta['name']]}"
                self.record(place, name, path, where, place.name in block.partial)

    def record(self, place: fx.Node, name: str, path: str, where: Placement, partial: bool) -> None:
        kind = place.meta["kind"]
        if kind == "constant" and self.literal(name) is not None:
            return
        entry: dict[str, Any] = {
            "path": path,
            "name": name,
            "shape": list(place.meta["val"].shape),
            "dtype": dtype_name(place.meta["val"].dtype),
            "placement": str(where),
        }
        if kind == "parameter":
            trainable = self.program.parameters[name].trainable
            entry |= {"trainable": trainable, "partial_gradient": partial, "read": read_dtype(place)}
            self.parameters.append(entry)
        else:
            buffer = self.program.buffers.get(name)
            entry["persistent"] = buffer is not None and buffer.persistent
            if buffer is not None and buffer.advance is not None:
                entry["advance"] = {"operator": buffer.advance.operator, "options": dict(buffer.advance.options)}
            self.buffers.append(entry)

    def literal(self, name: str) -> str | None:
        """A small constant written out."""
        value = self.program.tensors[name]
        if value.numel() > SMALL or value.is_meta:
            return None
        return f"torch.tensor({value.tolist()!r}, dtype={value.dtype}, device=device)"

    def declare(self, node: fx.Node, name: str, names: Names) -> list[str]:
        """The line that makes a parameter or buffer of the stage itself."""
        where = self.local.places[self.local.nodes[node]]
        kind = node.meta["kind"]
        if kind == "constant" and (text := self.literal(name)) is not None:
            names.of[self.local.nodes[node]] = text
            return []
        path = self.emitter.attributes[OUTER][name]
        names.of[self.local.nodes[node]] = f"self.{path}"
        self.record(node, name, path, where, node.name in self.local.partial)
        trainable = kind == "parameter" and self.program.parameters[name].trainable
        return [declaration(path, node, where, self.emitter.degree, trainable)]

    def signature(self, names: Names) -> str:
        received = [names.of[self.local.nodes[n]] for n in self.stage.receives]
        given = [names.of[self.local.nodes[n]] for n in self.inputs()]
        return ", ".join(["self", *received, *(["*", *given] if given else [])])

    def forward(self, names: Names) -> Body:
        nodes = list(self.local.graph.nodes)
        owned = {k: v for k, v in self.emitter.owned.items()}
        loops = {r.calls[-1]: r for r in runs(nodes, owned)}
        hidden = {n for r in loops.values() for n in r.inner}
        kept = [n for n in nodes if n not in hidden]
        indices = {n: i for i, n in enumerate(c for c in nodes if c.op == "call_module")}
        given = [names.of[n] for n in nodes if n.op == "placeholder" and n in names.of]
        first = next((g for g in given if g.isidentifier()), None)
        writer = Writer(names, f"{first}.device")
        calls = CallWriter(writer, names, owned, loops, indices, self.emitter)
        body = writer.write(kept, calls.write)
        writer.result(nodes[-1].args[0], single=False)
        if any("device=device" in line for line in body.lines):
            body.lines.insert(0, f"device = {first}.device")
        self.bodies.append(body)
        return body

    def count_method(self) -> list[str]:
        """``count(**inputs)``: how many labels the micro-batch has, from the batch alone."""
        count = self.program.graph.output_node().args[0][1]  # type: ignore[index]
        free = free_nodes(self.program)
        if count not in free:
            raise TraceError("the loss's count depends on parameters; it must follow from the batch alone")
        needed: set[fx.Node] = set()

        def need(node: fx.Node) -> None:
            if node not in needed:
                needed.add(node)
                for source in node.all_input_nodes:
                    need(source)

        need(count)
        for node in self.program.graph.nodes:
            if changes_in_place(node) and memory_of(node) in needed:
                need(node)
        nodes = [n for n in self.program.graph.nodes if n in needed]
        sub = Localizer({}, 1, set()).run(nodes, {}, {})
        names = Names()
        for node in self.inputs():
            if node in needed:
                names.give(sub.nodes[node], node.meta["name"])
            else:
                names.used.add(node.meta["name"])
        for node in nodes:
            if node.op == "placeholder" and node.meta["kind"] != "input":
                text = self.literal(node.meta["name"]) if node.meta["kind"] == "constant" else None
                names.of[sub.nodes[node]] = text or f"self.{self.emitter.attributes[OUTER][node.meta['name']]}"
        given = [n.meta["name"] for n in self.inputs()]
        writer = Writer(names, f"{given[0]}.device")
        body = writer.write(list(sub.graph.nodes))
        writer.result([sub.nodes[count]], single=True)
        if any("device=device" in line for line in body.lines):
            body.lines.insert(0, f"device = {given[0]}.device")
        self.bodies.append(body)
        head = f"    def count({', '.join(['self', '*', *given])}):"
        doc = '        """How many labels count in the mean, from the batch alone."""'
        return [head, doc, indent(body.lines, 8)]


def plan_recompute(plan: Plan, stage: int, count: int) -> tuple[str, ...]:
    found = tuple(plan.stages[stage].recompute)
    return found if found else ("none",) * count
