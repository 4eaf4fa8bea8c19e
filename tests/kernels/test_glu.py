"""Gated linear units against torch's activations in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autopar import kernels
from autopar.errors import KernelError
from tests.kernels.checks import EXACT, HALF, compared, draw, everywhere

EXACTLY = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


@everywhere
@pytest.mark.parametrize("activation", EXACTLY)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 77)], ids=str)
def test_values_and_gradients(where: str, activation: str, shape: tuple[int, ...]) -> None:
    made = compared(
        lambda gate, up: kernels.glu(gate, up, activation),
        lambda gate, up: EXACTLY[activation](gate) * up,
        [draw(*shape), draw(*shape, seed=1)],
        where,
    )
    assert max(made) < EXACT


@everywhere
@pytest.mark.parametrize("activation", EXACTLY)
def test_large_entries_stay_finite(where: str, activation: str) -> None:
    gate = torch.tensor([-1e4, -90.0, -1e-30, 0.5, 90.0, 1e4], dtype=torch.float32)
    made = compared(
        lambda gate, up: kernels.glu(gate, up, activation),
        lambda gate, up: EXACTLY[activation](gate) * up,
        [gate, torch.ones(6)],
        where,
    )
    assert max(made) < 1e-6


@everywhere
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_halves_of_one_product_in_other_dtypes(where: str, dtype: torch.dtype) -> None:
    def halves(fused: Tensor) -> Tensor:
        return kernels.glu(*fused.chunk(2, -1), "silu")

    def exact(fused: Tensor) -> Tensor:
        gate, up = fused.chunk(2, -1)
        return F.silu(gate) * up

    assert max(compared(halves, exact, [draw(4, 3, 66, dtype=dtype)], where)) < HALF[dtype]


def test_an_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(KernelError, match="unknown activation 'gelu_tan'; did you mean 'gelu_tanh'"):
        kernels.glu(draw(2), draw(2), "gelu_tan")
