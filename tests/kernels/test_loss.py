"""The fused output layer and loss against cross-entropy of the logits, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autopar import kernels
from autopar.errors import KernelError
from autopar.kernels import loss as reference
from tests.kernels.checks import EXACT, PRODUCTS, compared, draw, everywhere, running


def labels(rows: int, classes: int) -> Tensor:
    made = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    made[::3] = -100
    return made


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, cap: float = 0.0) -> Tensor:
    logits = F.linear(x, weight, bias)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return F.cross_entropy(logits, wanted, reduction="sum")


@everywhere
@pytest.mark.parametrize(("rows", "width", "classes"), [(1, 5, 3), (33, 20, 70), (7, 64, 130), (40, 33, 64)], ids=str)
def test_the_loss_and_its_gradients(
    where: str, rows: int, width: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE", 64 * rows)  # several tiles
    wanted = labels(rows, classes)
    wanted[-1] = classes - 1
    made = compared(
        lambda x, w, b: kernels.linear_cross_entropy(x, w, wanted, b),
        lambda x, w, b: exact(x, w, b, wanted),
        [draw(rows, width), draw(classes, width, seed=1), draw(classes)],
        where,
    )
    assert max(made) < EXACT


@everywhere
def test_a_soft_cap(where: str) -> None:
    wanted = labels(20, 70)
    made = compared(
        lambda x, w: kernels.linear_cross_entropy(x, w, wanted, softcap=2.0),
        lambda x, w: exact(x, w, None, wanted, 2.0),
        [draw(20, 16), draw(70, 16, seed=1)],
        where,
    )
    assert max(made) < EXACT


@everywhere
def test_large_logits_stay_finite(where: str) -> None:
    wanted = labels(9, 70)
    made = compared(
        lambda x, w: kernels.linear_cross_entropy(x, w, wanted),
        lambda x, w: exact(x, w, None, wanted),
        [draw(9, 16, dtype=torch.float32, scale=300.0), draw(70, 16, seed=1, dtype=torch.float32)],
        where,
    )
    assert max(made) < 1e-4  # the rounding of logits near 1,000


@everywhere
def test_rows_that_are_all_ignored_count_nothing(where: str) -> None:
    nothing = torch.full((4,), -100)
    x = draw(4, 8).requires_grad_()
    with running(where):
        loss = kernels.linear_cross_entropy(x, draw(10, 8), nothing)
        loss.backward()
    assert float(loss.detach()) == 0 and x.grad is not None and not x.grad.any()


@everywhere
@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
def test_other_dtypes(where: str, dtype: torch.dtype) -> None:
    wanted = labels(20, 70)
    made = compared(
        lambda x, w: kernels.linear_cross_entropy(x, w, wanted),
        lambda x, w: exact(x, w, None, wanted),
        [draw(20, 32, dtype=dtype), draw(70, 32, seed=1, dtype=dtype)],
        where,
    )
    assert max(made) < PRODUCTS[dtype]


@everywhere
def test_parts_of_the_classes_make_the_whole(where: str) -> None:
    """What vocabulary-parallel devices do: log-sum-exps merge, the label is found by one of them; gradients flow through both."""
    wanted = labels(12, 60)

    def in_parts(x: Tensor, w: Tensor) -> Tensor:
        parts = [kernels.linear_logsumexp(x, p, wanted - i * 20) for i, p in enumerate(w.split(20))]
        lse = torch.logsumexp(torch.stack([p[0] for p in parts]), 0)
        return (lse - sum(p[1] for p in parts)).masked_fill(wanted == -100, 0.0).sum()

    made = compared(in_parts, lambda x, w: exact(x, w, None, wanted), [draw(12, 8), draw(60, 8, seed=1)], where)
    assert max(made) < EXACT


def test_a_frozen_weight_costs_no_gradient() -> None:
    x = draw(4, 8).requires_grad_()
    weight = draw(10, 8)
    kernels.linear_cross_entropy(x, weight, labels(4, 10)).backward()
    want = draw(4, 8).requires_grad_()
    exact(want, weight, None, labels(4, 10)).backward()
    assert torch.allclose(x.grad, want.grad) and weight.grad is None  # type: ignore[arg-type]


def test_operands_of_other_shapes_are_refused() -> None:
    with pytest.raises(KernelError, match=r"got x \(4, 8\), weight \(10, 7\), labels \(4,\)"):
        kernels.linear_cross_entropy(draw(4, 8), draw(10, 7), labels(4, 10))
