"""Rotary positions against the rotation's definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopar import kernels
from autopar.errors import KernelError
from tests.kernels.checks import EXACT, HALF, compared, draw, everywhere


def angles(length: int, size: int, interleaved: bool) -> Tensor:
    turns = torch.arange(length).double()[:, None] * 100 ** (-torch.arange(0, size, 2).double() / size)
    return turns.repeat_interleave(2, -1) if interleaved else torch.cat((turns, turns), -1)


def exact(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, times e^{iθ}."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    half = slice(0, None, 2) if interleaved else slice(0, size // 2)
    made = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos[..., half], sin[..., half]))
    made = made.flatten(-2) if interleaved else made.transpose(-1, -2).flatten(-2)
    return torch.cat((made, rest), -1)


@everywhere
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("width", "size"), [(8, 8), (80, 80), (96, 24), (10, 2), (6, 6)], ids=str)
def test_pairs_are_turned_by_their_angle(where: str, interleaved: bool, width: int, size: int) -> None:
    turn = angles(5, size, interleaved)[None, None]
    x = draw(2, 3, 5, width)
    made = compared(
        lambda x: kernels.rotary(x, turn.cos(), turn.sin(), interleaved),
        lambda x: exact(x, turn.cos(), turn.sin(), interleaved),
        [x],
        where,
    )
    assert max(made) < EXACT


@everywhere
def test_heads_may_stand_behind_the_length_and_every_sequence_have_its_own_positions(where: str) -> None:
    turn = torch.stack([angles(5, 8, False), angles(5, 8, False).flip(0)])[:, :, None]
    x = draw(2, 5, 3, 8).transpose(0, 0)
    made = compared(
        lambda x: kernels.rotary(x, turn.cos(), turn.sin()),
        lambda x: exact(x, turn.cos(), turn.sin(), False),
        [x],
        where,
    )
    assert max(made) < EXACT


@everywhere
def test_memory_may_lie_in_another_order(where: str) -> None:
    turn = angles(5, 8, False)[None, None]
    made = compared(
        lambda x: kernels.rotary(x.transpose(1, 2), turn.cos(), turn.sin()),
        lambda x: exact(x.transpose(1, 2), turn.cos(), turn.sin(), False),
        [draw(2, 5, 3, 12)],
        where,
    )
    assert max(made) < EXACT


@everywhere
def test_cosines_and_sines_of_a_pair_may_differ(where: str) -> None:
    """Not a rotation: the gradient must be the transposed map, and not the inverse one."""
    cos, sin = draw(1, 1, 5, 8), draw(1, 1, 5, 8, seed=1)

    def written(x: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    assert max(compared(lambda x: kernels.rotary(x, cos, sin), written, [draw(2, 3, 5, 8)], where)) < EXACT


@everywhere
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_other_dtypes(where: str, dtype: torch.dtype) -> None:
    turn = angles(4, 64, False)[None, None]
    made = compared(
        lambda x: kernels.rotary(x, turn.cos().float(), turn.sin().float()),
        lambda x: exact(x, turn.cos(), turn.sin(), False),
        [draw(1, 2, 4, 64, dtype=dtype)],
        where,
    )
    assert max(made) < HALF[dtype]


def test_tables_of_another_shape_are_refused() -> None:
    with pytest.raises(KernelError, match=r"got x \(2, 3, 5, 8\), cos \(1, 1, 4, 8\)"):
        kernels.rotary(draw(2, 3, 5, 8), draw(1, 1, 4, 8), draw(1, 1, 4, 8))
