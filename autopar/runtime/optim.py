"""AdamW and SGD on this rank's local shards, and the learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from autopar.errors import PlanError
from autopar.runtime.manifest import dtype_of
from autopar.runtime.parameters import Held
from autopar.runtime.rounding import round_into
from autopar.spec.job import Optimizer as Options

State = dict[str, torch.Tensor]  # of one parameter: its moments and its step


class Optimizer:
    """torch's own functional AdamW or SGD. Moments are kept in ``options.state``'s dtype, by parameter name.

    Works on plain local tensors: each element lives on one rank or is updated equally on several, so no collective and
    no DTensor is needed. Where the moments' dtype is not the parameter's, the update is computed in the moments' dtype;
    it is rounded to the nearest number the parameter can hold, or stochastically (``seed`` says how).
    """

    def __init__(self, held: list[Held], options: Options, steps: int = 0, seed: int = 0):
        self.options, self.steps, self.seed = options, steps, seed
        self.held = [h for h in held if h.entry.trainable]
        _check_rounding(options, self.held)
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
        ready = [(h, g, s) for h, s in zip(self.held, self.state, strict=True) if (g := h.grad) is not None]
        by_dtype: dict[torch.dtype, list[tuple[Held, torch.Tensor, State]]] = {}
        for item in ready:
            by_dtype.setdefault(item[0].local.dtype, []).append(item)
        for kind, same in by_dtype.items():
            stochastic = self.options.rounding == "stochastic" and kind == torch.bfloat16
            if (kind == dtype or not self.moments) and not stochastic:
                holders, grads, states = (list(part) for part in zip(*same, strict=True))
                self._update([h.local for h in holders], grads, states, lr)
                continue
            for held, grad, state in same:  # one by one: only one copy in the moments' dtype at a time
                work = held.local.to(dtype)
                self._update([work], [grad.to(dtype)], [state], lr)
                if stochastic:
                    round_into(held, work, self.seed, self.updates)
                else:
                    held.local.copy_(work)
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


def _check_rounding(options: Options, held: list[Held]) -> None:
    kinds = {h.local.dtype for h in held}
    if options.rounding == "stochastic" and held and torch.bfloat16 not in kinds:
        named = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
        raise PlanError(
            f"optimizer.rounding: stochastic rounding is for parameters kept in bfloat16; these are {named} "
            "(passes: mixed_precision: {master: bfloat16} would keep them so)"
        )


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
