"""compile(): the whole compiler on one screen, and what the commands do with jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.executable import Executable, page_of
from autopar.plan.plan import PlanDocument
from autopar.spec.job import Batch, Job

if TYPE_CHECKING:
    from torch import nn

    from autopar.cluster.cluster import Cluster
    from autopar.ir.objective import Loss
    from autopar.ir.program import Program
    from autopar.ir.rewrite import Pass

Passes = Iterable["Pass | Mapping[str, Any]"]
FULLY_TRACED = 40
"""Blocks up to which code is emitted from a full trace, which sees a layer that treats itself apart (about 10 s)."""
Cache = dict[Any, tuple["Program", float]]


def trace(model: nn.Module, batch: Any, *, loss: Loss | None = None, full: bool = False) -> Program:
    """The model and its objective as a `Program`. See `autopar.ir.trace.trace`."""
    from autopar.ir.trace import trace as run
    from autopar.models.hosted_experts import experts_routed

    def routed(make: Callable[[], Program]) -> Program:
        with experts_routed(model):
            program = make()
        if (again := program.respecialize) is not None:  # a trace for other sizes is made in the same way
            program.respecialize = lambda of, sizes: routed(lambda: again(of, sizes))
        return program

    return routed(lambda: run(model, batch, loss=loss, full=full))


def rewrite(program: Program, passes: Passes = ()) -> Program:
    """``program`` after ``passes``. See `autopar.ir.rewrite.rewrite`."""
    from autopar.ir.rewrite import rewrite as run

    return run(program, passes)


def compile(
    model: nn.Module,
    cluster_spec: Cluster | str | Path | Mapping[str, Any],
    *,
    batch: Any,
    passes: Passes = (),
    job: Job | Mapping[str, Any] | None = None,
    loss: Loss | None = None,
) -> Executable:
    """Trace, rewrite, plan and lower ``model`` for a cluster.

    ``batch`` is an example of one *global* batch: its first dim counts the sequences of one optimizer step (a job's
    ``batch`` overrides its sizes). ``loss(output, batch)`` returns ``(loss_sum, count)`` or a scalar mean.
    """
    from autopar.cluster.cluster import Cluster
    from autopar.ir.specialize import example_sizes

    job = job if isinstance(job, Job) else Job.model_validate(dict(job or {}))
    cluster = Cluster.load(cluster_spec)
    program = trace(model, batch, loss=loss)
    if job.batch is None:
        sizes = example_sizes(program)
        job = job.model_copy(update={"batch": Batch(sequences=sizes["batch"], length=sizes.get("sequence", 1))})
    program = rewrite(program, [*passes, *job.passes])
    return Executable(program, planned(program, cluster, job), job)


def planned(program: Program, cluster: Cluster, job: Job, trace_seconds: float = 0.0) -> PlanDocument:
    """The best plan for a rewritten program."""
    from autopar.solve.search import solve

    document = solve(program, cluster, job)
    search = document.search.model_copy(update={"trace_seconds": trace_seconds})
    return document.model_copy(update={"search": search})


def load(folder: str | Path) -> Executable:
    """The executable that `Executable.save` or `autopar compile` wrote."""
    return Executable.load(Path(folder))


# ------------------------------------------------------------------ what the commands do with jobs


def program_of(job: Job, cache: Cache | None = None, *, full: bool = False) -> tuple[Program, float]:
    """The rewritten program of a job, traced without weights, and the seconds it took; ``cache`` holds earlier ones."""
    from autopar.models.batch import example_batch
    from autopar.models.load import build
    from autopar.runtime.objectives import example, named
    from autopar.spec.check import check_length, sizes

    assert job.model is not None and job.batch is not None, "check_job runs before"
    cache = {} if cache is None else cache
    inputs = (job.data.objective, job.data.documents)
    key = (job.model.model_dump_json(), job.batch.length, repr(job.passes), repr(inputs), full)
    if key not in cache:
        start = time.perf_counter()
        model = build(job.model, meta=True, seed=job.train.seed)
        positions = sizes(job.model).positions or job.batch.length
        batch = example_batch(model, 2, min(job.batch.length, positions), source=job.model)
        batch = example(job.data, batch, named(model))
        program = rewrite(trace(model, batch, full=full), job.passes)
        cache[key] = program, time.perf_counter() - start
    check_length(job)
    return cache[key]


def plan_job(job: Job, cache: Cache | None = None) -> PlanDocument:
    """The plan of a job. Raises `AutoparError` where the job is wrong or nothing fits."""
    program, seconds = program_of(job, cache)
    return planned(program, cluster_of(job), job, seconds)


def advice(
    job: Job, document: PlanDocument, cache: Cache, why: str | None = None, pins_only: bool = False
) -> dict[str, list[str]]:
    """What would make a job's plan faster, by heading: more of what the cluster has, other pins; with ``why``, what the
    other strategies of a node would cost. See `autopar.solve.advice`."""
    from autopar.plan.why import nodes_of
    from autopar.solve import advice as module

    program, _ = program_of(job, cache)
    cluster = cluster_of(job)
    found: dict[str, list[str]] = {}
    if why is not None:
        for graph, node in nodes_of(document, why):
            name = f"the other strategies of {graph}.{node}"
            found[name] = module.alternatives(program, cluster, job, document, (graph, node))
        return found
    if not pins_only:
        found["what more of it would save"] = module.shadow_prices(program, cluster, job, document)
    pins = module.unpinned(program, cluster, job, document)
    return found | ({"what the pins cost": pins} if pins else {})


def cluster_of(job: Job) -> Cluster:
    from autopar.cluster.cluster import Cluster

    assert job.cluster is not None, "check_job runs before"
    return Cluster.load(job.cluster)


def compile_job(job: Job, folder: str | Path, plan: PlanDocument | None = None) -> Path:
    """Write a job's executable into ``folder``, under ``plan`` or the best one.

    Code is emitted from a trace of every block where that is affordable; planning traces each distinct block once.
    """
    cache: Cache = {}
    program, seconds = program_of(job, cache)
    if len(program.calls()) <= FULLY_TRACED:
        program, seconds = program_of(job, cache, full=True)
    document = plan or planned(program, cluster_of(job), job, seconds)
    return Executable(program, document, job).save(folder)


def verify_job(job: Job, ranks: int | None = None, *, shrink: bool = True) -> dict[str, Any]:
    """Prove a job's executable equal to its model on one process. See `autopar.proof`."""
    from autopar.proof import prove

    return prove(job, ranks, shrink=shrink)


def page(document: PlanDocument, program: Program | None = None) -> str:
    """The plan as one HTML page."""
    return page_of(document, program)
