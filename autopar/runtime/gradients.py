"""What remains to be done to gradients after the schedule: sums over tp and over tied copies, the global norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from autopar.errors import PlanError
from autopar.plan.plan import Plan
from autopar.runtime.manifest import Manifest
from autopar.runtime.parameters import Held, copies
from autopar.runtime.world import World

EPSILON = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


class Sums:
    """The sums that a step needs, planned once; running them is collective over the whole mesh."""

    def __init__(self, held: list[Held], manifest: Manifest, plan: Plan, world: World):
        self.world = world
        self.partial = [h for h in held if h.entry.partial_gradient and h.entry.trainable and world.shape.tp > 1]
        self.tied: list[tuple[list[Held], tuple[int, ...]]] = []
        for name, where in copies(manifest):
            if len({e.placement for _, e in where}) > 1:
                raise PlanError(
                    f"{name} is tied but placed differently: {', '.join(sorted({e.placement for _, e in where}))}"
                )
            ranks = tuple(sorted({plan.rank_of(stage) for stage, _ in where}))
            if len(ranks) > 1:
                world.team(ranks)
            if any(e.trainable for _, e in where):
                self.tied.append(([h for h in held if h.name == name], ranks))

    def run(self) -> None:
        if self.partial:
            all_reduce([_grad(h) for h in self.partial], self.world.group("tp"))
        for mine, ranks in self.tied:
            if mine:
                grads = [_grad(h) for h in mine]
                total = grads[0].clone() if len(grads) == 1 else torch.stack(grads).sum(0)
                if len(ranks) > 1:
                    dist.all_reduce(total, group=self.world.team(ranks))
                for grad in grads:
                    grad.copy_(total)


def _grad(held: Held) -> torch.Tensor:
    """The local gradient; zeros where nothing flowed, so that all ranks take part in a sum."""
    if held.parameter.grad is None:
        held.parameter.grad = torch.zeros_like(held.parameter)
    grad = held.grad
    assert grad is not None
    return grad


def all_reduce(tensors: list[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum every tensor over the group in place, with one collective for each dtype."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def norm(held: Iterable[Held], world: World) -> float:
    """The L2 norm of the whole model's gradient: every element counted once, on the rank that owns it."""
    grads = [g for h in held if h.owned and (g := h.grad) is not None]
    norms = torch.stack([n.double() for n in torch._foreach_norm(grads)]) if grads else torch.zeros(1)  # type: ignore[attr-defined]
    return world.sum(float(norms.square().sum()))[0] ** 0.5


@torch.no_grad()
def clip(held: list[Held], largest: float, total: float) -> None:
    """Scale all gradients so that their global norm is at most ``largest`` (torch's formula)."""
    factor = largest / (total + EPSILON)
    grads = [g for h in held if (g := h.grad) is not None]
    if factor < 1 and grads:
        torch._foreach_mul_(grads, factor)  # type: ignore[attr-defined]
