"""Fused AdamW against torch's own."""

from __future__ import annotations

import pytest
import torch

from autopar import kernels
from autopar.errors import KernelError
from tests.kernels.checks import draw, error, everywhere, running

OPTIONS = {"lr": 3e-2, "weight_decay": 0.1, "eps": 1e-8}


@everywhere
@pytest.mark.parametrize("shape", [(1,), (7, 301)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_three_steps_are_torchs(where: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    theirs = torch.nn.Parameter(draw(*shape, dtype=dtype))
    optimizer = torch.optim.AdamW([theirs], betas=(0.8, 0.95), foreach=False, **OPTIONS)
    ours, first, second = draw(*shape, dtype=dtype), *(torch.zeros(shape, dtype=dtype) for _ in range(2))
    for step in (1, 2, 3):
        grad = draw(*shape, seed=step, dtype=dtype)
        theirs.grad = grad
        optimizer.step()
        with running(where):
            kernels.adamw_(ours, grad, first, second, step, beta1=0.8, beta2=0.95, **OPTIONS)
    assert error(ours, theirs) < (1e-13 if dtype == torch.float64 else 1e-6)
    assert error(second, optimizer.state[theirs]["exp_avg_sq"]) < (1e-13 if dtype == torch.float64 else 1e-6)


@everywhere
def test_a_half_precision_copy_is_written_along_and_gradients_are_scaled(where: str) -> None:
    made = []
    for scale in (1.0, 0.25):
        master, first, second = draw(40, dtype=torch.float32), torch.zeros(40), torch.zeros(40)
        copy, grad = torch.zeros(40, dtype=torch.float16), (draw(40) / scale).to(torch.float16)
        with running(where):
            kernels.adamw_(master, grad, first, second, 1, 0.1, scale=scale, copy=copy)
        assert torch.equal(copy, master.to(torch.float16))
        made.append(master)
    assert torch.allclose(made[0], made[1]) and not torch.equal(made[0], draw(40, dtype=torch.float32))


def test_moments_of_another_shape_are_refused() -> None:
    with pytest.raises(KernelError, match="one shape and lie contiguous"):
        kernels.adamw_(draw(4), draw(4), draw(5), draw(4), 1, 0.1)
