"""Norms, alone and of a sum, against their definitions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autopar import kernels
from autopar.errors import KernelError
from tests.kernels.checks import EXACT, HALF, compared, draw, everywhere, running

EPS = 1e-6


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    made = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return made if weight is None else made * weight


def layer(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    made = rms(x, weight)
    return made if bias is None else made + bias


SHAPES = [(1, 2), (1, 64), (5, 7, 33), (3, 100), (2, 3, 4, 16)]


@everywhere
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_its_gradients(where: str, shape: tuple[int, ...]) -> None:
    operands = draw(*shape), draw(shape[-1])
    assert max(compared(lambda x, w: kernels.rms_norm(x, w, EPS), rms, operands, where)) < EXACT


@everywhere
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)  # of two entries little is left without their mean
def test_layer_norm_and_its_gradients(where: str, shape: tuple[int, ...]) -> None:
    operands = draw(*shape), draw(shape[-1]), draw(shape[-1], seed=1)
    assert max(compared(lambda x, w, b: kernels.layer_norm(x, w, b, EPS), layer, operands, where)) < EXACT


@everywhere
def test_a_norm_of_a_sum_returns_the_sum_too(where: str) -> None:
    operands = draw(5, 7, 33), draw(5, 7, 33, seed=2), draw(33), draw(33, seed=1)
    both = compared(
        lambda x, r, w, b: kernels.add_layer_norm(x, r, w, b, EPS),
        lambda x, r, w, b: (layer(x + r, w, b), x + r),
        operands,
        where,
    )
    assert max(both) < EXACT
    both = compared(
        lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS), lambda x, r, w: (rms(x + r, w), x + r), operands[:3], where
    )
    assert max(both) < EXACT


@everywhere
def test_weights_may_be_left_out(where: str) -> None:
    x = [draw(4, 20)]
    assert max(compared(lambda x: kernels.rms_norm(x, None, EPS), lambda x: rms(x, None), x, where)) < EXACT
    assert (
        max(compared(lambda x: kernels.layer_norm(x, None, None, EPS), lambda x: layer(x, None, None), x, where))
        < EXACT
    )


@everywhere
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_other_dtypes_are_rounded_once(where: str, dtype: torch.dtype) -> None:
    """Rows far from zero, too: squares of float16 beyond 65,504 would be infinite."""
    operands = draw(6, 96, dtype=dtype, scale=300.0), draw(96, dtype=dtype)
    assert max(compared(lambda x, w: kernels.rms_norm(x, w, EPS), rms, operands, where)) < HALF[dtype]
    assert torch.finfo(dtype).bits == 32 or float(operands[0].abs().max()) ** 2 > 65_504


@everywhere
def test_rows_may_lie_apart(where: str) -> None:
    wide = draw(6, 50)
    with running(where):
        made = kernels.rms_norm(wide[:, :33], draw(33), EPS)
    assert torch.allclose(made, rms(wide[:, :33], draw(33)))


def test_operands_of_other_shapes_are_refused() -> None:
    with pytest.raises(KernelError, match=r"weight has one number for each of 8 entries; got \(7,\)"):
        kernels.rms_norm(draw(2, 8), draw(7), EPS)
    with pytest.raises(KernelError, match="x and residual have one shape"):
        kernels.add_rms_norm(draw(2, 8), draw(1, 8), None, EPS)


def test_a_frozen_weight_gets_no_gradient() -> None:
    x: Any = draw(2, 8).requires_grad_()
    kernels.layer_norm(x, draw(8), draw(8), EPS).sum().backward()
    assert x.grad is not None
