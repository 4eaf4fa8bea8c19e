"""Layouts on unlike hosts: which devices ranks get, which links they cross, and that none is given twice."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.cluster import Cluster
from autopar.cluster.layout import Layouts, joining, take
from autopar.cluster.mesh import lay_uneven, members
from autopar.cluster.topology import path, topology
from autopar.plan.plan import MeshShape

JOIN = {"span": "cluster", "bandwidth": "10 GB/s", "latency": "20 us"}


def mixed(*groups: Any, links: list | None = None) -> Cluster:
    return Cluster.load({"name": "mix", "groups": list(groups), "links": links or [JOIN]})


A100, H100 = {"name": "dgx-a100", "hosts": 2}, {"name": "dgx-h100", "hosts": 2}
DEGRADED = {"name": "dgx-h100", "hosts": 8, "dead": {3: [5]}}


@pytest.mark.parametrize(
    ("ranks", "tp", "wide", "sizes"),
    [
        (1, 1, 63, [8, 8, 8, 7, 8, 8, 8, 8]),  # all, though hosts differ
        (7, 8, 8, [8] * 7),  # whole hosts alone
        (1, 1, 56, [8] * 7),
        (8, 1, 7, [7] * 8),  # seven of each: ranks do not straddle hosts
        (9, 1, 7, [8, 8, 8, 7, 8, 8, 8, 8]),
        (3, 4, 4, [4, 4, 4]),  # in step with the hosts
        (31, 2, 2, [8, 8, 8, 6, 8, 8, 8, 8]),  # tp groups of two leave one device
        (8, 8, 8, None),  # tp groups of eight are seven
        (1, 1, 64, None),
    ],
)
def test_ranks_get_the_same_devices_of_every_host_where_that_can_be(
    ranks: int, tp: int, wide: int, sizes: list | None
) -> None:
    share = take(Cluster.load(DEGRADED), (0,), ranks, tp, wide)
    assert (share and [used.devices for used in share.hosts]) == sizes
    if share is not None:
        assert share.cluster.devices == share.devices == ranks * wide


def test_no_device_is_used_twice_and_none_that_is_dead() -> None:
    cluster = mixed({**A100, "dead": {0: 3}}, H100, {"name": "dgx-v100", "hosts": 1})
    seen = 0
    for tp, wide in ((1, 1), (1, 4), (2, 4), (4, 8), (8, 8), (1, 16), (2, 32)):
        for layout in Layouts(cluster).all(tp, wide, 32):
            used = [u for share in layout.shares for u in share.hosts]
            assert len({(u.group, u.host) for u in used}) == len(used)
            assert all(u.devices <= cluster.groups[u.group].live[u.host] for u in used)
            assert layout.devices == wide * len(layout.of)
            assert sum(layout.unused().values()) == cluster.devices - layout.devices
            seen += 1
    assert seen > 100


def test_groups_count_as_one_only_where_none_has_room_for_a_rank_more() -> None:
    cluster = mixed(A100, H100)
    wide = list(Layouts(cluster).all(1, 32, 32))
    assert [share.groups for layout in wide for share in layout.shares] == [(0, 1)]
    device = wide[0].shares[0].cluster.device
    assert device.peak("bfloat16") == 312e12 and device.memory == 80 * 2**30
    assert all(len(share.groups) == 1 for layout in Layouts(cluster).all(1, 16, 32) for share in layout.shares)


def test_messages_between_groups_cross_the_link_that_joins_them_and_those_out_of_hosts() -> None:
    rack = {"span": 32, "bandwidth": "40 GB/s", "latency": "9 us"}
    cluster = mixed(A100, H100, {**H100, "device": {"memory": "60 GiB"}}, links=[rack, JOIN])
    assert joining(cluster, 0, 1).bandwidth == 25e9, "an A100 host's own ports are slower than the rack's switch"
    assert (joining(cluster, 0, 2).bandwidth, joining(cluster, 2, 1).bandwidth) == (10e9, 10e9)
    assert path(topology(mixed(A100, H100)), 0, 16)[0] == joining(mixed(A100, H100), 0, 1).bandwidth == 10e9


def test_inside_a_share_links_are_the_groups_own() -> None:
    share = take(mixed(A100, H100), (1,), 2, 8, 8)
    assert share is not None
    assert [(k.span, k.devices, k.bandwidth) for k in share.cluster.links] == [
        ("host", 8, 450e9),
        ("cluster", 16, 50e9),
    ]
    few = take(mixed(A100, H100), (1,), 2, 2, 4)
    assert few is not None and few.cluster.axis_link(MeshShape(tp=2, dp=2), "dp").span == "host"


def test_oversubscribed_levels_hold_where_hosts_stand_together() -> None:
    leaf = {"span": 16, "bandwidth": "50 GB/s", "latency": "8 us"}
    spine = {"span": "cluster", "bandwidth": "12.5 GB/s", "latency": "12 us"}
    host = {"span": "host", "bandwidth": "450 GB/s", "latency": "3 us"}
    whole = {"name": "dgx-h100", "hosts": 4, "links": [host, leaf, spine]}
    even = Cluster.load(whole)
    for dead, bandwidth in (({}, 50e9), ({3: [0]}, 50e9), ({0: 8}, 12.5e9)):
        share = take(Cluster.load({**whole, "dead": dead}), (0,), 1, 8, 16)
        assert share is not None
        got = share.cluster.axis_link(MeshShape(dp=2, tp=8), "dp")
        assert got.bandwidth == bandwidth, dead
    assert even.axis_link(MeshShape(dp=2, tp=8, pp=2), "dp").bandwidth == 50e9
    assert even.axis_link(MeshShape(dp=4, tp=8), "dp").bandwidth == 12.5e9


@pytest.mark.parametrize("sizes", [(8, 7, 8), (3, 5), (4, 4, 1)])
def test_members_of_a_ring_over_uneven_hosts_are_as_many_as_counted(sizes: tuple[int, ...]) -> None:
    cluster = Cluster.load("dgx-h100")
    where = [host for host, n in enumerate(sizes) for _ in range(n)]
    for tp in (1, 2, 3):
        for dp in (2, 3, 4):
            if tp * dp > len(where):
                continue
            rings = [members((tp, 1, dp, 1), "dp", d) for d in range(len(where) // (tp * dp) * tp * dp)]
            fewest = min([where[d] for d in ring].count(where[ring[0]]) for ring in rings)
            fewest = min(
                [fewest, *([where[d] for d in ring].count(h) for ring in rings for h in {where[d] for d in ring})]
            )
            link = lay_uneven((tp, 1, dp, 1), "dp", cluster.links, sizes)
            assert link.per_host == fewest and link.members == dp


def test_a_dead_device_leaves_its_place_in_the_graph_of_links_empty() -> None:
    graph = topology(Cluster.load({"name": "dgx-h100", "hosts": 2, "dead": {0: [0, 1]}}))
    assert path(graph, 0, 5)[0] == 450e9 and path(graph, 5, 6)[0] == 50e9 and path(graph, 6, 13)[0] == 450e9
    assert sum(node[0] == "device" for node in graph) == 14
