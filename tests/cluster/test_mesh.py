"""How a mesh lies on hosts, and which links each axis crosses, against counting."""

from itertools import product

import pytest

from autopar.cluster import AXES, Cluster
from autopar.cluster.mesh import members, neighbours, stride
from autopar.cluster.topology import path, topology
from autopar.plan.plan import MeshShape


def test_tp_is_innermost_then_cp_dp_and_pp():
    degrees = (2, 2, 4, 4)  # of AXES
    assert AXES == ("tp", "cp", "dp", "pp")
    assert members(degrees, "tp") == [0, 1]
    assert members(degrees, "cp", 5) == [5, 7]
    assert members(degrees, "dp", 1) == [1, 5, 9, 13]
    assert members(degrees, "pp") == [0, 16, 32, 48]


@pytest.mark.parametrize("per_host", [1, 2, 3, 4, 6, 8])
def test_members_that_share_a_host_are_as_many_as_counted(per_host):
    for step, degree in product([1, 2, 3, 4, 8], [2, 3, 4, 8]):
        rings = [[o + step * degree * k + step * i for i in range(degree)] for k in range(24) for o in range(step)]
        total = step * degree * 24
        counted = [list(map(lambda d: d // per_host, ring)).count(h) for ring in rings for h in {ring[0] // per_host}]
        together = neighbours(step, degree, per_host)
        assert together <= min(counted), (per_host, step, degree, total)
        if per_host % step == 0 and (per_host % (step * degree) == 0 or (step * degree) % per_host == 0):
            assert together == min(counted), (per_host, step, degree)


def test_an_axis_uses_the_innermost_link_that_holds_its_ring():
    cluster = Cluster.load({"name": "dgx-h100", "hosts": 8})
    mesh = MeshShape(pp=4, dp=4, cp=2, tp=2)
    links = {axis: cluster.axis_link(mesh, axis) for axis in AXES}
    assert [links[a].span for a in AXES] == ["host", "host", "cluster", "cluster"]
    assert [links[a].spans_hosts for a in AXES] == [False, False, True, True]
    dp = links["dp"]
    assert (dp.members, dp.per_host, dp.hosts, dp.bandwidth) == (4, 2, 2, 50e9)
    assert dp.inner is not None and dp.inner.bandwidth == 450e9
    assert links["pp"].inner is None and links["pp"].per_host == 1


def test_an_axis_of_one_crosses_nothing():
    link = Cluster.load("dgx-a100").axis_link(MeshShape(dp=8), "tp")
    assert (link.span, link.latency, link.members, link.spans_hosts) == ("device", 0.0, 1, False)


def test_a_level_between_devices_and_hosts_is_used_where_a_ring_fits_in_it():
    pair = {"span": 2, "bandwidth": "100 GB/s", "latency": "1 us"}
    host = {"span": "host", "bandwidth": "10 GB/s", "latency": "5 us"}
    cluster = Cluster.load({"name": "rtx-4090-x8", "links": [pair, host]})
    assert cluster.axis_link(MeshShape(tp=2, dp=4), "tp").bandwidth == 100e9
    assert cluster.axis_link(MeshShape(tp=2, dp=4), "dp").bandwidth == 10e9
    assert cluster.axis_link(MeshShape(tp=4, dp=2), "tp").bandwidth == 10e9


def test_a_ring_that_does_not_align_with_hosts_crosses_them():
    cluster = Cluster.load({"name": "dgx-a100", "devices_per_host": 4, "hosts": 3})
    assert cluster.axis_link(MeshShape(tp=3, dp=4), "tp").span == "cluster"


def test_a_path_is_as_fast_as_its_slowest_edge_and_its_latencies_add_up():
    graph = topology(Cluster.load({"name": "dgx-h100", "hosts": 2}))
    assert path(graph, 0, 7) == (450e9, pytest.approx(3e-6))
    assert path(graph, 0, 8) == (50e9, pytest.approx(11e-6))
    groups = [{"name": "dgx-a100", "hosts": 2}, {"name": "dgx-h100", "hosts": 1}]
    join = [{"span": "cluster", "bandwidth": "10 GB/s", "latency": "20 us"}]
    mixed = topology(Cluster.load({"groups": groups, "links": join}))
    assert path(mixed, 0, 7)[0] == 300e9 and path(mixed, 0, 8)[0] == 25e9 and path(mixed, 0, 16)[0] == 10e9
    assert stride((2, 2, 4, 4), "pp") == 16
