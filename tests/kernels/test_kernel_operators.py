"""Kernels as torch operators: schemas, shapes on fake tensors, gradients through autograd; as torch.library.opcheck asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopar import kernels  # noqa: F401  (registers the operators)
from tests.kernels.checks import draw

ops = torch.ops.autopar


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return draw(*shape, seed=seed).requires_grad_()


CALLS: dict[str, Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "rms_norm": lambda: (ops.rms_norm, (leaf(2, 3, 8), leaf(8), 1e-6), {}),
    "layer_norm": lambda: (ops.layer_norm, (leaf(2, 3, 8), leaf(8), leaf(8, seed=1), 1e-6), {}),
    "add_rms_norm": lambda: (ops.add_rms_norm, (leaf(2, 8), leaf(2, 8, seed=1), None, 1e-6), {}),
    "add_layer_norm": lambda: (ops.add_layer_norm, (leaf(2, 8), leaf(2, 8, seed=1), leaf(8), None, 1e-6), {}),
    "rotary": lambda: (ops.rotary, (leaf(2, 3, 4, 8), draw(1, 1, 4, 6), draw(1, 1, 4, 6), True), {}),
    "glu": lambda: (ops.glu, (leaf(2, 8), leaf(2, 8, seed=1), "silu"), {}),
    "flash_attention": lambda: (
        ops.flash_attention,
        (leaf(2, 4, 6, 8), leaf(2, 2, 5, 8), leaf(2, 2, 5, 8, seed=1)),
        {"causal": True, "window": 3, "softcap": 2.0},
    ),
    "flex_attention": lambda: (
        ops.flex_attention,
        (leaf(2, 4, 6, 8), leaf(2, 2, 6, 8), leaf(2, 2, 6, 8, seed=1)),
        {"causal": True, "window": 3, "softcap": 2.0, "documents": torch.tensor([[0, 0, 1, 1, 1, 2]] * 2)},
    ),
    "linear_logsumexp": lambda: (
        ops.linear_logsumexp,
        (leaf(5, 8), leaf(7, 8), torch.tensor([0, 6, 3, -100, 2]), leaf(7)),
        {},
    ),
    "paged_attention": lambda: (
        ops.paged_attention,
        (draw(3, 4, 8), draw(4, 4, 2, 8), draw(4, 4, 2, 8), torch.tensor([[2, 1], [0, 3]]), torch.tensor([5, 8]),
         torch.tensor([0, 1, 3])),
        {},
    ),
    "adamw_": lambda: (ops.adamw_, (draw(5), draw(5), draw(5), draw(5).abs(), 1, 0.1), {}),
}  # fmt: skip
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_is_what_its_registration_says(name: str) -> None:
    operator, args, kwargs = CALLS[name]()
    torch.library.opcheck(operator.default, args, kwargs, test_utils=TESTS)


def test_symbolic_sizes_pass_through() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(torch.empty(2, 4, 6, 8))
        out, lse = ops.flash_attention(x, x, x, causal=True)
        assert out.shape == x.shape and lse.shape == x.shape[:3]
        flat = x.reshape(-1, 8)
        loss = ops.linear_cross_entropy(flat, flat, torch.empty(flat.shape[:1], dtype=torch.int64))
        assert loss.shape == ()
