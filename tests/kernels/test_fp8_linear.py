"""fp8_linear: the product of rounded factors, its gradients, and the kernel that devices with 8-bit products use."""

from __future__ import annotations

import pytest
import torch

from autopar.kernels.fp8 import fp8_linear, product, quantize, reference

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("shape", [(2, 5, 32, 48), (7, 16, 16), (1, 24, 40)], ids=str)
def test_the_result_is_the_product_of_the_rounded_factors(shape):
    *rows, inner, outer = shape
    x, w, b = torch.randn(*rows, inner), torch.randn(outer, inner), torch.randn(outer)
    x[0] *= 1e4  # a row of its own scale
    found = fp8_linear(x, w, b, E4M3)
    torch.testing.assert_close(found.double(), reference(x, w, b), rtol=1e-5, atol=1e-5 * float(found.abs().max()))
    exact = torch.nn.functional.linear(x, w)
    assert 1e-3 < float((found - b - exact).norm() / exact.norm()) < 0.06, "three bits of mantissa"


def test_a_row_of_zeros_and_large_numbers_stay_finite():
    x = torch.zeros(3, 32)
    x[1] = 3e38
    found = fp8_linear(x, torch.full((16, 32), 1e-3), None, E4M3)
    assert torch.equal(found[0], torch.zeros(16)) and torch.isfinite(found).all()


def test_one_kernel_of_the_device_gives_the_same_as_the_emulation():
    a, b = torch.randn(24, 64), torch.randn(48, 64)
    (a8, a_scale), (b8, b_scale) = quantize(a, E4M3), quantize(b, E4M3)
    kernel = torch._scaled_mm(a8, b8.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=torch.float32)
    torch.testing.assert_close(product(a, b, E4M3), kernel)


def test_gradients_round_what_the_recipe_rounds_and_nothing_is_rounded_for_another_dtype():
    x, w, b, g = (torch.randn(s, dtype=torch.float32) for s in ((6, 32), (48, 32), (48,), (6, 48)))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    fp8_linear(*leaves, E4M3).backward(g)
    torch.testing.assert_close(leaves[0].grad.double(), reference(g, w.t().contiguous()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(leaves[1].grad, g.t() @ x)
    torch.testing.assert_close(leaves[2].grad, g.sum(0))
    wide = [t.double().requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradcheck(lambda *given: fp8_linear(*given, torch.float64), wide)
    frozen = [x.clone().requires_grad_(), w.clone(), None]
    fp8_linear(*frozen, E4M3).backward(g)
    torch.testing.assert_close(frozen[0].grad, leaves[0].grad)


def test_the_operator_keeps_torchs_rules():
    given = (torch.randn(2, 3, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True), None, E4M3)
    torch.library.opcheck(fp8_linear, given)
