"""Plans for unlike hosts, emitted and run on local processes: equal to one process, ranks on the hosts they are meant for."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.api import compile_job
from autopar.cluster import Cluster
from autopar.emulate import everywhere, local_cluster
from autopar.proof import prove
from autopar.spec.check import check_job
from autopar.spec.job import Job

JOIN = [{"span": "cluster", "bandwidth": "25 GB/s", "latency": "10 us"}]
MIX = {"name": "mix", "groups": [{"name": "dgx-a100", "hosts": 1}, {"name": "dgx-h100", "hosts": 1}], "links": JOIN}
UNEVEN = {"name": "mix", "groups": [{"name": "dgx-a100", "hosts": 2}, {"name": "dgx-h100", "hosts": 1}], "links": JOIN}


def job(cluster: dict, **more: Any) -> Job:
    model = {"family": "llama", "layers": 5, "hidden": 64, "ffn": 128, "heads": 4, "vocab": 256, "tied": False}
    return Job.model_validate({"model": model, "cluster": cluster, "batch": {"sequences": 12, "length": 16}, **more})


@pytest.mark.parametrize(
    ("cluster", "ranks", "pins"),
    [(MIX, 4, {}), (UNEVEN, 3, {"zero": 0}), (MIX, 4, {"pp": 2, "tp": 2, "schedule": "interleaved1f1b"})],
    ids=["two and two", "two and one", "interleaved"],
)
def test_a_plan_on_unlike_hosts_equals_one_process(cluster: dict, ranks: int, pins: dict) -> None:
    found = prove(job(cluster, pins=pins), ranks)
    assert found["equal"], found
    assert found["ranks"] == ranks == sum(len(h["devices"]) for h in found["plan"]["hosts"])
    blocks: dict[str, int] = {}
    for stage in found["plan"]["stages"]:
        blocks[stage["group"]] = blocks.get(stage["group"], 0) + stage["blocks"][1] - stage["blocks"][0] + 1
    assert blocks["dgx-h100 here"] > blocks["dgx-a100 here"]


def test_a_proof_that_cannot_stand_on_every_group_says_so() -> None:
    one_block = {"family": "llama", "layers": 1, "hidden": 64, "ffn": 128, "heads": 4, "vocab": 256, "tied": False}
    found = prove(job(UNEVEN, model=one_block), 3, shrink=False)
    assert found["equal"] and "not proved on every group of hosts" in found["note"]


def test_the_processes_of_a_proof_are_shared_out_as_the_devices_are() -> None:
    local = Cluster.load(local_cluster(job(UNEVEN), 3))
    assert [g.devices for g in local.groups] == [2, 1]
    assert local.groups[1].device.peak("float64") / local.groups[0].device.peak("float64") == pytest.approx(989 / 312)
    pins = everywhere(job(UNEVEN).pins, local)
    assert (pins.pp, pins.dp, pins.tp) == (3, 1, 1)


def test_a_build_folder_says_which_host_starts_which_ranks(tmp_path) -> None:
    asked = job(MIX, pins={"pp": 2, "tp": 4, "dp": 2, "schedule": "1f1b"})
    check_job(asked)
    text = (compile_job(asked, tmp_path / "build") / "README.md").read_text()
    assert "--node-rank NODE_RANK" in text
    assert "| 0 | dgx-h100, host 0" in text or "| 0 | dgx-a100, host 0" in text
    page = (tmp_path / "build" / "plan.html").read_text()
    assert "dgx-h100: 1 host, 8 × H100-SXM-80GB" in page
