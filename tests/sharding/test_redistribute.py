"""The law of an edge: which collectives, how much they move, and that moving keeps the value."""

from __future__ import annotations

import itertools

import pytest
import torch

from autopar.sharding.placement import P, R, S, glue, local, local_shape
from autopar.sharding.redistribute import Moves, grad_placement, legal, moves, redistribute, volume, wanted

PLACES = [R, P, S(0), S(1), S(1, (8, 4, 4)), S(1, (4, 12)), S(2)]


def edge(p, q, replicated=False):
    return moves(p, q, grad_placement(q, replicated))


def test_megatrons_f_is_nothing_forward_and_an_all_reduce_backward():
    assert edge(R, R) == Moves("none", "all_reduce")


def test_megatrons_g_is_an_all_reduce_forward_and_nothing_backward():
    assert edge(P, R, replicated=True) == Moves("all_reduce", "none")


def test_sequence_parallel_gathers_forward_and_reduce_scatters_backward_and_the_other_way_round():
    assert edge(S(1), R) == Moves("all_gather", "reduce_scatter")
    assert edge(P, S(1)) == Moves("reduce_scatter", "all_gather")


def test_a_replicated_reader_of_a_shard_takes_its_part_of_the_whole_gradient():
    assert edge(S(1), R, replicated=True) == Moves("all_gather", "slice")
    assert edge(R, S(0)) == Moves("slice", "all_gather")


def test_other_dims_go_by_all_to_all_and_other_pieces_of_one_dim_are_gathered_and_cut():
    assert edge(S(0), S(1)) == Moves("all_to_all", "all_to_all")
    assert edge(S(1), S(1, (8, 8))) == Moves("all_gather_slice", "all_gather_slice")
    assert edge(S(1), S(1)) == Moves("none", "none")


def test_where_no_gradient_flows_nothing_moves_backward():
    assert moves(S(0), R, None) == Moves("all_gather", "none")


def test_a_partial_sum_is_passed_on_but_never_made():
    assert edge(P, P) == Moves("none", "none")
    assert moves(R, P, R) is None and moves(S(0), P, R) is None
    with pytest.raises(ValueError, match="only an operator makes a partial sum"):
        redistribute(R, P, [torch.ones(2)] * 2)


@pytest.mark.parametrize("degree", [2, 4])
def test_moving_a_value_keeps_it(degree: int):
    whole = torch.randn(4, 16, 8, dtype=torch.float64)
    for p, q in itertools.product(PLACES, PLACES):
        if legal(p, q):
            shards = [local(p, whole, r, degree) for r in range(degree)]
            moved = redistribute(p, q, shards)
            assert torch.allclose(glue(q, moved), whole), (p, q)
            assert all(tuple(m.shape) == local_shape(q, (4, 16, 8), degree) for m in moved), (p, q)


def test_gradients_are_never_wanted_as_partial_sums():
    assert [wanted(p) for p in PLACES] == [R, R, *PLACES[2:]]


def test_volumes_are_bytes_sent_by_a_device_in_ring_algorithms():
    assert {
        k: volume(k, 120.0, 4) for k in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "slice", "none")
    } == {
        "all_gather": 90.0,
        "reduce_scatter": 90.0,
        "all_reduce": 180.0,
        "all_to_all": 22.5,
        "slice": 0.0,
        "none": 0.0,
    }
