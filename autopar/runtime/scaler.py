"""Dynamic loss scaling: gradients of a float16 step are kept within float16's range, and steps that overflow are skipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from autopar.runtime.parameters import Held
from autopar.runtime.world import World

FIRST, GROWTH, BACKOFF, PATIENCE = 2.0**16, 2.0, 0.5, 2000  # torch.amp.GradScaler's defaults


@dataclass
class LossScale:
    """What the loss is multiplied by before the backward pass, as in `torch.amp.GradScaler`: halved when a gradient
    overflowed (that update is skipped), doubled after ``patience`` updates without. The same on all ranks.

    ``quiet``: updates since the scale changed. ``skipped``: updates skipped in the whole run.
    """

    value: float = FIRST
    patience: int = PATIENCE
    quiet: int = 0
    skipped: int = 0

    def update(self, finite: bool) -> None:
        """Note whether a step's gradients were finite, on all ranks and stages."""
        if not finite:
            self.value, self.quiet, self.skipped = self.value * BACKOFF, 0, self.skipped + 1
            return
        self.quiet += 1
        if self.quiet == self.patience:
            self.value, self.quiet = self.value * GROWTH, 0

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@torch.no_grad()
def unscale(held: list[Held], scale: float, world: World) -> bool:
    """Divide every gradient by ``scale``; whether all of them are finite, agreed over all ranks. Collective."""
    grads = [g for h in held if (g := h.grad) is not None]
    if grads:
        torch._foreach_mul_(grads, 1.0 / scale)  # type: ignore[attr-defined]
    bad = sum(float(not bool(torch.isfinite(g).all())) for g in grads)
    return world.sum(bad)[0] == 0
