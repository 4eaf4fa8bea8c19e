"""What tests of kernels share: where a kernel runs, drawing operands, comparing with a float64 reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.kernels import interpreted

EXACT = 1e-12
"""In float64 a kernel differs from the reference by the order of its sums alone."""
HALF = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""In other dtypes by the rounding of the result (bfloat16 has 8 bits) and of products in between."""

PRODUCTS = {k: v for k, v in HALF.items() if k != torch.bfloat16}
"""The same for kernels with matrix products: Triton's interpreter has none of bfloat16."""

everywhere = pytest.mark.parametrize("where", ["reference", "triton"])


def running(where: str) -> contextlib.AbstractContextManager[None]:
    return interpreted() if where == "triton" else contextlib.nullcontext()


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, in float64."""
    assert a.shape == b.shape, f"{tuple(a.shape)}, not {tuple(b.shape)}"
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def compared(
    run: Callable[..., Any],
    exact: Callable[..., Any],
    operands: Sequence[Tensor],
    where: str,
    flows: Sequence[bool] | None = None,
) -> list[float]:
    """Relative errors of a kernel's results and of the gradients of its operands, against ``exact`` in float64."""
    flows = [True] * len(operands) if flows is None else flows
    ours = [x.detach().clone().requires_grad_(f) for x, f in zip(operands, flows, strict=True)]
    theirs = [x.detach().double().requires_grad_(f) if f else x.detach() for x, f in zip(operands, flows, strict=True)]
    theirs = [t.double() if t.is_floating_point() else t for t in theirs]
    want = results(exact(*theirs))
    grads = [draw(*w.shape, seed=100 + i) for i, w in enumerate(want)]
    with running(where):
        have = results(run(*ours))
        mine = torch.autograd.grad(
            have, [x for x in ours if x.requires_grad], [g.to(h.dtype) for g, h in zip(grads, have, strict=True)]
        )
    wanted = torch.autograd.grad(want, [x for x in theirs if x.requires_grad], grads)
    assert all(m.dtype == x.dtype for m, x in zip(mine, [x for x in ours if x.requires_grad], strict=True))
    return [error(a, b) for a, b in zip((*have, *mine), (*want, *wanted), strict=True)]


def results(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]
