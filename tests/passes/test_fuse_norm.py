"""fused_norm: which norms are found, with and without the sum before them."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from autopar.ir.program import Program
from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace
from tests.passes.minimal import block_text, both, ids, targets  # noqa: F401

CLOSE = 1e-12


def norms(program: Program) -> list[str]:
    return [t.split(".")[1] for t in targets(program) if t.startswith("autopar")]


def test_a_block_after_fused_norm() -> None:
    assert_expected_inline(
        block_text({"fused_norm": {}}),
        """\
  %x: f32[2, 6, 8] = input x
  %mask: f32[6, 6] = input mask
  %weight: f32[8] = parameter weight
  %qkv_weight: f32[24, 8] = parameter qkv.weight
  %rms_norm_default: f32[2, 6, 8] = autopar.rms_norm(%x, %weight, 1e-06)
  %matmul: f32[2, 6, 24] = aten.linear(%rms_norm_default, %qkv_weight)
  %view_1: f32[2, 6, 2, 12] = aten.reshape(%matmul, [2, 6, 2, 12])
  %transpose: f32[2, 2, 6, 12] = aten.transpose.int(%view_1, 1, 2)
  %chunk: (f32[2, 2, 6, 4], f32[2, 2, 6, 4], f32[2, 2, 6, 4]) = aten.chunk(%transpose, 3, -1)
  %getitem: f32[2, 2, 6, 4] = getitem(%chunk, 0)
  %getitem_1: f32[2, 2, 6, 4] = getitem(%chunk, 1)
  %getitem_2: f32[2, 2, 6, 4] = getitem(%chunk, 2)
  %transpose_1: f32[2, 2, 4, 6] = aten.transpose.int(%getitem_1, -1, -2)
  %matmul_1: f32[2, 2, 6, 6] = aten.matmul(%getitem, %transpose_1)
  %div: f32[2, 2, 6, 6] = aten.div.Tensor(%matmul_1, 2.0)
  %add_1: f32[2, 2, 6, 6] = aten.add.Tensor(%div, %mask)
  %softmax: f32[2, 2, 6, 6] = aten.softmax.int(%add_1, -1)
  %matmul_2: f32[2, 2, 6, 4] = aten.matmul(%softmax, %getitem_2)
  %transpose_2: f32[2, 6, 2, 4] = aten.transpose.int(%matmul_2, 1, 2)
  %reshape: f32[2, 6, 8] = aten.reshape(%transpose_2, [2, 6, 8])
  %add_2: f32[2, 6, 8] = aten.add.Tensor(%x, %reshape)
  return (%add_2)""",
    )


class Stack(nn.Module):
    """Embedding, a layer with the subclass's norm, a residual, the norm again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8))
        self.native, self.rms = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        x = x + self.layer(self.norm(x))
        return (self.norm(x) + x) @ self.embedding.weight.T


class Llama(Stack):
    def norm(self, x):  # noqa: ANN001, ANN201
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Gemma(Stack):
    """One plus the weight, squares as a product."""

    def norm(self, x):  # noqa: ANN001, ANN201
        return (x * torch.pow((x * x).mean(-1, keepdim=True) + 1e-6, -0.5)) * (1.0 + self.weight)


class Unweighted(Stack):
    def norm(self, x):  # noqa: ANN001, ANN201
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Native(Stack):
    def norm(self, x):  # noqa: ANN001, ANN201
        return self.native(x)


class NativeRms(Stack):
    def norm(self, x):  # noqa: ANN001, ANN201
        return self.rms(x)


FOUND = {
    Llama: ["rms_norm", "add_rms_norm"], Gemma: ["rms_norm", "rms_norm"], Unweighted: ["rms_norm", "add_rms_norm"],
    Native: ["layer_norm", "add_layer_norm"], NativeRms: ["rms_norm", "add_rms_norm"],
}  # fmt: skip
"""Gemma's weight is made after the sum that a kernel would start from."""


@pytest.mark.parametrize("kind", FOUND, ids=lambda k: k.__name__)
def test_every_spelling_is_found_and_computes_the_same(kind: type[Stack]) -> None:
    _, after, error = both(kind(), "fused_norm")
    assert norms(after) == FOUND[kind] and error < CLOSE
    assert not [t for t in targets(after) if "rsqrt" in t or t.startswith(("aten.layer_norm", "aten.rms"))]


def test_the_sum_before_a_norm_may_be_left_out() -> None:
    _, after, error = both(Llama(), "fused_norm", residual=False)
    assert norms(after) == ["rms_norm", "rms_norm"] and error < CLOSE


def test_a_norm_is_found_before_and_after_the_casts_of_mixed_precision() -> None:
    program = trace(Llama(), ids())
    casts = {"mixed_precision": {}}
    for passes in ([casts, {"fused_norm": {}}], [{"fused_norm": {}}, casts]):
        assert norms(rewrite(program, passes)) == FOUND[Llama]


class OverLength(Stack):
    def norm(self, x):  # noqa: ANN001, ANN201
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()


class Scaled(Stack):
    """The mean square of something else."""

    def norm(self, x):  # noqa: ANN001, ANN201
        return self.layer(x) * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("kind", [OverLength, Scaled], ids=lambda k: k.__name__)
def test_what_is_no_norm_of_the_last_dim_stays(kind: type[Stack]) -> None:
    before, after, _ = both(kind(), "fused_norm")
    assert str(before) == str(after)
