"""AdamW and SGD on this rank's local shards, and the learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from autopar.runtime.manifest import dtype_of
from autopar.runtime.parameters import Held
from autopar.spec.job import Optimizer as Options

State = dict[str, torch.Tensor]  # of one parameter: its moments and its step


class Optimizer:
    """torch's own functional AdamW or SGD. Moments are kept in ``options.state``'s dtype, by parameter name.

    Works on plain local tensors: each element lives on one rank or is updated equally on several, so no collective and
    no DTensor is needed. Where the moments' dtype is not the parameter's, the update is computed in the moments' dtype.
    """

    def __init__(self, held: list[Held], options: Options, steps: int = 0):
        self.options, self.steps = options, steps
        self.held = [h for h in held if h.entry.trainable]
        self.updates = 0  # optimizer steps done; the learning rate follows it
        dtype = dtype_of(options.state)
        self.state: list[State] = []
        for h in self.held:
            moments = [torch.zeros_like(h.local, dtype=dtype) for _ in self.moments]
            self.state.append(
                dict(zip(self.moments, moments, strict=True)) | {"step": torch.zeros((), device=h.local.device)}
            )

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the state tensors that have the parameter's shape."""
        if self.options.name == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.options.momentum else ()

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        lr, dtype = rate(self.options, self.updates, self.steps), dtype_of(self.options.state)
        ready = [(h.local, g, s) for h, s in zip(self.held, self.state, strict=True) if (g := h.grad) is not None]
        by_dtype: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor, State]]] = {}
        for item in ready:
            by_dtype.setdefault(item[0].dtype, []).append(item)
        for kind, same in by_dtype.items():
            if kind == dtype or not self.moments:
                params, grads, states = (list(part) for part in zip(*same, strict=True))
                self._update(params, grads, states, lr)
                continue
            for local, grad, state in same:  # one by one: only one copy in the moments' dtype at a time
                work = local.to(dtype)
                self._update([work], [grad.to(dtype)], [state], lr)
                local.copy_(work)
        self.updates += 1

    def _update(self, params: list[torch.Tensor], grads: list[torch.Tensor], states: list[State], lr: float) -> None:
        o = self.options
        fused = all(p.is_floating_point() for p in params)
        if o.name == "adamw":
            first, second = ([s[m] for s in states] for m in self.moments)
            adamw(
                params, grads, first, second, [], [s["step"] for s in states],
                foreach=False, fused=fused, amsgrad=False, beta1=o.betas[0], beta2=o.betas[1],
                lr=lr, weight_decay=o.weight_decay, eps=o.eps, maximize=False,
            )  # fmt: skip
            return
        buffers: list[torch.Tensor | None] = [s.get("momentum_buffer") for s in states]
        sgd(
            params, grads, buffers, foreach=False, fused=fused, weight_decay=o.weight_decay,
            momentum=o.momentum, lr=lr, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        for state in states:
            state["step"] += 1


def rate(options: Options, update: int, steps: int) -> float:
    """The learning rate of update ``update`` (0 is the first) of ``steps``.

    Warm-up rises linearly to ``lr``, reached at update ``warmup``; linear and cosine then fall to ``lr × final``,
    reached at the last update.
    """
    if update < options.warmup:
        return options.lr * (update + 1) / (options.warmup + 1)
    if options.schedule == "constant" or steps <= options.warmup + 1:
        return options.lr
    done = min(1.0, (update - options.warmup) / (steps - 1 - options.warmup))
    share = 1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return options.lr * (options.final + (1 - options.final) * share)
