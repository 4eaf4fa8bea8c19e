"""fused_rotary: rotations in every spelling, found by what they do."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from autopar.ir.program import Program
from autopar.ir.rewrite import rewrite
from autopar.ir.text import graph_text
from autopar.ir.trace import trace
from tests.passes.minimal import both, ids, targets


class Turned(nn.Module):
    """Two heads of width 8, turned as the subclass says."""

    size = 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(16, 16), nn.Linear(16, 16)

    def swapped(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-second, first), -1)

    def tables(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
        angles = places[:, None] * torch.arange(self.size, device=x.device, dtype=x.dtype) * 0.1
        return angles.cos()[None, None], angles.sin()[None, None]

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.tables(x)
        return x * cos + self.swapped(x) * sin

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.embedding(input_ids)).unflatten(-1, (2, 8)).transpose(1, 2)
        return self.turn(x).transpose(1, 2).flatten(-2) @ self.embedding.weight.T


class Chunked(Turned):
    def swapped(self, x):  # noqa: ANN001, ANN201
        first, second = x.chunk(2, -1)
        return torch.cat((second.neg(), first), -1)


class Interleaved(Turned):
    def swapped(self, x):  # noqa: ANN001, ANN201
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


class Pairs(Turned):
    """GPT-J's, by a dim of pairs."""

    def swapped(self, x):  # noqa: ANN001, ANN201
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-b, a), -1).reshape(x.shape)


class Minus(Turned):
    """The sign outside."""

    def turn(self, x):  # noqa: ANN001, ANN201
        cos, sin = self.tables(x)
        first, second = x.chunk(2, -1)
        return cos * x - torch.cat((second, -first), -1) * sin


class Partial(Turned):
    size = 4

    def turn(self, x):  # noqa: ANN001, ANN201
        cos, sin = self.tables(x)
        part, rest = x[..., :4], x[..., 4:]
        return torch.cat((part * cos + self.swapped(part) * sin, rest), -1)


FOUND = {Turned: False, Chunked: False, Interleaved: True, Pairs: True, Minus: False, Partial: False}


def turns(program: Program) -> list[torch.fx.Node]:
    return [n for _, g in program.graphs() for n in g.nodes if n.target is torch.ops.autopar.rotary.default]


@pytest.mark.parametrize("kind", FOUND, ids=lambda k: k.__name__)
def test_every_spelling_is_found_and_computes_the_same(kind: type[Turned]) -> None:
    _, after, error = both(kind(), "fused_rotary")
    (node,) = turns(after)
    assert node.args[3] is FOUND[kind] and error < 1e-12
    assert not [t for t in targets(after) if t.split(".")[1] in ("cat", "stack", "neg")]


class Backwards(Turned):
    """Not a rotation: the signs are the other way."""

    def swapped(self, x):  # noqa: ANN001, ANN201
        first, second = x.chunk(2, -1)
        return torch.cat((second, first), -1)


class Trained(Turned):
    """Angles with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(8))

    def tables(self, x):  # noqa: ANN001, ANN201
        cos, sin = super().tables(x)
        return cos * self.rate, sin * self.rate


@pytest.mark.parametrize("kind", [Backwards, Trained], ids=lambda k: k.__name__)
def test_what_is_no_rotation_by_fixed_angles_stays(kind: type[Turned]) -> None:
    before, after, _ = both(kind(), "fused_rotary")
    assert str(before) == str(after)


def test_the_text_after_fused_rotary() -> None:
    program = rewrite(trace(Partial(), ids()), [{"fused_rotary": {}}])
    lines = graph_text(program.at(batch=2, length=6).graph).splitlines()
    assert_expected_inline(
        "\n".join(line for line in lines if "transpose" in line or "rotary" in line),
        """\
  %transpose: f32[2, 2, 6, 8] = aten.transpose.int(%unflatten, 1, 2)
  %rotary_default: f32[2, 2, 6, 8] = autopar.rotary(%transpose, %unsqueeze_2, %unsqueeze_4, False)
  %transpose_1: f32[2, 6, 2, 8] = aten.transpose.int(%rotary_default, 1, 2)
  %flatten: f32[2, 6, 16] = aten.flatten.using_ints(%transpose_1, -2)""",
    )
