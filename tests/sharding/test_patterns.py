"""Pieces travel along letters: what stands behind a fused projection decides how it may be cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from autopar.sharding.patterns import collect_patterns
from autopar.sharding.rule import strategies


def graph_of(function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> fx.Graph:
    """The exported graph of a function of parameters called w0, w1, …"""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.ParameterList(nn.Parameter(torch.randn(s)) for s in shapes)

        def forward(self) -> torch.Tensor:
            return function(*self.w)

    graph = torch.export.export(Model(), (), strict=False).graph
    for node in graph.find_nodes(op="placeholder"):
        node.meta["kind"] = "parameter"
    return graph


def options(graph: fx.Graph, degree: int = 2) -> dict[str, set[str]]:
    """Every node's strategies as text, by node name."""
    patterns = collect_patterns(graph)
    return {n.name: {str(s) for s in strategies(n, degree, patterns)} for n in graph.nodes}


def fused(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    q, k, v = F.linear(x, w, b).split([16, 8, 8], -1)
    return (q.view(5, 16) * torch.cat([k, v], -1)).sum()


def test_the_linear_before_a_split_may_be_cut_in_its_parts_and_so_may_weight_and_bias():
    found = options(graph_of(fused, (5, 3), (32, 3), (32,)))
    assert "R,S(0|16,8,8),S(0|16,8,8)->S(1|16,8,8)" in found["linear"]
    assert "->S(0|16,8,8)" in found["p_w_1"] and "->S(0|16,8,8)" in found["p_w_2"]
    assert "S(1|16,8,8)->S(1),S(1),S(1)" in found["split_with_sizes"]


def test_pieces_of_a_cat_travel_back_through_pointwise_operators_and_getitem():
    found = options(graph_of(fused, (5, 3), (32, 3), (32,)))
    assert "S(1|8,8),S(1|8,8)->S(1|8,8)" in found["mul"]
    assert "S(1|8,8)->S(1|8,8)" in found["getitem"]


def test_a_view_with_the_three_in_front_makes_three_pieces_and_with_the_three_behind_none():
    front = graph_of(lambda x, w: F.linear(x, w).view(5, 3, 4, 7).select(1, 0).sum(), (5, 3), (84, 3))
    behind = graph_of(lambda x, w: F.linear(x, w).view(5, 4, 3, 7).select(2, 0).sum(), (5, 3), (84, 3))
    assert "R,S(0|28,28,28)->S(1|28,28,28)" in options(front)["linear"]
    assert "R,S(0|28,28,28)->S(1|28,28,28)" not in options(behind)["linear"]
    assert "S(1)->S(1)" in options(behind)["view"]


def test_slices_of_one_matrix_agree_on_their_common_pieces():
    graph = graph_of(
        lambda x, w: (F.linear(x, w)[:, :8] * F.linear(x, w)[:, 8:16] * F.linear(x, w)[:, 16:]).sum(), (5, 3), (24, 3)
    )
    assert "->S(0|8,8,8)" in options(graph)["p_w_1"]


def test_pieces_that_the_degree_does_not_divide_are_no_option():
    graph = graph_of(lambda x, w: sum(t.sum() for t in F.linear(x, w).split([9, 6, 3], -1)), (5, 4), (18, 4))
    assert "->S(0|9,6,3)" in options(graph, 3)["p_w_1"]
    assert options(graph, 2)["p_w_1"] == {"->R", "->S(0)", "->S(1)"}


def test_a_graph_without_fused_dims_has_no_patterns():
    graph = graph_of(lambda x, w: F.linear(x, w).relu().sum(), (5, 3), (24, 3))
    assert collect_patterns(graph) == {}


@pytest.mark.parametrize("heads", [4, 32])
def test_pieces_are_few_or_not_offered_at_all(heads: int):
    """Halves of every head: worth a pattern for four heads, a nuisance for thirty-two."""

    def rotate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a, b = F.linear(x, w).view(5, heads, 8).chunk(2, -1)
        return torch.cat([-b, a], -1).sum()

    found = collect_patterns(graph_of(rotate, (5, 3), (heads * 8, 3)))
    linear = [p for n, p in found.items() if n.name == "linear"]
    assert bool(linear) == (heads == 4)
