"""What a model costs, counted on its graph: parameters by part, bytes kept for the backward, experts."""

from __future__ import annotations

from typing import Any

from torch import fx

from autopar.cluster import Cluster
from autopar.cluster.mesh import AxisLink
from autopar.cost.precision import Precision
from autopar.cost.regions import Measure, Prices
from autopar.cost.values import op_name, tensors
from autopar.ir.program import Program
from autopar.plan.plan import MeshShape
from autopar.solve.assignment import replicated
from autopar.solve.blocks import common
from autopar.spec.family import roles


def by_role(program: Program) -> dict[str, int]:
    """Parameters by the role of their module (`embedding`, `query`, `up`, …; `other` where the family names none)."""
    found: dict[str, int] = {}
    known = roles(program.parameters)
    for name, parameter in program.parameters.items():
        if parameter.alias_of is None:
            role = known.get(name, "other")
            found[role] = found.get(role, 0) + parameter.numel
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def experts(graph: fx.Graph) -> tuple[int, int] | None:
    """How many experts there are and how many a token chooses."""
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) == "topk":
            count = tensors(node.all_input_nodes[0])[0].shape[-1]
            return int(count), int(tensors(node)[0].shape[-1])
    return None


def activation_bytes(program: Program, name: str) -> float:
    """Bytes that one instance of a block keeps from forward to backward, nothing recomputed, on one device."""
    graph: Any = dict(program.graphs())[name]
    shared = common(program).get(name, frozenset())
    region = Measure(program, name, list(graph.nodes), replicated(), prices(), shared).region()
    return float(region.saved[0])


def prices() -> Prices:
    """Any device will do: bytes do not depend on it."""
    cluster = Cluster.load("local-cpu")
    link: AxisLink = cluster.axis_link(MeshShape(tp=1), "tp")
    return Prices(cluster.device, link, Precision())
