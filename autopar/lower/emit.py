"""Program and plan → the text of every stage, and the manifest that tells the runtime what they are."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from autopar.errors import PlanError
from autopar.ir.ops import operands
from autopar.ir.program import OUTER, Program
from autopar.lower.code import RESERVED
from autopar.lower.declare import attribute_names
from autopar.lower.inputs import input_entry
from autopar.lower.localize import Localized, Localizer, strategy_of
from autopar.lower.stagecode import Emitted, StageWriter
from autopar.lower.stages import StageGraph, cut
from autopar.plan.plan import Context, Plan
from autopar.sharding.part import part_of
from autopar.sharding.placement import Placement, parse
from autopar.sharding.strategy import Strategy


class Emitter:
    """Everything about one program under one plan."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program = program
        self.plan = plan
        self.degree = plan.mesh.tp
        self.stages = cut(program, [s.blocks for s in plan.stages])
        self.owned = {name: self.owned_places(name) for name in program.blocks}
        self.attributes = {name: attribute_names(graph) for name, graph in program.graphs()}
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


def emit(program: Program, plan: Plan) -> tuple[list[Emitted], dict[str, Any]]:
    """The stages' sources and the manifest of a static ``program`` (of the plan's micro-batch) under ``plan``."""
    if plan.context is not None:
        program = part_of(program, strategies_of(plan.context), plan.mesh.cp, plan.context.zigzag)
    check_fits(program, plan)
    check_inputs(program)
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


def strategies_of(held: Context) -> dict[tuple[str, str], Strategy]:
    """A plan's strategies along cp, by graph and node."""
    return {
        (graph, node): Strategy(tuple(map(parse, c.inputs)), tuple(map(parse, c.outputs)), c.special)
        for graph, nodes in held.choices.items()
        for node, c in nodes.items()
    }


def check_inputs(program: Program) -> None:
    """Raise `PlanError` for a batch entry that cannot be an argument of the emitted code under its own name."""
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "input":
            name = node.meta["name"]
            if name in RESERVED or not name.isidentifier():
                what = "means something else there" if name in RESERVED else "is no name in Python"
                raise PlanError(
                    f"the batch's '{name}' cannot be an argument of the emitted code: '{name}' {what}; give it another name "
                    "in the model's forward and in the batch"
                )


def check_fits(program: Program, plan: Plan) -> None:
    """Raise `PlanError` where a plan speaks of nodes that this program does not have: it was made for another one."""
    graphs = dict(program.graphs())
    for name, chosen in plan.choices.items():
        nodes = {n.name for n in graphs[name].nodes} if name in graphs else set()
        foreign = [n for n in chosen if n not in nodes]
        if foreign:
            raise PlanError(f"the plan was made for another program: it places {name}.{foreign[0]}, which is not there")
