"""What a plan keeps of every node for people: its operands, its moves along tp, its seconds."""

from __future__ import annotations

from torch import fx

from autopar.cost.regions import Measure, Placed, Prices
from autopar.cost.values import flows, reads, tensors
from autopar.ir.ops import operands
from autopar.ir.program import Program
from autopar.ir.text import target_text, type_text
from autopar.plan.plan import NodeFacts, Read
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
    if node not in measure.times:  # a block's call, or one of several outputs: no work of its own
        return NodeFacts(op=op, type=type, reads=tuple(Read(node=n.name) for n in operands(node) if not _parameter(n)))
    took = measure.times[node]
    return NodeFacts(op=op, type=type, reads=_reads(node, measure), forward=took.forward, backward=took.backward)


def _parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["kind"] == "parameter"


def _reads(node: fx.Node, measure: Measure) -> tuple[Read, ...]:
    s = measure.placed.of(measure.name, node)
    back = any(flows((node, i)) for i in range(len(tensors(node))))
    found = []
    for operand, v, q in zip(operands(node), reads(node), s.inputs, strict=True):
        gradient = grad_placement(q, s.replicated) if back and flows(v) else None
        done = moves(measure.at(v), q, gradient)
        assert done is not None, f"{node.name}: {v[0].name} cannot go from {measure.at(v)} to {q}"
        seconds = measure.move(v, q, gradient)
        found.append(
            Read(
                node=operand.name,
                forward=done.forward,
                backward=done.backward,
                forward_seconds=seconds[0],
                backward_seconds=seconds[1],
            )
        )
    return tuple(found)
