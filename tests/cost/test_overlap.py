"""What shows of a collective that runs beside computing: what is longer, and what its kernels take meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autopar.cluster import AxisLink, Cluster
from autopar.cost.collective import COPYING, HELD, PASSES, behind, contention, speed
from autopar.plan.plan import MeshShape


def replicas(spec: dict[str, Any], devices: int) -> tuple[AxisLink, Cluster]:
    cluster = Cluster.load(spec)
    return cluster.axis_link(MeshShape(dp=devices), "dp"), cluster


def network(gigabytes: float, hosts: int = 4) -> dict[str, Any]:
    host = {"span": "host", "bandwidth": "300 GB/s", "latency": "3 us", "efficiency": 0.8}
    return {"name": "dgx-a100", "hosts": hosts, "links": [
        host, {"span": "cluster", "bandwidth": gigabytes * 1e9, "latency": "8 us", "efficiency": 0.9}]}  # fmt: skip


def test_inside_a_host_a_collective_takes_its_multiprocessors_and_its_share_of_the_memory_bandwidth() -> None:
    link, cluster = replicas({"name": "dgx-a100"}, 8)
    assert speed(link) == pytest.approx(0.8 * 300e9)
    assert contention(link, cluster.device) == pytest.approx(HELD + PASSES * 240e9 / 2.039e12)


def test_over_a_slower_network_a_collective_takes_less_from_what_runs_beside_it() -> None:
    found = []
    for gigabytes in (25, 12.5, 6.25, 1):
        link, cluster = replicas(network(gigabytes), 32)
        found.append(contention(link, cluster.device))
        assert speed(link) == pytest.approx(8 * gigabytes * 1e9 * 0.9)  # all eight rails carry one ring each
    assert found == sorted(found, reverse=True)
    assert found[-1] > HELD


def test_a_slower_network_never_shows_less() -> None:
    for seconds in (0.01, 0.1, 1.0):
        shown = []
        for gigabytes in (25, 12.5, 6.25, 1):
            link, cluster = replicas(network(gigabytes), 32)
            shown.append(float(behind(1e9 / speed(link), seconds, contention(link, cluster.device))))
        assert shown == sorted(shown)


def test_what_is_longer_than_the_computation_shows_and_a_share_of_the_rest() -> None:
    assert behind(np.array([1.0, 3.0]), 2.0, 0.25).tolist() == [0.25, 1.5]
    assert behind(0.0, 4.0, 0.25) == 0.0


def test_a_device_whose_cores_do_both_copies_at_a_fixed_share() -> None:
    link, cluster = replicas({"name": "local-cpu", "devices_per_host": 2}, 2)
    assert cluster.device.units is None
    assert contention(link, cluster.device) == COPYING
