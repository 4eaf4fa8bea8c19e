"""Dead devices and groups in a cluster file: how they are written, read back, and refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from autopar.cluster import Cluster
from autopar.errors import SpecError
from autopar.spec import ClusterSpec
from autopar.spec.cluster import read_cluster
from autopar.spec.dead import dead_devices
from autopar.spec.job import Job
from autopar.spec.source import Source

JOIN = [{"span": "cluster", "bandwidth": "25 GB/s", "latency": "10 us"}]
DEVICE = {"name": "d", "memory": "1 GiB", "bandwidth": "1 GB/s", "flops_per_second": {"float32": 1e12}}


def read(**spec: Any) -> ClusterSpec:
    return read_cluster(Source({"name": "dgx-h100", **spec}, "test"))


@pytest.mark.parametrize(
    ("dead", "found"),
    [
        (0, {}),
        (1, {7: (7,)}),
        (9, {7: tuple(range(8)), 6: (7,)}),
        ({3: [5, 1]}, {3: (1, 5)}),
        ({3: 2, 0: [0]}, {3: (6, 7), 0: (0,)}),
        ({"3": [5]}, {3: (5,)}),
        ({3: 0}, {}),
    ],
    ids=str,
)
def test_dead_devices_are_told_by_number_by_host_or_by_name(dead: Any, found: dict) -> None:
    spec = read(hosts=8, dead=dead)
    assert dead_devices(spec.dead, 8, 8) == found
    assert spec.devices == Cluster.load(spec).devices == 64 - sum(map(len, found.values()))
    assert sum(Cluster.load(spec).groups[0].live) == spec.devices


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "dgx-h100", "hosts": 8, "dead": {3: [5], 1: 2}},
        {"name": "dgx-h100", "hosts": 8, "dead": 1},
        {"name": "mix", "groups": [{"name": "dgx-a100", "hosts": 3, "dead": {0: [7]}}, {"name": "dgx-h100", "hosts": 5}],
         "links": JOIN},
    ],
    ids=str,
)  # fmt: skip
def test_a_cluster_of_unlike_hosts_reads_back_from_its_dump_and_from_a_job(spec: dict) -> None:
    read_ = read_cluster(Source(spec, "test"))
    for text in (read_.model_dump_json(), yaml.safe_dump(read_.model_dump(mode="json"))):
        again = read_cluster(Source(yaml.safe_load(text), "test"))
        assert again == read_
        assert Cluster.load(again) == Cluster.load(spec)
    job = Job.model_validate({"cluster": spec})
    assert Job.model_validate(yaml.safe_load(job.dump())).cluster == read_


def test_a_cluster_without_dead_devices_is_written_as_before() -> None:
    assert "dead" not in read().model_dump(mode="json")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"hosts": 8, "dead": {8: [0]}}, "dead devices on host 8; hosts are numbered 0 to 7"),
        ({"hosts": 8, "dead": {3: [8]}}, "a host has 8, numbered from 0"),
        ({"hosts": 8, "dead": {3: 9}}, "a host has 8, numbered from 0"),
        ({"hosts": 8, "dead": [3]}, "dead must be such as {3: [5]}"),
        ({"hosts": 8, "dead": "3"}, "dead must be such as {3: [5]}"),
        ({"hosts": 8, "dead": {3: "all"}}, "has 'all' for host 3"),
        ({"hosts": 8, "dead": {"a": 1}}, "has the host 'a'"),
        ({"hosts": 8, "dead": -1}, "dead must be such as"),
        ({"hosts": 2, "dead": 16}, "has no device left: all 16 are dead"),
        ({"name": "mix", "groups": [{"name": "dgx-a100", "dead": 8}], "links": JOIN}, "groups.0 has no device left"),
        ({"name": "mix", "groups": [{"name": "dgx-a100"}], "dead": 1, "links": JOIN}, "belong into the groups"),
    ],
    ids=str,
)
def test_dead_devices_that_cannot_be_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(**spec)
    assert message in str(caught.value)


GROUPS = [
    {"name": "a", "device": DEVICE, "devices_per_host": 4},
    {"name": "b", "device": DEVICE, "devices_per_host": 4},
]


@pytest.mark.parametrize(
    ("groups", "links", "message"),
    [
        (GROUPS, JOIN, "groups.0 (a) has 4 devices, but its links join 1; links needs an entry with span: host, in the group"),
        ([{"name": "dgx-a100"}], [{"span": "host", "bandwidth": 1, "latency": 0}], "span: cluster that joins them"),
        ([{"name": "dgx-a100"}], [*JOIN, {"span": "host", "bandwidth": 1, "latency": 0}], "span: cluster that joins them"),
        ([{"name": "dgx-a100"}], [{**JOIN[0], "span": 32}, {**JOIN[0], "span": 16}, *JOIN], "not in order"),
        ([{"name": "dgx-a1000"}], JOIN, "did you mean 'dgx-a100'?"),
        ([{"name": "dgx-a100", "hosts": 0}], JOIN, "groups.0.hosts must be at least 1"),
        ([{"name": "dgx-a100", "gpus": 0}], JOIN, "unknown key 'gpus' in groups.0"),
    ],
)  # fmt: skip
def test_groups_that_nothing_joins_or_that_are_not_known_are_refused(groups: list, links: list, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_cluster(Source({"name": "mix", "groups": groups, "links": links}, "test"))
    assert message in str(caught.value)


def test_links_inside_groups_may_stand_once_for_all() -> None:
    inside = {"span": "host", "bandwidth": "100 GB/s", "latency": "1 us"}
    many = [{**GROUPS[0], "hosts": 2}, GROUPS[1]]
    made = Cluster.load({"name": "mix", "groups": many, "links": [inside, *JOIN]})
    assert [(k.span, k.devices, k.bandwidth) for k in made.groups[0].links] == [("host", 4, 1e11), ("cluster", 8, 25e9)]
    assert [(k.span, k.devices, k.bandwidth) for k in made.groups[1].links] == [("host", 4, 1e11)]
