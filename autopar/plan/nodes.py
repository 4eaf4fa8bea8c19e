"""What a plan keeps of every node for people: its operands, its moves along tp, its seconds."""

from __future__ import annotations

from torch import fx

from autopar.cost.compute import Seconds
from autopar.cost.regions import Measure, Placed, Prices
from autopar.cost.values import Value, flows, reads, tensors
from autopar.ir.ops import operands
from autopar.ir.program import Program
from autopar.ir.text import target_text, type_text
from autopar.plan.plan import NodeFacts, Read
from autopar.sharding.placement import Placement
from autopar.sharding.redistribute import grad_placement, moves


def node_facts(program: Program, placed: Placed, prices: Prices) -> dict[str, dict[str, NodeFacts]]:
    """`PlanDocument.nodes` of a static program under the strategies ``placed``: once per distinct block."""
    found = {}
    for name, graph in program.graphs():
        nodes = [n for n in graph.nodes if n.op in ("call_function", "call_module")]
        measure = Measure(program, name, nodes, placed, prices)
        found[name] = {n.name: _facts(n, measure) for n in nodes}
    return found


def _facts(node: fx.Node, measure: Measure) -> NodeFacts:
    op, type = target_text(node), type_text(node.meta.get("val"))
    if node.op == "call_module":
        return NodeFacts(op=op, type=type, reads=_entering(node, measure))
    if node not in measure.times:  # one of several outputs: no work of its own
        return NodeFacts(op=op, type=type, reads=tuple(Read(node=n.name) for n in operands(node)))
    took = measure.times[node]
    forward, backward = measure.over_cp.get(node, (0.0, 0.0))
    took = took + Seconds(forward, backward)  # what shows of exchanges over cp is the node's own
    return NodeFacts(op=op, type=type, reads=_reads(node, measure), forward=took.forward, backward=took.backward)


def _reads(node: fx.Node, measure: Measure) -> tuple[Read, ...]:
    s = measure.placed.of(measure.name, node)
    back = any(flows((node, i)) for i in range(len(tensors(node))))
    found = []
    for operand, v, q in zip(operands(node), reads(node), s.inputs, strict=True):
        gradient = grad_placement(q, s.replicated) if back and flows(v) else None
        found.append(_read(operand, v, q, gradient, measure))
    return tuple(found)


def _entering(call: fx.Node, measure: Measure) -> tuple[Read, ...]:
    """What a block is given: moved to where its placeholders want it. Parameters are stored so."""
    body = measure.program.blocks[str(call.target)]
    places = [n for n in body.nodes if n.op == "placeholder"]
    found = []
    for place, operand, v in zip(places, operands(call), reads(call), strict=True):
        if place.meta["kind"] != "input":
            found.append(Read(node=operand.name))
            continue
        wanted = measure.placed.of(str(call.target), place).outputs[0]
        gradient = grad_placement(wanted, True) if flows(v) and flows((place, 0)) else None
        found.append(_read(operand, v, wanted, gradient, measure))
    return tuple(found)


def _read(operand: fx.Node, v: Value, q: Placement, gradient: Placement | None, measure: Measure) -> Read:
    done = moves(measure.at(v), q, gradient)
    assert done is not None, f"{v[0].name} cannot go from {measure.at(v)} to {q}"
    forward, backward = measure.move(v, q, gradient)
    return Read(
        node=operand.name,
        forward=done.forward,
        backward=done.backward,
        forward_seconds=forward,
        backward_seconds=backward,
    )
