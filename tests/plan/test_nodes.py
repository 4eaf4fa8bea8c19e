"""What a plan keeps of every node: operands in order, moves by the law of an edge, seconds as the costs have them."""

import torch
from torch import nn

from autopar import trace
from autopar.cluster.cluster import Cluster
from autopar.cost.precision import Precision
from autopar.cost.regions import Prices
from autopar.plan.nodes import node_facts
from autopar.plan.plan import MeshShape
from autopar.sharding.placement import P, R, S
from autopar.sharding.strategy import Strategy


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Megatron:
    """Column then row: up by its outputs, down by its inputs."""

    degree = 2

    def of(self, graph, node):
        known = {
            "linear": Strategy((R, S(0)), (S(1),)),
            "relu": Strategy((S(1),), (S(1),)),
            "linear_1": Strategy((S(1), S(1)), (P,)),
        }
        count = len([a for a in node.all_input_nodes])
        return known.get(node.name, Strategy((R,) * count, (R,)))

    def placement(self, program, graph, v):
        node, i = v
        stored = {"up.weight": S(0), "down.weight": S(1)}
        return stored.get(node.meta.get("name"), self.of(graph, node).outputs[i])


def facts():
    program = trace(Mlp(), {"x": torch.randn(4, 16)}, loss=lambda y, batch: y.square().mean()).at(batch=4)
    cluster = Cluster.load("dgx-h100")
    prices = Prices(cluster.device, cluster.axis_link(MeshShape(tp=2), "tp"), Precision())
    return node_facts(program, Megatron(), prices)["program"]


def test_a_partial_sum_is_all_reduced_by_its_reader_and_whole_weights_are_read_as_they_are():
    found = facts()
    up, down = found["linear"], found["linear_1"]
    assert [r.node for r in up.reads][1].endswith("up_weight") and [r.forward for r in up.reads] == ["none", "none"]
    assert up.op == "aten.linear" and up.type == "f32[4, 64]" and up.forward > 0 and up.backward > 0
    assert [r.node for r in down.reads][0] == "relu"
    reader = next(f for f in found.values() if any(r.node == "linear_1" for r in f.reads))
    (read,) = {r for r in reader.reads if r.node == "linear_1"}
    assert read.forward == "all_reduce" and read.backward == "none" and read.forward_seconds > 0
