"""What a build folder's README says about starting it."""

from __future__ import annotations

from autopar.lower.launching import launching
from autopar.plan.plan import Host, MeshShape, Plan, Stage

STAGES = tuple(Stage(blocks=(i, i)) for i in range(3))


def test_hosts_of_one_kind_need_one_command() -> None:
    text = launching(Plan(mesh=MeshShape(pp=3), stages=STAGES))
    assert "torchrun --nproc-per-node 3 train.py" in text and "node-rank" not in text


def test_unlike_hosts_are_listed_in_the_order_of_their_ranks_with_what_each_starts() -> None:
    hosts = (Host(group="old", host=1, device="A", devices=(0, 2)), Host(group="new", host=0, device="H", devices=(0,)))
    text = launching(Plan(mesh=MeshShape(pp=3), stages=STAGES, hosts=hosts))
    assert "| 0 | old, host 1 (A) | 2 | 0,2 | 0–1 | 0, 1 |" in text
    assert "| 1 | new, host 0 (H) | 1 | 0 | 2–2 | 2 |" in text
    assert "CUDA_VISIBLE_DEVICES=DEVICES torchrun --nnodes 2 --node-rank NODE_RANK --nproc-per-node PROCESSES" in text
