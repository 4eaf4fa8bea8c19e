"""ZeRO 0 to 3 along dp: who holds parameters, gradients and optimizer state, and when gradients are summed.

1, 2 and 3 are FSDP2's `fully_shard`; gradients are *summed* (the loss is already divided by the global count). 0 is
plain parameters and an all-reduce of each unit's gradients as soon as they are final: torch's `replicate` keeps every
parameter twice (measured with torch 2.13), and does not mix with schedules that split the backward pass.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from autopar.errors import PlanError
from autopar.runtime.world import World

BUCKET = 25 * 2**20  # bytes that are sent together at least, as in torch's DistributedDataParallel
FIRST_BUCKET = 2**20  # of the first ones, so that sending begins early
SPLIT_BACKWARD = {"interleavedzerobubble", "zbvzerobubble", "dualpipev"}


class Hidden(nn.Module):
    """Hides that its module is an FSDP module from `PipelineStage`, which would otherwise hold all gathered
    parameters and whole gradients until the end of the step, whatever ZeRO stage was asked for (torch 2.13)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor):  # noqa: ANN201 (whatever the module returns)
        return self.module(*args, **kwargs)


def check(zero: int, schedule: str, pipelined: bool) -> None:
    """Schedules that split the backward pass give wrong gradients with parameters that are gathered again."""
    if pipelined and schedule in SPLIT_BACKWARD and zero > 1:
        raise PlanError(f"schedule {schedule} works with zero=0 and zero=1 only; the plan has zero={zero}")


def shard(module: nn.Module, units: tuple[str, ...], zero: int, world: World) -> None:
    """Shard a stage's parameters along dp, one group per unit and one for the rest. Nothing at zero=0 or dp=1."""
    if zero == 0 or world.shape.dp == 1:
        return
    assert world.mesh is not None
    scalars = {p for p in module.parameters() if p.dim() == 0}  # dim 0 is what FSDP splits; these stay whole
    mesh, reshard = world.mesh["dp"], zero == 3
    for target in [*(module.get_submodule(u) for u in units), module]:
        fully_shard(target, mesh=mesh, reshard_after_forward=reshard, ignored_params=scalars)
    for part in module.modules():  # neither setter recurses: forgetting one averages silently (torch 2.13)
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    assert isinstance(module, FSDPModule)
    module.set_reduce_scatter_unused_params(True)


def microbatch_flags(module: nn.Module, zero: int, last: bool) -> None:
    """Before a micro-batch, outside pipelines: only the last one waits for all sums; zero=1 reduces once, in that."""
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(last)
        if zero == 1:
            module.set_requires_gradient_sync(last)
            module.set_reshard_after_backward(last)


class Replicas:
    """Sums the gradients of plain parameters over dp while the last micro-batch's backward goes on.

    A bucket is sent when each of its gradients got a contribution from every micro-batch, and buckets in a fixed
    order, so all ranks issue the same collectives. What is left (split backward passes, unused parameters) `finish`
    sends.
    """

    def __init__(self, module: nn.Module, units: tuple[str, ...], microbatches: int, world: World):
        self.group, self.microbatches = world.group("dp"), microbatches
        targets = [module.get_submodule(u) for u in reversed(units)]  # the backward pass begins at the last unit
        self.buckets = buckets([*targets, module]) if self.group is not None else []
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        for parameter in self.bucket_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self.start()

    def start(self) -> None:
        """Forget the last step."""
        self.seen = dict.fromkeys(self.bucket_of, 0)
        self.open = [len(b) for b in self.buckets]  # parameters of each bucket whose gradients are not final yet
        self.sent: list[tuple[list[nn.Parameter], torch.Tensor, dist.Work]] = []
        self.next = 0

    def _arrived(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self.seen[parameter] += 1
        if self.seen[parameter] == self.microbatches:
            self.open[self.bucket_of[parameter]] -= 1
            while self.next < len(self.buckets) and self.open[self.next] == 0:
                self._send()

    def _send(self) -> None:
        for p in self.buckets[self.next]:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in self.buckets[self.next]:
            by_dtype.setdefault(p.dtype, []).append(p)
        for parameters in by_dtype.values():
            grads = [p.grad.reshape(-1) for p in parameters if p.grad is not None]
            flat = grads[0] if len(grads) == 1 else torch.cat(grads)
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            assert work is not None
            self.sent.append((parameters, flat, work))
        self.next += 1

    def finish(self) -> None:
        """Send what is left and wait for all; the gradients are then parts of what was sent together."""
        while self.next < len(self.buckets):
            self._send()
        for parameters, flat, work in self.sent:
            work.wait()
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)
        self.start()


def buckets(modules: list[nn.Module]) -> list[list[nn.Parameter]]:
    """The whole trainable parameters of modules, in order, each once, in lists of at least BUCKET bytes (the last: fewer;
    the first: FIRST_BUCKET)."""
    found: list[list[nn.Parameter]] = [[]]
    seen: set[nn.Parameter] = set()
    for module in modules:
        found[-1] += [p for p in module.parameters() if _whole(p) and p not in seen]
        seen.update(found[-1])
        enough = FIRST_BUCKET if len(found) == 1 else BUCKET
        if sum(p.numel() * p.element_size() for p in found[-1]) >= enough:
            found.append([])
    return [bucket for bucket in found if bucket]


def _whole(parameter: nn.Parameter) -> bool:
    """Trainable and not sharded by FSDP."""
    return parameter.requires_grad and type(parameter.data) is torch.Tensor
