"""The table of mixed_precision beside what torch.autocast decides, operator by operator, as it runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from passes.precision.table import COMPUTE, OWN_STATISTICS, PROMOTING, SOFTMAX, WIDE

Op = Callable[..., torch.Tensor]


def t(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 0.5 + 0.25


OPERATORS: dict[str, tuple[Op, tuple[torch.Tensor, ...]]] = {
    "linear": (F.linear, (t(3, 4), t(5, 4))),
    "matmul": (torch.matmul, (t(2, 3, 4), t(4, 5))),
    "mm": (torch.mm, (t(3, 4), t(4, 5))),
    "bmm": (torch.bmm, (t(2, 3, 4), t(2, 4, 5))),
    "addmm": (torch.addmm, (t(5), t(3, 4), t(4, 5))),
    "baddbmm": (torch.baddbmm, (t(2, 3, 5), t(2, 3, 4), t(2, 4, 5))),
    "conv1d": (F.conv1d, (t(2, 3, 8), t(4, 3, 3))),
    "conv2d": (F.conv2d, (t(2, 3, 8, 8), t(4, 3, 3, 3))),
    "conv_transpose2d": (F.conv_transpose2d, (t(2, 3, 8, 8), t(3, 4, 3, 3))),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, (t(2, 2, 4, 8), t(2, 2, 4, 8), t(2, 2, 4, 8))),
    "mse_loss": (F.mse_loss, (t(3, 4), t(3, 4))),
    "l1_loss": (F.l1_loss, (t(3, 4), t(3, 4))),
    "huber_loss": (F.huber_loss, (t(3, 4), t(3, 4))),
    "smooth_l1_loss": (F.smooth_l1_loss, (t(3, 4), t(3, 4))),
    "kl_div": (partial(F.kl_div, reduction="sum"), (t(3, 4), t(3, 4))),
    "binary_cross_entropy": (F.binary_cross_entropy, (t(3, 4), t(3, 4))),
    "prod": (torch.prod, (t(3, 4),)),
    "cdist": (torch.cdist, (t(3, 4), t(5, 4))),
    "add": (torch.add, (t(3, 4), t(3, 4))),
    "mul": (torch.mul, (t(3, 4), t(3, 4))),
    "cat": (lambda a, b: torch.cat([a, b]), (t(3, 4), t(3, 4))),
}


def decided(op: Op, given: tuple[torch.Tensor, ...]) -> str:
    """What torch.autocast does: computes in half, computes in float32, or goes by the operands' dtypes."""
    with torch.autocast("cpu", torch.bfloat16):
        from_wide, from_half = op(*given).dtype, op(*(g.bfloat16() for g in given)).dtype
    if from_wide == from_half:
        return "compute" if from_wide == torch.bfloat16 else "wide"
    return "either"


def ours(name: str) -> str:
    if name in COMPUTE:
        return "compute"
    return "wide" if name in WIDE else "either"


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_computes_where_autocast_has_it_compute(name: str) -> None:
    assert ours(name) == decided(*OPERATORS[name])


def test_no_operator_is_in_two_lists() -> None:
    lists = [COMPUTE, WIDE, PROMOTING, frozenset(SOFTMAX), OWN_STATISTICS]
    assert len(frozenset().union(*lists)) == sum(map(len, lists))
