"""Running micro-batches through the stages: torch's pipeline schedules, or a plain loop when there is one stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class

from autopar.errors import PlanError
from autopar.plan.plan import Plan
from autopar.runtime import zero
from autopar.runtime.manifest import Manifest, StageEntry
from autopar.runtime.sending import Sender
from autopar.runtime.world import World

Microbatch = dict[str, torch.Tensor]


class Runner(Protocol):
    """Forward and backward of all micro-batches. ``scale`` multiplies every micro-batch's ``loss_sum``."""

    def run(self, microbatches: list[Microbatch], scale: float) -> torch.Tensor | None:
        """The scaled loss, summed over the micro-batches; None on ranks that do not have the last stage."""
        ...


class Loop:
    """One stage: forward, backward, next."""

    def __init__(self, entry: StageEntry, module: nn.Module, zero_stage: int):
        self.entry, self.module, self.zero = entry, module, zero_stage

    def run(self, microbatches: list[Microbatch], scale: float) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        for i, inputs in enumerate(microbatches):
            zero.microbatch_flags(self.module, self.zero, i == len(microbatches) - 1)
            loss_sum, _ = self.module(**{k: inputs[k] for k in self.entry.inputs})
            loss = loss_sum * scale
            if loss.requires_grad:
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        return total


class Pipeline:
    """The stages of this rank under one of torch's schedules, with static shapes.

    Uses the schedules' ``_step_microbatches``: their ``step`` would cut the batch by `tensor_split` and glue outputs.
    """

    def __init__(self, stages: list[tuple[int, StageEntry, nn.Module]], plan: Plan, world: World):
        self.scale = 1.0
        self.stages = [_stage(i, e, m, plan, world) for i, e, m in stages]
        kind = get_schedule_class(plan.schedule)
        single = issubclass(kind, PipelineScheduleSingle)
        try:
            self.schedule: Any = kind(
                self.stages[0] if single else self.stages,  # type: ignore[arg-type]
                n_microbatches=plan.microbatches,
                loss_fn=lambda out, _: out[0] * self.scale,
                scale_grads=False,
            )
        except ValueError as error:
            raise PlanError(f"schedule {plan.schedule} refuses the plan: {error}") from None
        assert single or isinstance(self.schedule, PipelineScheduleMulti)
        for stage in self.stages:
            if isinstance(stage, Sender):
                before = plan.rank_of(max(0, stage.stage_index - 1))
                stage.prepare(self.schedule.pipeline_order[before])

    def run(self, microbatches: list[Microbatch], scale: float) -> torch.Tensor | None:
        self.scale = scale
        for stage in self.stages:
            stage.has_backward = self.schedule._has_backward
            stage.clear_runtime_states()
        losses: list[torch.Tensor] = []
        count = len(microbatches)
        self.schedule._step_microbatches([()] * count, microbatches, [None] * count, losses, return_outputs=False)
        for stage in self.stages:
            if isinstance(stage, Sender):
                stage.finish()
        return torch.stack([x.detach() for x in losses]).sum() if losses else None


def check(plan: Plan, manifest: Manifest) -> None:
    """The schedule, the number of stages and ZeRO must go together."""
    pp, virtual, name = plan.mesh.pp, plan.virtual_stages, plan.schedule
    expected = pp * virtual
    if len(plan.stages) != expected or len(manifest.stages) != expected:
        raise PlanError(
            f"pp {pp} × virtual_stages {virtual} needs {expected} stages; "
            f"the plan has {len(plan.stages)}, the build folder {len(manifest.stages)}"
        )
    if pp == 1 and virtual > 1:
        raise PlanError(f"virtual_stages={virtual} needs pp > 1")
    if pp > 1 and virtual > 1 and name in ("1f1b", "gpipe"):
        raise PlanError(f"schedule {name} runs one stage per device, not {virtual}; interleaved1f1b would be right")
    if plan.v_shaped and virtual != 2:
        raise PlanError(f"schedule {name} needs virtual_stages=2; the plan has {virtual}")
    zero.check(plan)


class _Summing(PipelineStage):
    """A stage whose sharded gradients are summed over replicas once, in the backward pass of the last micro-batch.

    Only for hidden FSDP modules: of a bare one torch's stage decides itself. Schedules that work with those run the
    backward passes of a stage in the order of the micro-batches.
    """

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        assert isinstance(self.submod, zero.Hidden) and self.chunks is not None
        zero.sum_over_replicas(self.submod.module, bwd_chunk_id == self.chunks - 1)
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)


class _SummingSender(_Summing, Sender):
    """Both, where a rank has several stages."""


class _Split(Sender):
    """A stage whose backward the schedule runs in two parts, for its inputs and, later, for its weights.

    ``whole``: all of the backward runs as the first part. For its blocks are recomputed, and the second part would recompute
    them for every weight anew; or it trains what does not come from its inputs, which torch's first part does not see or
    its second frees too early. (Stage 0 sends no gradient: torch runs all of its backward as the second.) The
    gradients of inputs are let go when they are sent: torch's first part leaves them on the buffers until the next step.
    """

    whole = False

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, **more: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward or self.whole, **more)
        for received in self.args_recv_info[bwd_chunk_id]:
            if received.buffer is not None:
                received.buffer.grad = None

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.whole:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


class _Contiguous(torch.autograd.Function):
    """Nothing, but the gradient comes out contiguous: sending it to the stage before requires that."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad.contiguous()


def _enter(entry: StageEntry) -> Callable[..., Any]:
    """A pre-hook: of the micro-batch, the stage takes the inputs it reads."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Microbatch) -> tuple[tuple[Any, ...], Microbatch]:
        own = tuple(_Contiguous.apply(a) if a.is_floating_point() and a.requires_grad else a for a in args)
        return own, {k: kwargs[k] for k in entry.inputs}

    return enter


class _NoView(torch.autograd.Function):
    """The same memory as a tensor that is no view: the first part of a split backward detaches what a stage sends in place,
    which views refuse, such as what a stage receives and hands on (torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.new_empty(0).set_(value)  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def _leave(entry: StageEntry, split: bool) -> Callable[..., Any]:
    """A hook: what is sent is contiguous and always a tuple; with ``split`` there are no views."""

    def leave(module: nn.Module, args: tuple[Any, ...], result: Any) -> tuple[torch.Tensor, ...]:
        values = result if isinstance(result, (tuple, list)) else (result,)
        values = [v if v.is_contiguous() else v.contiguous() for v in values]
        return tuple(_NoView.apply(v) if split and v._is_view() else v for v in values)

    return leave


def _stage(index: int, entry: StageEntry, module: nn.Module, plan: Plan, world: World) -> PipelineStage:
    always_grad = plan.splits  # else the weights' part of a stage behind frozen ones would find no gradient
    if plan.zero >= 2 and world.shape.copies > 1:
        module = zero.Hidden(module)
    module.register_forward_pre_hook(_enter(entry), with_kwargs=True, prepend=True)
    last = index == len(plan.stages) - 1
    if not last:
        module.register_forward_hook(_leave(entry, plan.splits))
    loss = (torch.empty((), device=world.device, requires_grad=True), torch.empty((), device=world.device))
    kinds = (Sender, _SummingSender) if plan.schedule not in ("gpipe", "1f1b") else (PipelineStage, _Summing)
    summing = isinstance(module, zero.Hidden) and world.shape.dp_replicate > 1
    made = (_Split if plan.splits else kinds[summing])(
        module,
        index,
        len(plan.stages),
        world.device,
        input_args=tuple(b.meta(world.device, always_grad) for b in entry.receives),
        output_args=loss if last else tuple(b.meta(world.device, always_grad) for b in entry.sends),
        group=world.group("pp"),
    )
    if isinstance(made, _Split):
        made.whole = index > 0 and (entry.beside or any(r != "none" for r in plan.stages[index].recompute))
    return made
