"""verify: the emitted executable equals the unmodified model on one process. Loss, every gradient, every parameter."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autopar.cluster.cluster import Cluster
from autopar.emulate import everywhere, local_cluster
from autopar.errors import AutoparError, PlanError
from autopar.ir.objective import IGNORED, Loss, Objective
from autopar.ir.promote import Promoted
from autopar.ir.raised import lowered, raised
from autopar.spec.job import Batch, Job, Optimizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autopar.ir.program import Program
    from autopar.plan.plan import Plan, PlanDocument

STEPS = 2
TOLERANCE = 1e-9
"""Largest relative error, in float64, at which two runs are equal: rounding of another order of sums, nothing else."""
FLOOR = 1e-6
"""A tensor's error is measured against its norm, or this share of the norm over all tensors: a gradient that is zero in
exact arithmetic has no relative error of its own."""


@dataclass
class Run:
    """What a run computed: the loss of every step, the first step's gradients, the parameters after the last."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


def prove(job: Job, ranks: int | None = None, *, shrink: bool = True) -> dict[str, Any]:
    """Run a job's executable on local processes, in float64, against the model on one process.

    ``shrink`` makes the model and the batch small; otherwise they are taken as the job has them. Returns the contract's
    proof: errors of loss, gradients and parameters, the worst tensor, and whether all are below 1e-9.
    """
    from autopar.models.batch import example_batch
    from autopar.models.load import build
    from autopar.models.shrink import shrink as smaller
    from autopar.runtime.objectives import example, named

    assert job.model is not None and job.batch is not None, "check_job runs before"
    origin = smaller(job.model) if shrink else job.model
    model = build(origin, meta=False, dtype=torch.float64, seed=job.train.seed)
    cluster = local_cluster(job, ranks)
    local = Cluster.load(cluster)
    spread = everywhere(job.pins, local)
    for_pins = job.model_copy(update={"pins": spread})
    batch_size = batch_of(for_pins, local.devices) if shrink else job.batch
    job = job.model_copy(update={"model": origin, "cluster": cluster, "batch": batch_size})
    assert job.batch is not None
    batch = example_batch(model, job.batch.sequences, job.batch.length, source=origin)
    batch = ignoring(example(job.data, batch, named(model)))
    if spread != job.pins:
        try:
            return prove_module(model, batch, job.model_copy(update={"pins": spread}))
        except PlanError as why:  # a model that no pipeline can be cut from, or that the batch is no multiple for
            return prove_module(model, batch, job) | {"note": f"not proved on every group of hosts: {why}"}
    return prove_module(model, batch, job)


def prove_module(
    model: nn.Module, batch: Mapping[str, torch.Tensor], job: Job, *, loss: Loss | None = None, plan: Plan | None = None
) -> dict[str, Any]:
    """`prove` for a module at hand (moved to float64) on ``job.cluster``, under ``plan`` or the best one."""
    from autopar.api import planned, rewrite, trace
    from autopar.models.hosted_experts import experts_by

    model = model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with float64():
        traced = trace(model, batch, loss=loss)
        program = rewrite(traced, job.passes)
        if lowered(program):
            program = raised(program, traced)
        document = planned(program, Cluster.load(job.cluster), job) if plan is None else document_of(plan)
        with experts_by(model):
            reference = one_process(program, model, batch, job, loss)
        found = executed(program, document, batch, job)
    return proof(reference, found, document.plan, job.optimizer.lr)


@contextmanager
def float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Promoted():
            yield
    finally:
        torch.set_default_dtype(default)


def batch_of(job: Job, devices: int) -> Batch:
    """A small batch that the pins go with: at least 8 sequences, whole micro-batches for each replica, at least two of
    them and as many as every schedule of the pipeline takes."""
    assert job.batch is not None
    pins = job.pins
    each = 2 if pins.schedule == "dualpipev" else 1  # stages of a device, each of which has a micro-batch at least
    stages = (pins.pp or 1) * each
    alone = pins.tp is not None and pins.pp is not None  # then replicas are all that is left
    replicas = pins.dp or (max(1, devices // (pins.tp * (pins.pp or 1) * (pins.cp or 1))) if alone and pins.tp else 1)
    once = replicas * (pins.microbatch or 1) * stages
    chunks = 2 * (pins.cp or 1)  # of a sequence, in zigzag order
    length = max(16 // chunks, 1) * chunks
    return Batch(sequences=once * max(-(-8 // once), -(-2 // stages)), length=min(job.batch.length, length))


def ignoring(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels with some ignored, unevenly over sequences: what a wrong mean would trip over."""
    labels = batch.get("labels")
    if labels is None or labels.dim() != 2:
        return batch
    labels = labels.clone()
    for i, row in enumerate(labels):
        row[: (3 * i) % max(1, row.numel() - 2)] = IGNORED
    return {**batch, "labels": labels}


def document_of(plan: Plan) -> PlanDocument:
    """A plan given by hand, without costs."""
    from autopar.plan.plan import Bytes, Cost, ModelFacts, PlanDocument, Search

    cost = Cost(step_seconds=0, compute_seconds=0, exposed_communication_seconds=0, bubble_seconds=0, optimizer_seconds=0,
                tokens_per_second=0, mfu=0, peak_bytes=0, bytes=Bytes())  # fmt: skip
    search = Search(seconds=0, trace_seconds=0, status="given", objective=0, bound=0, gap=0, candidates=1)
    facts = ModelFacts(parameters=0, trainable_parameters=0, flops_per_token=0)
    return PlanDocument(model=facts, plan=plan, cost=cost, search=search)


# ------------------------------------------------------------------ one process


def one_process(
    program: Program, model: nn.Module, batch: Mapping[str, torch.Tensor], job: Job, loss: Loss | None
) -> Run:
    """The unmodified model, eager; a program that passes changed (other parameters, or others frozen) runs as itself."""
    trains = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    changed = trains != {n: p.trainable for n, p in program.parameters.items()}
    module: nn.Module = program.module() if changed else Objective(model, loss)
    prefix = "" if changed else "model."
    values = {n: t.detach().clone() for n, t in module.state_dict(keep_vars=True).items()}
    training = module.training
    module.train()
    try:
        return eager(module, prefix, batch, job)
    finally:
        module.train(training)
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                tensor.copy_(values[name])
                tensor.grad = None


def eager(module: nn.Module, prefix: str, batch: Mapping[str, torch.Tensor], job: Job) -> Run:
    from autopar.runtime.optim import rate

    named = {n.removeprefix(prefix): p for n, p in module.named_parameters(remove_duplicate=False)}
    trained = {n: p for n, p in named.items() if p.requires_grad}
    distinct = list({id(p): p for p in trained.values()}.values())  # a tied parameter is one, under all its names
    optimizer = reference_optimizer(job.optimizer, distinct)
    losses, gradients = [], {}
    for step in range(STEPS):
        total, count = module(dict(batch)) if prefix else module(**batch)
        (total / count).backward()
        losses.append(float(total.detach() / count))
        if step == 0:
            gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
        if job.train.clip is not None:
            torch.nn.utils.clip_grad_norm_(distinct, job.train.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(job.optimizer, step, job.train.steps)
        optimizer.step()
        optimizer.zero_grad()
    return Run(losses, gradients, {n: p.detach().clone() for n, p in named.items()})


def reference_optimizer(options: Optimizer, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """torch's own optimizer."""
    if options.name == "sgd":
        return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )


# ------------------------------------------------------------------ the executable


def executed(program: Program, document: PlanDocument, batch: Mapping[str, torch.Tensor], job: Job) -> Run:
    """The emitted executable on as many local processes as the plan has devices."""
    from safetensors.torch import save_file

    from autopar.lower.build import build
    from autopar.runtime.spawn import spawn

    static = program.at(batch=document.plan.microbatch, length=job.batch.length if job.batch else None)
    tensors = {n: program.tensors[n].detach().contiguous().clone() for n in program.read()}
    with tempfile.TemporaryDirectory(prefix="autopar-verify-") as name:
        folder = Path(name) / "build"
        folder.mkdir()
        save_file(tensors, folder / "weights.safetensors")
        save_file({k: v.contiguous() for k, v in batch.items()}, folder / "batch.safetensors")
        slim = job.model_copy(update={"optimizer": in_float64(job.optimizer), "model": None, "passes": ()})
        build(static, document, folder, job=slim.dump(), weights=[{"files": "weights.safetensors"}])
        results = spawn(rank_run, document.plan.mesh.devices, str(folder), timeout=280.0)
    if any(r[0] != results[0][0] for r in results):
        raise PlanError(f"ranks disagree about the loss: {[r[0] for r in results]}")
    return Run(*results[0])


def in_float64(options: Optimizer) -> Optimizer:
    return options.model_copy(update={"state": "float64", "rounding": "nearest"})


def rank_run(folder: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two steps of one rank of the build folder."""
    from safetensors.torch import load_file

    from autopar.runtime.engine import Engine

    torch.set_default_dtype(torch.float64)
    engine = Engine(folder)
    batch = load_file(f"{folder}/batch.safetensors")
    losses, gradients = [], {}
    for step in range(STEPS):
        losses.append(engine.accumulate(batch))
        if step == 0:
            gradients = engine.gradients()
        engine.apply()
    return losses, gradients, engine.state_dict()


# ------------------------------------------------------------------ comparison


def proof(reference: Run, found: Run, plan: Plan, lr: float) -> dict[str, Any]:
    loss = max(abs(a - b) / abs(b) for a, b in zip(found.losses, reference.losses, strict=True))
    gradient, worst_gradient = distance(found.gradients, reference.gradients)
    parameter, worst_parameter = distance(found.parameters, reference.parameters, lr)
    errors = {"loss_error": loss, "gradient_error": gradient, "parameter_error": parameter}
    return {
        "ranks": plan.mesh.devices,
        "plan": plan.model_dump(mode="json", exclude={"choices": True, "placements": True, "context": {"choices"}}),
        **errors,
        "worst": worst_gradient if gradient >= parameter else worst_parameter,
        "steps": STEPS,
        "equal": all(e < TOLERANCE for e in errors.values()),
    }


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], lr: float = 0.0) -> tuple[float, str]:
    """The largest relative error over all tensors (inf where one is missing), and its tensor.

    ``lr``: AdamW moves an element whose gradient is zero in exact arithmetic by rounding noise over its eps; parameters
    are therefore measured against no less than one such step, lr · √elements.
    """
    missing = [n for n in wanted if n not in found]
    if missing:
        return float("inf"), missing[0]
    whole = sum(float(t.double().square().sum()) for t in wanted.values()) ** 0.5
    worst, name = 0.0, next(iter(wanted), "")
    for key, b in wanted.items():
        a = found[key]
        if a.shape != b.shape:
            raise AutoparError(f"{key} has shape {tuple(a.shape)} on several ranks, {tuple(b.shape)} on one")
        scale = max(float(b.double().norm()), FLOOR * whole, lr * b.numel() ** 0.5, 1e-300)
        error = float((a.double() - b.double()).norm()) / scale
        if not error <= worst:
            worst, name = error, key
    return worst, name
