"""ZeRO 0 to 3 along dp and cp, whose devices hold the same parameters: who holds states, and when gradients are summed.

1, 2 and 3 are FSDP2's `fully_shard`; gradients are *summed* (the loss is already divided by the global count). Hybrid:
over a mesh (dp_replicate, dp_shard), state is divided over dp_shard only; gradients are reduce-scattered over dp_shard
when the stage says so, and what is left of them is summed over dp_replicate once a step. 0 is
plain parameters and an all-reduce of each unit's gradients as soon as they are final: torch's `replicate` keeps every
parameter twice (measured with torch 2.13), and does not mix with schedules that split the backward pass.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from autopar.errors import PlanError
from autopar.plan.plan import Plan
from autopar.runtime.manifest import ParameterEntry, StageEntry, dtype_of
from autopar.runtime.world import World

BUCKET = 25 * 2**20  # bytes that are sent together at least, as in torch's DistributedDataParallel
FIRST_BUCKET = 2**20  # of the first ones, so that sending begins early


class Hidden(nn.Module):
    """Hides that its module is an FSDP module from `PipelineStage`, which would otherwise hold all gathered
    parameters and whole gradients until the end of the step, whatever ZeRO stage was asked for (torch 2.13)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor):  # noqa: ANN201 (whatever the module returns)
        return self.module(*args, **kwargs)


def check(plan: Plan) -> None:
    """Schedules that split the backward pass give wrong gradients with parameters that are gathered again."""
    if plan.splits and plan.mesh.copies > 1 and plan.zero > 1:
        raise PlanError(f"schedule {plan.schedule} works with zero=0 and zero=1 only; the plan has zero={plan.zero}")


def shard(module: nn.Module, entry: StageEntry, zero: int, reduce: torch.dtype | None, world: World) -> None:
    """Shard a stage's parameters over ``world.states``, one group per unit and one for the rest.

    Nothing at zero=0 or where no other device holds the same.

    A group is gathered in the dtype that the program reads it in, where it reads all of it in one; ``reduce`` is the dtype
    in which gradients are summed.
    """
    if zero == 0 or world.shape.copies == 1:
        return
    assert world.states is not None
    scalars = {p for p in module.parameters() if p.dim() == 0}  # dim 0 is what FSDP splits; these stay whole
    mesh, reshard = world.states, zero == 3
    for unit, own in grouped(entry):
        policy = MixedPrecisionPolicy(gathered_in(own), reduce, cast_forward_inputs=False)
        target = module.get_submodule(unit)
        fully_shard(target, mesh=mesh, reshard_after_forward=reshard, ignored_params=scalars, mp_policy=policy)
    for part in module.modules():  # neither setter recurses: forgetting one averages silently (torch 2.13)
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    assert isinstance(module, FSDPModule)
    module.set_reduce_scatter_unused_params(True)


def grouped(entry: StageEntry) -> list[tuple[str, list[ParameterEntry]]]:
    """A stage's units and, last, the stage itself (""), each with the parameters that it alone holds."""
    units = [(unit, [p for p in entry.parameters if p.path.startswith(f"{unit}.")]) for unit in entry.units]
    taken = {p.path for _, own in units for p in own}
    return [*units, ("", [p for p in entry.parameters if p.path not in taken])]


def gathered_in(own: list[ParameterEntry]) -> torch.dtype | None:
    """The one dtype in which all parameters of a group are read; None: each is gathered as it is kept."""
    read = {p.read or p.dtype for p in own if p.torch_dtype.is_floating_point}
    return dtype_of(next(iter(read))) if len(read) == 1 else None


def microbatch_flags(module: nn.Module, zero: int, last: bool) -> None:
    """Before a micro-batch, outside pipelines: only the last one waits for all sums; zero=1 reduces once, in that."""
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(last)
        sum_over_replicas(module, last)
        if zero == 1:
            module.set_requires_gradient_sync(last)
            module.set_reshard_after_backward(last)


def sum_over_replicas(module: nn.Module, last: bool) -> None:
    """Before a micro-batch's backward: over dp_replicate its sharded gradients are summed with the last one's only."""
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)


class Bucket:
    """Gradients of one dtype that are sent together. A new one is copied into the common memory and becomes a view of it,
    into which later micro-batches add: so no gradient is held twice."""

    def __init__(self, parameters: list[nn.Parameter], reduce: torch.dtype | None = None):
        self.parameters, self.reduce = parameters, reduce
        self.place = {p: sum(q.numel() for q in parameters[:i]) for i, p in enumerate(parameters)}
        self.start()

    def start(self) -> None:
        """Forget the last step."""
        self.open = set(self.parameters)  # those whose gradients are not final yet
        self.taken: set[nn.Parameter] = set()
        self.flat: torch.Tensor | None = None
        self.sent: torch.Tensor | None = None  # what is summed: ``flat``, or its copy in the sums' dtype
        self.work: dist.Work | None = None

    def take(self, parameter: nn.Parameter) -> None:
        """Put the gradient of ``parameter`` into the common memory; zeros where nothing flowed."""
        if parameter in self.taken:
            return
        if self.flat is None:
            self.flat = parameter.new_empty(sum(p.numel() for p in self.parameters))
        part = self.flat.narrow(0, self.place[parameter], parameter.numel()).view(parameter.shape)
        if parameter.grad is None:
            part.zero_()
        else:
            part.copy_(parameter.grad)
        parameter.grad = part
        self.taken.add(parameter)

    @torch.no_grad()
    def send(self, group: dist.ProcessGroup | None) -> None:
        """Take what is left and begin the sum over the group."""
        for parameter in self.parameters:
            self.take(parameter)
        self.open.clear()
        assert self.flat is not None
        self.sent = self.flat if self.reduce is None else self.flat.to(self.reduce)
        self.work = dist.all_reduce(self.sent, group=group, async_op=True)

    @torch.no_grad()
    def wait(self) -> None:
        """The sum is in the parameters' gradients."""
        assert self.work is not None and self.flat is not None and self.sent is not None
        self.work.wait()
        if self.sent is not self.flat:
            self.flat.copy_(self.sent)
        self.sent = None


class Replicas:
    """Sums the gradients of plain parameters over dp while the last micro-batch's backward goes on.

    A bucket is sent when each of its gradients got a contribution from every micro-batch, and buckets in a fixed
    order, so all ranks issue the same collectives. What is left (split backward passes, unused parameters) `finish`
    sends.
    """

    def __init__(
        self, module: nn.Module, units: tuple[str, ...], microbatches: int, reduce: torch.dtype | None, world: World
    ):
        self.group, self.microbatches = world.copies, microbatches
        targets = [module.get_submodule(u) for u in reversed(units)]  # the backward pass begins at the last unit
        self.buckets = buckets([*targets, module], reduce) if self.group is not None else []
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        for parameter in self.bucket_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self.start()

    def start(self) -> None:
        """Forget the last step."""
        for bucket in self.buckets:
            bucket.start()
        self.seen = dict.fromkeys(self.bucket_of, 0)
        self.next = 0  # of the buckets, the first that is not sent

    @torch.no_grad()
    def _arrived(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self.seen[parameter] += 1
        self.bucket_of[parameter].take(parameter)
        if self.seen[parameter] == self.microbatches:
            self.bucket_of[parameter].open.discard(parameter)
            while self.next < len(self.buckets) and not self.buckets[self.next].open:
                self._send()

    def _send(self) -> None:
        self.buckets[self.next].send(self.group)
        self.next += 1

    def finish(self) -> None:
        """Send what is left and wait for all."""
        while self.next < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            bucket.wait()
        self.start()


def buckets(modules: list[nn.Module], reduce: torch.dtype | None = None) -> list[Bucket]:
    """The whole trainable parameters of modules, in order, each once, in buckets of at least BUCKET bytes (the last:
    fewer; the first: FIRST_BUCKET), apart by dtype."""
    found: list[list[nn.Parameter]] = [[]]
    seen: set[nn.Parameter] = set()
    for module in modules:
        found[-1] += [p for p in module.parameters() if _whole(p) and p not in seen]
        seen.update(found[-1])
        enough = FIRST_BUCKET if len(found) == 1 else BUCKET
        if sum(p.numel() * p.element_size() for p in found[-1]) >= enough:
            found.append([])
    dtypes = [(together, dict.fromkeys(p.dtype for p in together)) for together in found]
    return [Bucket([p for p in together if p.dtype == kind], reduce) for together, kinds in dtypes for kind in kinds]


def _whole(parameter: nn.Parameter) -> bool:
    """Trainable and not sharded by FSDP."""
    return parameter.requires_grad and type(parameter.data) is torch.Tensor
