"""After a run: the machine measured, its plan priced again with that, and the best plan there would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.errors import PlanError
from autopar.spec.cluster import read_cluster
from autopar.spec.quantity import show_seconds
from autopar.spec.source import Source

if TYPE_CHECKING:
    from autopar.plan.plan import Cost, PlanDocument

PARTS = {
    "compute": "compute_seconds",
    "exposed communication": "exposed_communication_seconds",
    "bubble": "bubble_seconds",
    "the optimizer": "optimizer_seconds",
}
WORTH = 0.01  # a plan is worth changing for this share of a step


def recalibrated(folder: Path) -> dict[str, Any]:
    """What a build folder's plan costs on this machine as it is measured now, and the best plan for it.

    ``planned``, ``again`` and ``best`` are the ledgers of the plan as it was made, of the same plan at measured rates,
    and of the best plan at these; ``measured``: the run's own seconds of a step, where it has a summary.
    """
    from autopar.api import program_of
    from autopar.cluster import calibrate
    from autopar.cluster.cluster import Cluster
    from autopar.runtime.folder import BuildFolder
    from autopar.solve.search import evaluate, solve

    read = BuildFolder.read(folder)
    if read.document is None or read.job.model is None:
        raise PlanError(
            f"{folder}: made from a module in Python; compile it again with what `autopar calibrate` writes"
        )
    machine = calibrate.calibrate(read.plan.mesh.devices)
    job = read.job.model_copy(update={"cluster": read_cluster(Source(machine, "calibrate"))})
    program, _ = program_of(job)
    cluster = Cluster.load(machine)
    again, best = evaluate(program, cluster, job, read.plan), solve(program, cluster, job)
    file = folder / "summary.json"
    run = json.loads(file.read_text(encoding="utf-8"))["measured"]["step_seconds"] if file.is_file() else None
    return {"cluster": machine, "measured": run, "planned": read.document, "again": again, "best": best}


def text(found: dict[str, Any]) -> str:
    """`recalibrated` for people."""
    planned, again, best = (found[k] for k in ("planned", "again", "best"))
    lines = [f"{'':24}{'as planned':>14}{'recalibrated':>14}"]
    for name, key in PARTS.items():
        cells = [show_seconds(getattr(document.cost, key)) for document in (planned, again)]
        lines.append(f"{name:24}{cells[0]:>14}{cells[1]:>14}")
    totals = [show_seconds(document.cost.step_seconds) for document in (planned, again)]
    lines.append(f"{'a step':24}{totals[0]:>14}{totals[1]:>14}")
    if found["measured"]:
        lines[-1] += f"   (measured {show_seconds(found['measured'])})"
    lines.append(f"what was most unlike the prediction: {most(planned.cost, again.cost)}")
    return "\n".join([*lines, gain(again, best)])


def most(planned: Cost, again: Cost) -> str:
    return max(PARTS, key=lambda name: abs(getattr(again, PARTS[name]) - getattr(planned, PARTS[name])))


def gain(again: PlanDocument, best: PlanDocument) -> str:
    """What changing the plan would save."""
    share = 1 - best.cost.step_seconds / again.cost.step_seconds
    if share < WORTH:
        return "the plan is still the best one"
    from autopar.plan.diff import changes

    how = ", ".join(changes(again, best)) or "other placements"
    return f"the best plan for this machine would take {show_seconds(best.cost.step_seconds)}, {share:.0%} less: {how}"
