"""Shipped clusters, changes where they are named, and groups of unlike hosts."""

from pathlib import Path

import pytest
import yaml

from autopar.cluster import Cluster
from autopar.errors import SpecError
from autopar.spec import ClusterSpec, library
from autopar.spec.cluster import read_cluster
from autopar.spec.source import Source

CONTRACT = ["local-cpu", "dgx-v100", "dgx-a100", "dgx-h100", "dgx-h200", "dgx-b200", "gb200-nvl72", "rtx-4090-x8"]
JOIN = [{"span": "cluster", "bandwidth": "25 GB/s", "latency": "10 us"}]
WHOLE = {
    "name": "mine",
    "device": {"name": "d", "memory": "1 GiB", "bandwidth": "1 GB/s", "flops_per_second": {"float32": 1e12}},
    "devices_per_host": 4,
}


def test_the_promised_clusters_are_there():
    assert set(CONTRACT) <= set(library.names("clusters"))


@pytest.mark.parametrize("name", library.names("clusters"))
def test_a_shipped_cluster_is_named_as_its_file_and_cites_sources(name):
    cluster = Cluster.load(name)
    assert cluster.name == name and cluster.hosts == 1 and cluster.device.memory > 2**20
    lines = library.find("clusters", name).read_text().splitlines()
    for i, line in enumerate(lines):
        if any(
            line.strip().startswith(key) for key in ("memory:", "bandwidth:", "flops_per_second:", "host_bandwidth:")
        ):
            assert "#" in line, f"{name}.yaml:{i + 1}: a number without its source"
        if line.strip().startswith("- {span"):
            assert lines[i - 1].strip().startswith("#"), f"{name}.yaml:{i + 1}: a link without its source"


@pytest.mark.parametrize("name", library.names("clusters"))
def test_a_cluster_reads_back_from_its_own_dump(name):
    spec = read_cluster(Source(name, "test"))
    written = spec.model_dump(mode="json")
    assert ClusterSpec.model_validate(written) == spec
    assert Cluster.load(written) == Cluster.load(spec) == Cluster.load(name)


def test_any_field_is_changed_where_the_cluster_is_named():
    device = {"memory": "96 GiB", "bandwidth": "2.4 TB/s", "flops_per_second": {"bfloat16": 800e12}}
    changed = Cluster.load({"name": "dgx-h100", "hosts": 16, "device": device})
    assert (changed.hosts, changed.devices) == (16, 128)
    assert changed.device.memory == 96 * 2**30 and changed.device.bandwidth == 2.4e12
    assert changed.device.peak("bfloat16") == 800e12
    assert changed.device.peak("float32") == Cluster.load("dgx-h100").device.peak("float32")
    assert [link.devices for link in changed.links] == [8, 128]


def test_this_machines_memory_is_shared_among_its_devices():
    two, four = (Cluster.load({"name": "local-cpu", "devices_per_host": n}) for n in (2, 4))
    assert two.devices == 2 and four.devices == 4
    assert two.device.memory // 2 == four.device.memory


def test_a_whole_cluster_may_be_written_inline_or_in_a_file(tmp_path):
    inline = {**WHOLE, "links": [{"span": "host", "bandwidth": "1 GB/s", "latency": 0}]}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(inline))
    assert Cluster.load(file) == Cluster.load(inline) == Cluster.load(Cluster.load(str(file)))


def test_unlike_hosts_keep_their_devices_and_count_as_the_weakest():
    groups = [{"name": "dgx-a100", "hosts": 2}, {"name": "dgx-h100", "hosts": 1, "device": {"memory": "60 GiB"}}]
    mixed = Cluster.load({"groups": groups, "links": JOIN})
    assert not mixed.uniform and (mixed.hosts, mixed.devices, mixed.devices_per_host) == (3, 24, 8)
    assert mixed.device_at(15).name.startswith("A100") and mixed.device_at(16).name.startswith("H100")
    assert mixed.device.memory == 60 * 2**30 and mixed.device.peak("bfloat16") == 312e12
    assert [(link.span, link.bandwidth) for link in mixed.links] == [("host", 300e9), ("cluster", 25e9)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dgx-h1000", "did you mean 'dgx-h100'?"),
        ({"name": "dgx-h1000", "hosts": 2}, "did you mean 'dgx-h100'?"),
        ({"name": "dgx-h100", "device_per_host": 4}, "did you mean 'devices_per_host'?"),
        ({"name": "dgx-h100", "hosts": 0}, "hosts must be at least 1"),
        ({"name": "dgx-h100", "device": {"memory": "80 GiX"}}, "device.memory has the unit 'GiX'"),
        ({"name": "dgx-h100", "device": {"memory": "-80 GiB"}}, "device.memory must be positive"),
        ({"name": "dgx-h100", "device": {"bandwidth": "80 GiB"}}, "device.bandwidth has the unit 'GiB'"),
        ({"name": "dgx-h100", "device": {"flops_per_second": {"bf16": 1e12}}}, "unknown dtype 'bf16'"),
        ({"name": "dgx-h100", "links": [{"span": "rack", "bandwidth": 1, "latency": 0}]}, "links.0.span"),
        ({"name": "dgx-h100", "hosts": 2, "links": [{"span": "host", "bandwidth": 1, "latency": 0}]}, "span: cluster"),
        (WHOLE, "span: host"),
        ({"devices_per_host": 4}, "needs 'device'"),
        ({"groups": [{"name": "dgx-a100"}, {"name": "dgx-h100"}]}, "needs 'links'"),
        ({"groups": [{"name": "dgx-a10000"}], "links": JOIN}, "did you mean 'dgx-a100'?"),
        ({"groups": [{"name": "dgx-a100", "hosts": 0}], "links": JOIN}, "groups.0.hosts must be at least 1"),
        ({"groups": [{"name": "dgx-a100"}], "hosts": 2, "links": JOIN}, "belong into the groups"),
        ({"groups": ["dgx-a100"], "links": JOIN}, "a group must be a mapping"),
        (5, "a cluster is a name, a path, a mapping"),
        (Path("no/such.yaml"), "no such file"),
    ],
)
def test_a_wrong_cluster_is_refused_with_what_would_be_right(spec, message):
    with pytest.raises(SpecError) as error:
        Cluster.load(spec)
    assert message in str(error.value)


def test_a_dtype_without_units_of_its_own_runs_in_the_next_wider_one():
    device = Cluster.load("dgx-v100").device
    assert device.peak("bfloat16") == device.peak("torch.float32") == 15.7e12
    assert Cluster.load("dgx-a100").device.peak("float8_e4m3fn") == 312e12


def test_efficiency_rises_with_size_and_ends_flat():
    device = Cluster.load("dgx-h100").device
    sizes = [0, 1e5, 1e6, 5e6, 1e7, 1e8, 1e9, 1e12]
    shares = [device.share("memory", size) for size in sizes]
    assert shares == sorted(shares) and shares[-1] == shares[-2] == shares[-3]
    assert device.share("memory", 5.5e6) == pytest.approx((0.5 + 0.62) / 2)
    assert device.share("vector", 1.0) == 1.0
