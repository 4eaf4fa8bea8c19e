"""Our prediction of a published run: the plan of its pinned job, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import fx

from autopar.api import Cache, cluster_of, plan_job, program_of
from autopar.cost.operators import is_attention, is_product
from autopar.cost.regions import Measure, Region
from autopar.plan.plan import PlanDocument
from autopar.solve.prepare import Source
from autopar.solve.search import evaluate, prepared
from autopar.spec.job import Job
from tests.validation.megatron import kernels_of_megatron, placed_by_hand

_TRACED: dict[str, Cache] = {}
"""By the code that ran: what a program remembers is of one kind of run."""
RUNS: dict[str, tuple[Callable[[], AbstractContextManager[None]], ...]] = {
    "": (),
    "torchtitan": (placed_by_hand,),
    "megatron": (placed_by_hand, kernels_of_megatron),
}


@contextmanager
def as_ran(code: str) -> Iterator[Cache]:
    """Prices what a codebase does where a plan of ours would do it otherwise: see `megatron`."""
    with ExitStack() as stack:
        for each in RUNS[code]:
            stack.enter_context(each())
        yield _TRACED.setdefault(code, {})


def predict(job: dict[str, Any], share: float = 0.0, code: str = "") -> PlanDocument:
    """The plan of a job; ``share``: of the blocks that are recomputed whole, evenly, if it is neither none nor all."""
    with as_ran(code) as cache:
        read = Job.model_validate(job)
        document = plan_job(read, cache)
        if not 0 < share < 1:
            return document
        stages = tuple(
            stage.model_copy(update={"recompute": spread(share, len(stage.recompute))})
            for stage in document.plan.stages
        )
        plan = document.plan.model_copy(update={"stages": stages})
        return evaluate(program_of(read, cache)[0], cluster_of(read), read, plan)


def spread(share: float, blocks: int) -> tuple[Any, ...]:
    return tuple("full" if int((i + 1) * share) > int(i * share) else "none" for i in range(blocks))


def blocks(job: dict[str, Any], cache: Cache) -> list[Measure]:
    """The measured block of a job whose tp and micro-batch are pinned, under each assignment that a plan may take."""
    read = Job.model_validate(job)
    source: Source = prepared(program_of(read, cache)[0], cluster_of(read), read)[0]
    tp, batch = read.pins.tp or 1, read.pins.microbatch or 1
    static = source.static(batch)
    name, graph = next(iter(static.blocks.items()))
    found = [source.assignment(tp, variant) for variant in source.variants(tp)]
    return [Measure(static, name, list(graph.nodes), assignment, source.prices(tp)) for assignment in found]


def layer_seconds(job: dict[str, Any], mode: int) -> tuple[float, float]:
    """Forward and backward of one block of Megatron, collectives and what is recomputed (none, selective, full: 0, 1, 2)
    with it."""
    with as_ran("megatron") as cache:
        return min((seconds(measured.region(), mode) for measured in blocks(job, cache)), key=sum)


def seconds(r: Region, mode: int) -> tuple[float, float]:
    backward = r.backward_input + r.backward_weight + r.backward_talk + r.again[mode] + r.again_talk[mode]
    return r.forward + r.forward_talk, backward


def peak_of_every_second_product(job: dict[str, Any]) -> float:
    """Bytes at the peak where a block keeps its input, the results of every second of its products, the first included,
    and of attention with its statistics, and recomputes all else (torchtitan's selective recompute of operators).

    ``job`` recomputes whole blocks; what is kept beside is added to it.
    """
    document, measured = predict(job), blocks(job, _TRACED[""])[0]
    kept, products = 0.0, 0
    for node in measured.nodes:
        if is_attention(node):
            kept += held(measured, node) + 4.0 * node.meta["val"].numel() / node.meta["val"].shape[-1]
        elif is_product(node):
            kept += held(measured, node) if products % 2 == 0 else 0.0
            products += 1
    return document.cost.peak_bytes + kept * sum(len(stage.recompute) for stage in document.plan.stages)


def held(measured: Measure, node: fx.Node) -> float:
    return measured.bytes((node, 0), measured.at((node, 0)))
