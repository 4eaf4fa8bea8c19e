"""How a build folder is started on the hosts that a plan stands on."""

from __future__ import annotations

from autopar.plan.plan import Plan

LOCAL = """\
    torchrun --nproc-per-node {ranks} train.py            # train
    torchrun --nproc-per-node {ranks} train.py --resume   # go on from the last checkpoint
    autopar run .                                         # the same, started and watched by autopar
"""
UNLIKE = """\
The plan is for unlike hosts, and ranks follow the order of the hosts: start this on each, with its own node rank and number of
processes (`ADDRESS` is the host of node rank 0), at the same time.

{table}

    {visible}torchrun --nnodes {hosts} --node-rank NODE_RANK --nproc-per-node PROCESSES \\
        --master-addr ADDRESS --master-port 29500 train.py            # --resume: go on from the last checkpoint

On one machine, as a rehearsal with a process for each rank: `autopar run .`
"""


def launching(plan: Plan) -> str:
    """The commands that train, as Markdown."""
    if not plan.hosts:
        return LOCAL.format(ranks=plan.mesh.devices)
    partly = any(host.devices != tuple(range(len(host.devices))) for host in plan.hosts)
    visible = "CUDA_VISIBLE_DEVICES=DEVICES " if partly else ""
    return UNLIKE.format(table=table(plan), hosts=len(plan.hosts), visible=visible)


def table(plan: Plan) -> str:
    """A row for every host: its node rank, how many processes, on which devices, which ranks and stages they are."""
    rows = ["| node rank | host | processes | devices | ranks | stages |", "|---|---|---|---|---|---|"]
    wide, first = plan.mesh.devices // plan.mesh.pp, 0
    for node, host in enumerate(plan.hosts):
        last = first + len(host.devices) - 1
        ranks = range(first // wide, last // wide + 1)
        stages = [s for s in range(len(plan.stages)) if s % plan.mesh.pp in ranks]
        rows.append(
            f"| {node} | {host.group}, host {host.host} ({host.device}) | {len(host.devices)} | "
            f"{','.join(map(str, host.devices))} | {first}–{last} | {', '.join(map(str, stages))} |"
        )
        first = last + 1
    return "\n".join(rows)
