"""Program and plan → the text of every stage, and the manifest that tells the runtime what they are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.errors import PlanError, TraceError
from autopar.ir.attention import Core, cores
from autopar.ir.ops import operands
from autopar.ir.program import OUTER, Program
from autopar.lower.code import Body, Names, Writer, indent
from autopar.lower.localize import Localized, Localizer, strategy_of
from autopar.lower.outer import Run, outputs, runs
from autopar.lower.reads import read_dtype
from autopar.lower.stages import StageGraph, changes_in_place, cut, free_nodes, memory_of
from autopar.plan.plan import Plan
from autopar.sharding.placement import Placement, local_shape
from autopar.sharding.strategy import Strategy

SMALL = 64
"""Constants of at most this many elements are written out in the code; larger ones become buffers."""


@dataclass
class Emitted:
    """One stage: its source and its entry in the manifest."""

    name: str
    source: str
    entry: dict[str, Any]


@dataclass
class Place:
    """One placeholder of a graph as emitted code holds it: an attribute of the module, a literal, or an argument."""

    node: fx.Node
    attribute: str | None
    literal: str | None = None


class Emitter:
    """Everything about one program under one plan."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program = program
        self.plan = plan
        self.degree = plan.mesh.tp
        self.stages = cut(program, [s.blocks for s in plan.stages])
        self.owned = {name: self.owned_places(name) for name in program.blocks}
        self.blocks: dict[str, Localized] = {}
        self.called: dict[str, Strategy] = {}
        for name, graph in program.blocks.items():
            self.blocks[name] = self.localized_block(name, graph)
        for call in program.calls():
            self.called[call.name] = self.call_strategy(call)

    # -------------------------------------------------------------- blocks

    def owned_places(self, name: str) -> set[int]:
        """Placeholders of a block that are its own: parameters, buffers and constants that no one else reads."""
        calls = [c for c in self.program.calls() if c.target == name]
        places = [n for n in self.program.blocks[name].nodes if n.op == "placeholder"]
        found = set()
        for i, place in enumerate(places):
            given = [c.args[i] for c in calls]
            if (
                place.meta["kind"] == "constant"
                or place.meta["kind"] in ("parameter", "buffer")
                and all(isinstance(g, fx.Node) and g.op == "placeholder" and len(operand_uses(g)) == 1 for g in given)
            ):
                found.add(i)
        return found

    def localized_block(self, name: str, graph: fx.Graph) -> Localized:
        places = [n for n in graph.nodes if n.op == "placeholder"]
        own = {n for i, n in enumerate(places) if i in self.owned[name] and n.meta["kind"] == "parameter"}
        localizer = Localizer(self.plan.choices.get(name, {}), self.degree, own)
        return localizer.run(list(graph.nodes), {}, {})

    def call_strategy(self, call: fx.Node) -> Strategy:
        """How a block takes and returns its values: where its placeholders and outputs live."""
        block = self.blocks[str(call.target)]
        inputs = [block.places[n] for n in block.graph.nodes if n.op == "placeholder"]
        return Strategy(tuple(inputs), tuple(block.places[n] for n in block.graph.output_node().args[0]))  # type: ignore[union-attr]

    # -------------------------------------------------------------- stages

    def stage(self, stage: StageGraph) -> Emitted:
        own = {n for n in stage.nodes if n.op == "placeholder" and n.meta["kind"] == "parameter"}
        localizer = Localizer(self.plan.choices.get(OUTER, {}), self.degree, own, self.owned, returns_loss=True)
        received = {n: self.value_place(n) for n in stage.receives}
        nodes = list(stage.nodes)
        if stage.sends:
            nodes.append(self.sending(stage))
        local = localizer.run(nodes, received, self.called)
        return StageWriter(self, stage, local).emitted()

    def sending(self, stage: StageGraph) -> fx.Node:
        """An output node that returns what the stage sends (in a scratch graph: the program's own stays as it is)."""
        node = fx.Node(fx.Graph(), "sent", "output", "output", (), {})
        node._args = (tuple(stage.sends),)  # type: ignore[attr-defined]
        node.meta["sends"] = True
        return node

    def value_place(self, node: fx.Node) -> Placement:
        """Where an outer value lives along tp."""
        if node.target is operator.getitem and node.args[0].op == "call_module":  # type: ignore[union-attr]
            return self.called[node.args[0].name].outputs[node.args[1]]  # type: ignore[union-attr,index]
        return strategy_of(node, self.plan.choices.get(OUTER, {})).outputs[0]


def operand_uses(node: fx.Node) -> list[fx.Node]:
    """The readers of a value, one entry for each time it is read."""
    return [u for u in node.users for o in operands(u) if o is node]


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
            f"Plan: pp {mesh.pp} · dp {mesh.dp} · cp {mesh.cp} · tp {mesh.tp}, ZeRO {plan.zero}, micro-batches of "
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
        if any(r != "none" for r in self.recompute):
            lines.append("from torch.utils.checkpoint import checkpoint")
        functions = sorted(set().union(*[b.functions for b in self.bodies]))
        if functions:
            lines += ["", f"from collectives import {', '.join(functions)}"]
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
        for node in self.stage.receives:
            names.give(self.local.nodes[node], "hidden" if len(self.stage.receives) == 1 else node.name)
        for node in self.inputs():
            names.give(self.local.nodes[node], node.meta["name"])
        lines = ["class Stage(nn.Module):", f'    """What stage {self.index} holds and does."""', ""]
        lines += ["    def __init__(self, tp: torch.distributed.ProcessGroup | None = None) -> None:"]
        lines += ["        super().__init__()", "        self.tp = tp"]
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
            text = f'{cls}(tp, recompute="{recompute}")' if recompute != "none" else f"{cls}(tp)"
            parts.append(f"*[{text} for _ in range({count})]" if count > 1 else text)
        for i, call in enumerate(self.stage.calls):
            self.own_tensors(call, i)
        return [f"self.blocks = nn.ModuleList([{', '.join(parts)}])"]

    def own_tensors(self, call: fx.Node, index: int) -> None:
        """Manifest entries of the parameters and buffers inside one block instance."""
        block = self.emitter.blocks[str(call.target)]
        places = [n for n in self.program.blocks[str(call.target)].nodes if n.op == "placeholder"]
        for i, place in enumerate(places):
            if i in self.emitter.owned[str(call.target)]:
                name = call.args[i].meta["name"]  # type: ignore[union-attr]
                where = block.places[block.nodes[place]]
                self.record(place, name, f"blocks.{index}.{attribute(place)}", where, place.name in block.partial)

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
            self.buffers.append({**entry, "persistent": buffer is not None and buffer.persistent})

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
        path = attribute_name(name)
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
                names.of[sub.nodes[node]] = text or f"self.{attribute_name(node.meta['name'])}"
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


class CallWriter:
    """Block calls as lines of the stage's forward: one by one, or as loops."""

    def __init__(
        self,
        writer: Writer,
        names: Names,
        owned: dict[str, set[int]],
        loops: dict[fx.Node, Run],
        indices: dict[fx.Node, int],
        emitter: Emitter,
    ) -> None:
        self.writer, self.names, self.owned, self.loops = writer, names, owned, loops
        self.indices, self.emitter = indices, emitter

    def write(self, call: fx.Node, say: Callable[[fx.Node], str]) -> None:
        run = self.loops.get(call)
        if run is None:
            given = [say(a) for i, a in enumerate(call.args) if i not in self.owned[str(call.target)]]  # type: ignore[arg-type]
            targets = self.targets(call)
            self.writer.body.lines.append(f"{targets} = self.blocks[{self.indices[call]}]({', '.join(given)})")
            return
        self.loop(run, say)

    def targets(self, call: fx.Node) -> str:
        """The names of a call's outputs; they are the getitems' names."""
        count = len(call.meta["val"])
        found = outputs(call)
        names = []
        for i in range(count):
            name = self.names.give(found[i], self.label(call, i)) if i in found else "_"
            names.append(name)
        return ", ".join(names)

    def label(self, call: fx.Node, index: int) -> str:
        carried = [n for n in self.emitter.program.blocks[str(call.target)].nodes if n.op == "placeholder"]
        value = call.meta["val"][index]
        same = [n for n in carried if n.meta["kind"] == "input" and n.meta["val"].shape == value.shape]
        return str(same[0].name) if same and index == 0 else f"output_{index}"

    def loop(self, run: Run, say: Callable[[fx.Node], str]) -> None:
        first, last = run.calls[0], run.calls[-1]
        carried = dict(run.carried)
        by_output = {k: i for i, k in carried.items()}
        lines = self.writer.body.lines
        targets, given = [], []
        found = outputs(last)
        for k in range(len(last.meta["val"])):
            if k in by_output:
                start = say(first.args[by_output[k]])  # type: ignore[arg-type]
                node = found.get(k)
                name = self.names.give(node, self.label(last, k)) if node is not None else f"carried_{k}"
                lines.append(f"{name} = {start}")
                targets.append(name)
            elif k in found:
                targets.append(self.names.give(found[k], self.label(last, k)))
            else:
                targets.append("_")
        for i, value in enumerate(first.args):
            if i in self.owned[str(first.target)]:
                continue
            given.append(targets[carried[i]] if i in carried else say(value))  # type: ignore[arg-type]
        a, b = self.indices[first], self.indices[last] + 1
        whole = a == 0 and b == len(self.indices)
        lines.append(f"for block in self.blocks{'' if whole else f'[{a}:{b}]'}:")
        lines.append(f"    {', '.join(targets)} = block({', '.join(given)})")


class BlockWriter:
    """The class of one distinct block."""

    def __init__(self, owner: StageWriter, name: str) -> None:
        self.owner = owner
        self.name = name
        self.graph = owner.program.blocks[name]
        self.local = owner.emitter.blocks[name]
        self.owned = owner.emitter.owned[name]
        self.places = [n for n in self.graph.nodes if n.op == "placeholder"]
        recompute = {r for c, r in zip(owner.stage.calls, owner.recompute, strict=True) if c.target == name}
        self.full, self.selective = "full" in recompute, "selective" in recompute

    def source(self) -> str:
        count = sum(c.target == self.name for c in self.owner.stage.calls)
        sample = next(c for c in self.owner.stage.calls if c.target == self.name).meta["path"]
        lines = [f"class Block{self.name.split('_')[1]}(nn.Module):"]
        lines += [f'    """{sample} and {count - 1} more like it."""' if count > 1 else f'    """{sample}."""', ""]
        lines += ['    def __init__(self, tp: torch.distributed.ProcessGroup | None, recompute: str = "none") -> None:']
        lines += ["        super().__init__()", "        self.tp, self.recompute = tp, recompute"]
        lines += [f"        {d}" for d in self.declarations()]
        names, arguments_ = self.names()
        given = ", ".join(arguments_)
        entry = "body" if self.full else "forward"
        if self.full:
            lines += ["", f"    def forward(self, {given}):", '        if self.recompute == "full":']
            lines += [f"            return checkpoint(self.body, {given}, use_reentrant=False)"]
            lines += [f"        return self.body({given})"]
        body, methods = self.body(names)
        lines += ["", f"    def {entry}(self, {given}):", indent(body.lines, 8), *methods]
        return "\n".join(lines)

    def declarations(self) -> list[str]:
        found = []
        for i, place in enumerate(self.places):
            if i not in self.owned or self.constant(place) is not None:
                continue
            where = self.local.places[self.local.nodes[place]]
            trainable = place.meta["kind"] == "parameter" and bool(place.meta["requires_grad"])
            found.append(declaration(attribute(place), place, where, self.owner.emitter.degree, trainable))
        return found

    def constant(self, place: fx.Node) -> str | None:
        return self.owner.literal(place.meta["name"]) if place.meta["kind"] == "constant" else None

    def names(self) -> tuple[Names, list[str]]:
        names = Names()
        given = []
        for i, place in enumerate(self.places):
            node = self.local.nodes[place]
            if i in self.owned:
                names.of[node] = self.constant(place) or f"self.{attribute(place)}"
            else:
                given.append(names.give(node, place.name))
        return names, given

    def body(self, names: Names) -> tuple[Body, list[str]]:
        """The forward's lines, and the methods for what is recomputed selectively."""
        nodes = list(self.local.graph.nodes)
        found = [c for c in cores(self.local.graph) if closed(c)] if self.selective else []
        inside = {n: c for c in found for n in c.nodes}
        first = next(names.of[n] for n in nodes if n.op == "placeholder" and "." not in names.of[n])
        writer = Writer(names, f"{first}.device")
        methods: list[str] = []
        segment: list[fx.Node] = []
        for node in nodes:
            core = inside.get(node)
            if core is None:
                segment.append(node)
            elif node is core.output:
                writer.write(segment)
                segment = []
                methods += self.core_method(core, names, writer, len(methods) > 0)
        writer.write(segment)
        results = nodes[-1].args[0]
        writer.result(results, single=len(results) == 1)
        body = writer.body
        if any("device=device" in line for line in body.lines):
            body.lines.insert(0, f"device = {first}.device")
        self.owner.bodies.append(body)
        return body, methods

    def core_method(self, core: Core, names: Names, writer: Writer, again: bool) -> list[str]:
        """The attention core as a method of its own, and its call under checkpoint."""
        own = Names()
        for node in core.inputs:
            own.give(node, node.name)
        inner = Writer(own, f"{own.of[core.inputs[0]]}.device")
        body = inner.write(list(core.nodes))
        inner.result([core.output], single=True)
        if any("device=device" in line for line in body.lines):
            body.lines.insert(0, f"device = {own.of[core.inputs[0]]}.device")
        self.owner.bodies.append(body)
        method = "attention_core" if not again else f"attention_core_{core.output.name}"
        outside = [writer.expression(n) for n in core.inputs]
        result = names.give(core.output, "attention")
        given = ", ".join(outside)
        writer.body.lines += [
            'if self.recompute == "selective":',
            f"    {result} = checkpoint(self.{method}, {given}, use_reentrant=False)",
            "else:",
            f"    {result} = self.{method}({given})",
        ]
        head = f"    def {method}(self, {', '.join(own.of[n] for n in core.inputs)}):"
        return ["", head, indent(body.lines, 8)]


def closed(core: Core) -> bool:
    """Whether nothing but its output leaves a core."""
    inside = set(core.nodes)
    return all(set(n.users) <= inside for n in core.nodes if n is not core.output)


def attribute(place: fx.Node) -> str:
    return attribute_name(place.meta["name"])


def attribute_name(name: str) -> str:
    text = name.replace(".", "_")
    return text if text.isidentifier() else f"p_{text}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def declaration(name: str, node: fx.Node, where: Placement, degree: int, trainable: bool) -> str:
    """``self.q_weight = nn.Parameter(torch.empty(32, 64))  # (64, 64) S(0)``."""
    value = node.meta["val"]
    shape = local_shape(where, tuple(value.shape), degree)
    dtype = "" if value.dtype == torch.float32 else f", dtype={value.dtype}"
    empty = f"torch.empty({', '.join(map(str, shape)) or '()'}{dtype})"
    note = f"  # {where} of {tuple(value.shape)}" if where.sharded else ""
    if node.meta["kind"] == "parameter":
        flag = "" if trainable else ", requires_grad=False"
        return f"self.{name} = nn.Parameter({empty}{flag}){note}"
    return f'self.register_buffer("{name}", {empty}, persistent=False){note}'


def plan_recompute(plan: Plan, stage: int, count: int) -> tuple[str, ...]:
    found = tuple(plan.stages[stage].recompute)
    return found if found else ("none",) * count


def emit(program: Program, plan: Plan) -> tuple[list[Emitted], dict[str, Any]]:
    """The stages' sources and the manifest of a static ``program`` (of the plan's micro-batch) under ``plan``."""
    check_fits(program, plan)
    emitter = Emitter(program, plan)
    stages = [emitter.stage(s) for s in emitter.stages]
    tied: dict[str, list[str]] = {}
    for name, parameter in program.parameters.items():
        if parameter.alias_of is not None:
            tied.setdefault(parameter.alias_of, [parameter.alias_of]).append(name)
    inputs = {
        n.meta["name"]: input_entry(n)
        for n in program.graph.nodes
        if n.op == "placeholder" and n.meta["kind"] == "input"
    }
    return stages, {"stages": [s.entry for s in stages], "tied": list(tied.values()), "inputs": inputs}


def check_fits(program: Program, plan: Plan) -> None:
    """Raise `PlanError` where a plan speaks of nodes that this program does not have: it was made for another one."""
    graphs = dict(program.graphs())
    for name, chosen in plan.choices.items():
        nodes = {n.name for n in graphs[name].nodes} if name in graphs else set()
        foreign = [n for n in chosen if n not in nodes]
        if foreign:
            raise PlanError(f"the plan was made for another program: it places {name}.{foreign[0]}, which is not there")


def input_entry(node: fx.Node) -> dict[str, Any]:
    """What a batch entry must be. ``high``: integers are below it (rows of the table they are looked up in, classes)."""
    found: dict[str, Any] = {
        "shape": list(node.meta["val"].shape),
        "dtype": dtype_name(node.meta["val"].dtype),
        "batched": bool(node.meta["dims"]) and "batch" in node.meta["dims"][0],
    }
    high = limit(node)
    return found if high is None else {**found, "high": high}


def limit(node: fx.Node) -> int | None:
    """Rows of the tables an integer input is looked up in, or classes it is a label of, through views and shifts."""
    if node.meta["val"].is_floating_point():
        return None
    aten = torch.ops.aten
    through = {
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.slice.Tensor,
        aten.pad.default,
        aten.contiguous.default,
    }
    for user in node.users:
        if user.target is aten.embedding.default and user.args[1] is node:
            return int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
        if "linear_cross_entropy" in str(user.target) and user.args[2] is node:
            return int(user.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
        if user.target is aten.cross_entropy_loss.default and user.args[1] is node:
            logits = user.args[0].meta["val"].shape  # type: ignore[union-attr]
            return int(logits[1] if len(logits) > 1 else logits[0])
        if user.target in through and (found := limit(user)) is not None:
            return found
    return None
