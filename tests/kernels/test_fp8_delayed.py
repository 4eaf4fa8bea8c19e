"""fp8_linear_delayed: rounding by the scales of earlier steps, what is noted of a step, and how the scales move on."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from autopar.kernels.fp8_delayed import fp8_advance_, fp8_linear_delayed, scales_of, state_shape

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
X, WEIGHT, GRADIENT = range(3)


def given(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def rounded(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    return (x.detach() * scale).clamp(-largest, largest).to(dtype).double() / scale.double()


def test_all_three_products_take_factors_rounded_by_the_states_scales():
    x, w, b = given((2, 5, 32), (48, 32), (48,))
    state = torch.zeros(state_shape(3))
    state[:, 1] = torch.tensor([100.0, 60.0, 3e3])
    y = fp8_linear_delayed(x, w, b, state)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    x8, w8, g8 = (
        rounded(x, state[X, 1], E4M3),
        rounded(w, state[WEIGHT, 1], E4M3),
        rounded(grad, state[GRADIENT, 1], E5M2),
    )
    flat = g8.reshape(-1, 48)
    torch.testing.assert_close(y.detach().double(), x8 @ w8.t() + b.detach().double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), g8 @ w8, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(w.grad.double(), flat.t() @ x8.reshape(-1, 32), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(b.grad, grad.sum((0, 1)))
    assert 1e-3 < float((y - torch.nn.functional.linear(x, w, b)).detach().norm() / y.detach().norm()) < 0.06, (
        "three bits of mantissa"
    )


def test_the_largest_magnitudes_are_noted_once_however_often_a_micro_batch_runs():
    x, w = given((4, 32), (16, 32))
    once, twice = torch.zeros(state_shape(2)), torch.zeros(state_shape(2))
    fp8_linear_delayed(x, w, None, once).sum().backward()
    for half in x.split(2):
        checkpoint(lambda h: fp8_linear_delayed(h, w, None, twice), half, use_reentrant=False).sum().backward()
    assert torch.equal(once, twice)
    assert once[:, 0].tolist() == [float(x.detach().abs().max()), float(w.detach().abs().max()), 1.0]
    with torch.no_grad():
        fp8_linear_delayed(10 * x, w, None, once)
    assert torch.equal(once, twice), "an evaluation leaves no trace"


def test_a_frozen_layer_notes_its_operands_too():
    (x, w), state = (t.detach() for t in given((4, 32), (16, 32))), torch.zeros(state_shape(2))
    assert not fp8_linear_delayed(x, w, None, state).requires_grad
    assert state[X, 0] == x.abs().max() and state[WEIGHT, 0] == w.abs().max()


def stepped(state: torch.Tensor, amax: float, margin: float = 0.0, latest: bool = False) -> list[float]:
    state[:, 0] = amax
    fp8_advance_(state, margin, latest)
    return state[:, 1].tolist()


def test_scales_follow_the_largest_of_the_history():
    state = torch.zeros(state_shape(3))
    assert scales_of(state).tolist() == [1, 1, 1]
    assert stepped(state, 4.0) == [112.0, 112.0, 14336.0]
    assert stepped(state, 1.0) == [112.0, 112.0, 14336.0], "4 is in the history still"
    assert stepped(state, 0.5) == [112.0, 112.0, 14336.0]
    assert stepped(state, 0.5) == [448.0, 448.0, 57344.0], "and is no longer"
    assert state[0, 2:].tolist() == [0.5, 0.5, 1.0] and not state[:, 0].any()
    assert stepped(torch.zeros(state_shape(3)), 4.0, margin=1.0) == [56.0, 56.0, 7168.0]


def test_the_most_recent_alone_counts_where_that_is_asked_for():
    state = torch.zeros(state_shape(3))
    stepped(state, 4.0, latest=True)
    assert stepped(state, 1.0, latest=True) == [448.0, 448.0, 57344.0]


@pytest.mark.parametrize("nothing", [0.0, float("inf"), float("nan")])
def test_a_step_in_which_nothing_finite_was_seen_leaves_scale_and_history(nothing: float):
    state = torch.zeros(state_shape(3))
    stepped(state, 4.0)
    before = state.clone()
    stepped(state, nothing)
    assert torch.equal(state, before)


def test_what_exceeds_the_scale_becomes_the_largest_number_and_a_nan_is_noted_as_an_overflow():
    x, w = torch.full((1, 16), 1e6), torch.eye(16)
    state = torch.zeros(state_shape(1))
    assert fp8_linear_delayed(x, w, None, state).tolist() == [[448.0] * 16]
    fp8_linear_delayed(torch.full((1, 16), float("nan")), w, None, state)
    assert state[X, 0] == float("inf")


def test_other_dtypes_round_nothing_and_the_gradients_are_those_of_a_linear_layer():
    x, w, b = given((3, 16), (32, 16), (32,), dtype=torch.float64)
    state = torch.zeros(state_shape(1), dtype=torch.float64)

    def plain(*leaves: torch.Tensor) -> torch.Tensor:
        return fp8_linear_delayed(*leaves, state, torch.float64, torch.float64)

    assert torch.equal(plain(x, w, b), torch.nn.functional.linear(x, w) + b)
    assert torch.autograd.gradcheck(plain, (x, w, b))


def test_shapes_are_known_without_values():
    x, w = torch.empty(2, 3, 16, device="meta"), torch.empty(32, 16, device="meta")
    made = torch.ops.autopar.fp8_linear_delayed.default(x, w, None, torch.empty(3, 4, device="meta"), E4M3, E5M2)
    assert made.shape == (2, 3, 32) and made.is_meta
