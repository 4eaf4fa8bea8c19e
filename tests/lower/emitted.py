"""One device's stage of a program under a plan, as a module of this process."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from autopar.cluster.cluster import Cluster
from autopar.emulate import IDEAL_LINK
from autopar.ir.program import Program
from autopar.lower import collectives, recompute
from autopar.lower.emit import emit
from autopar.plan.plan import PlanDocument
from autopar.solve.search import solve
from autopar.spec.job import Job

CLUSTER = {"name": "local-cpu", "devices_per_host": 1, "hosts": 1, "links": [IDEAL_LINK]}


def planned(program: Program, batch: int, length: int, **pins: Any) -> PlanDocument:
    """The plan of one device that takes the batch at once."""
    pins = {"tp": 1, "pp": 1, "dp": 1, "zero": 0, "microbatch": batch, **pins}
    job = Job.model_validate({"cluster": CLUSTER, "batch": {"sequences": batch, "length": length}, "pins": pins})
    return solve(program, Cluster.load(job.cluster), job)


def stage(program: Program, document: PlanDocument, length: int) -> tuple[nn.Module, str]:
    """The emitted stage with the program's own weights, and its source."""
    static = program.at(batch=document.plan.microbatch, length=length)
    (made,), manifest = emit(static, document.plan)
    kept = {n: sys.modules.get(n) for n in ("collectives", "recompute")}
    sys.modules.update(collectives=collectives, recompute=recompute)
    space: dict[str, Any] = {"__name__": "stage_0"}
    try:
        exec(compile(made.source, "stage_0.py", "exec"), space)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    module = space["Stage"]()
    with torch.no_grad():
        for entry in (*manifest["stages"][0]["parameters"], *manifest["stages"][0]["buffers"]):
            owner, _, attribute = entry["path"].rpartition(".")
            getattr(module.get_submodule(owner), attribute).copy_(program.tensors[entry["name"]])
    return module, made.source
