"""The class of one distinct block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from autopar.errors import PlanError
from autopar.ir.attention import Core, cores
from autopar.lower.code import Body, Names, Writer, indent
from autopar.lower.declare import TAKEN, declaration
from autopar.lower.parts import PartsWriter
from autopar.plan.plan import Selected

if TYPE_CHECKING:
    from autopar.lower.stagecode import StageWriter


class BlockWriter:
    """The class of one distinct block."""

    def __init__(self, owner: StageWriter, name: str) -> None:
        self.owner = owner
        self.name = name
        self.graph = owner.program.blocks[name]
        self.local = owner.emitter.blocks[name]
        self.owned = owner.emitter.owned[name]
        self.attributes = owner.emitter.attributes[name]
        self.places = [n for n in self.graph.nodes if n.op == "placeholder"]
        recompute = {r for c, r in zip(owner.stage.calls, owner.recompute, strict=True) if c.target == name}
        self.full, self.selective = "full" in recompute, "selective" in recompute
        self.whole = bool(recompute & {"none", "selective", "full"})  # whether some instance runs the body as it is
        self.custom = sorted(recompute - {"none", "selective", "full"})
        self.taken = {*self.attributes.values(), *self.custom}

    def source(self) -> str:
        count = sum(c.target == self.name for c in self.owner.stage.calls)
        sample = next(c for c in self.owner.stage.calls if c.target == self.name).meta["path"]
        lines = [f"class Block{self.name.split('_')[1]}(nn.Module):"]
        lines += [f'    """{sample} and {count - 1} more like it."""' if count > 1 else f'    """{sample}."""', ""]
        group, over_cp = "torch.distributed.ProcessGroup | None", self.owner.plan.mesh.cp > 1
        given = f"tp: {group}, cp: {group}" if over_cp else f"tp: {group}"
        lines += [f'    def __init__(self, {given}, recompute: str = "none") -> None:', "        super().__init__()"]
        lines += [
            f"        self.tp, {'self.cp, ' if over_cp else ''}self.recompute = tp, {'cp, ' if over_cp else ''}recompute"
        ]
        lines += [f"        {d}" for d in self.declarations()]
        names, arguments_ = self.names()
        given = ", ".join(arguments_)
        entry = "body" if self.full or self.custom else "forward"
        if entry == "body":
            lines += ["", f"    def forward(self, {given}):", *self.dispatch(given)]
        if self.whole:
            body, methods = self.body(names)
            lines += ["", f"    def {entry}(self, {given}):", indent(body.lines, 8), *methods]
        for mode in self.custom:
            lines += PartsWriter(self, mode, self.selected(mode)).source()
        return "\n".join(lines)

    def dispatch(self, given: str) -> list[str]:
        """Which method an instance runs."""
        lines = []
        if self.full:
            lines += ['        if self.recompute == "full":']
            lines += [f"            return checkpoint(self.body, {given}, use_reentrant=False)"]
        modes = self.custom if self.whole else self.custom[:-1]
        for mode in modes:
            lines += [f'        if self.recompute == "{mode}":', f"            return self.{mode}({given})"]
        last = "body" if self.whole else self.custom[-1]
        return [*lines, f"        return self.{last}({given})"]

    def selected(self, mode: str) -> Selected:
        known = self.owner.plan.recompute_groups.get(self.name, {})
        if mode not in known:
            raise PlanError(f"the plan recomputes {mode} of {self.name}, and does not say what that is")
        return known[mode]

    def method(self, wish: str) -> str:
        """A name for another method."""
        wish = "".join(c if c.isalnum() else "_" for c in wish)
        wish = wish if wish.isidentifier() else f"part_{wish}"
        name, count = wish, 1
        while name in self.taken or name in TAKEN:
            count += 1
            name = f"{wish}_{count}"
        self.taken.add(name)
        return name

    def declarations(self) -> list[str]:
        found = []
        for i, place in enumerate(self.places):
            if i not in self.owned or self.constant(place) is not None:
                continue
            where = self.local.places[self.local.nodes[place]]
            trainable = place.meta["kind"] == "parameter" and bool(place.meta["requires_grad"])
            attribute = self.attributes[place.meta["name"]]
            found.append(declaration(attribute, place, where, self.owner.emitter.degree, trainable))
        return found

    def constant(self, place: fx.Node) -> str | None:
        return self.owner.literal(place.meta["name"]) if place.meta["kind"] == "constant" else None

    def names(self) -> tuple[Names, list[str]]:
        names = Names()
        given = []
        for i, place in enumerate(self.places):
            node = self.local.nodes[place]
            if i in self.owned:
                names.of[node] = self.constant(place) or f"self.{self.attributes[place.meta['name']]}"
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
