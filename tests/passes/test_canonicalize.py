"""canonicalize: one spelling for one operation, nothing that does nothing."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import nn

from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace
from tests.passes.minimal import block_text, ids, targets


def test_a_block_reads_as_one_would_write_it() -> None:
    assert_expected_inline(
        block_text(),
        """\
  %x: f32[2, 6, 8] = input x
  %mask: f32[6, 6] = input mask
  %weight: f32[8] = parameter weight
  %qkv_weight: f32[24, 8] = parameter qkv.weight
  %pow: f32[2, 6, 8] = aten.pow.Tensor_Scalar(%x, 2)
  %mean: f32[2, 6, 1] = aten.mean.dim(%pow, [-1], True)
  %add: f32[2, 6, 1] = aten.add.Tensor(%mean, 1e-06)
  %rsqrt: f32[2, 6, 1] = aten.rsqrt(%add)
  %mul: f32[2, 6, 8] = aten.mul.Tensor(%x, %rsqrt)
  %mul_1: f32[2, 6, 8] = aten.mul.Tensor(%weight, %mul)
  %matmul: f32[2, 6, 24] = aten.linear(%mul_1, %qkv_weight)
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


class Odd(nn.Module):
    """Spellings that export leaves: no-op casts, slices and views, matmul with a transposed weight, detached constants."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.first, self.second = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids).to(torch.float32)[:, :]
        x = torch.matmul(x, self.first.transpose(0, 1)).float()
        flat = torch.addmm(self.bias, x.view(-1, 8), self.second)
        x = nn.functional.dropout(flat.view(x.shape), 0.0)
        x = x * torch.tensor([2.0], device=x.device).detach()
        x += 1
        return x @ self.embedding.weight.T


def program_of(model: nn.Module):  # noqa: ANN201
    torch.manual_seed(0)
    return rewrite(trace(model, ids()))


def test_products_with_a_weight_are_linear_layers_and_what_does_nothing_is_gone() -> None:
    found = targets(program_of(Odd()))
    assert found.count("aten.linear.default") == 3
    gone = ("matmul", "addmm", "dropout", "lift", "detach", "alias", "to.dtype", "add_", "view")
    assert not [t for t in found if t.split(".")[1] in gone or t.removeprefix("aten.") in gone]


def test_the_loss_is_the_models_own() -> None:
    torch.manual_seed(0)
    model, batch = Odd(), ids()
    logits = model(batch["input_ids"])
    wanted = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    loss, count = rewrite(trace(model, batch)).module()(**batch)
    torch.testing.assert_close(loss, wanted)
    assert count == 2 * 5


class Spare(nn.Module):
    """A block that hands out something nobody reads, made of a parameter nobody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + self.linear(x), self.spare(x)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(16, 8), nn.ModuleList([Spare(), Spare()])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x, _ = block(x)
        return x @ self.embedding.weight.T


def test_a_result_of_a_block_that_nobody_reads_goes_with_the_parameters_it_took() -> None:
    program = program_of(Chain())
    assert [len(g.output_node().args[0]) for g in program.blocks.values()] == [1]  # type: ignore[arg-type]
    assert not [n for n in program.read() if "spare" in n]
    loss, _ = program.module()(**ids())
    loss.backward()
