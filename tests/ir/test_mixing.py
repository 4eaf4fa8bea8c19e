"""Models whose result for one sequence depends on the others of its batch are told from those where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import MLP, Conv, TwoInputs
from torch import nn
from torch.nn import functional as F
from toys import VOCAB, WIDTH, Odd, Reversed, Stack, Tupled

from autopar.ir.mixing import mixes_batch
from autopar.ir.objective import Loss, Objective
from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace


class Head(nn.Module):
    """A function between two linear layers, on x (batch, WIDTH)."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.below, self.above, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.between(self.below(x)))


class Contrastive(nn.Module):
    """Logits of every pair in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) @ x.T


def permuted(x: torch.Tensor) -> torch.Tensor:
    return x + x[torch.arange(x.shape[0] - 1, -1, -1)]


def in_place(x: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(x.shape[0])] * 2


def pooled_tokens(x: torch.Tensor) -> torch.Tensor:
    """Rows merged with another dim, worked on, and parted again."""
    b = x.shape[0]
    y = x.reshape(b, 2, WIDTH // 2).flatten(0, 1).softmax(-1)
    return y[torch.arange(2 * b)].view(b, 2, WIDTH // 2).transpose(0, 1).transpose(1, 0).reshape(b, WIDTH)


def scrambled(x: torch.Tensor) -> torch.Tensor:
    return x.t().reshape(x.shape[0], WIDTH) + x


SEPARATE: dict[str, nn.Module] = {
    "mlp": MLP(),
    "merged and parted": Head(pooled_tokens),
    "an index of every sequence's own": Head(in_place),
    "einsum within": Head(lambda x: torch.einsum("bi,bj->bij", x, x).sum(1)),
    "norm": Head(lambda x: F.layer_norm(x, (WIDTH,))),
    "sorted within": Head(lambda x: x.sort(-1)[0]),
    "joined features": Head(lambda x: torch.cat([x[:, :4], torch.ones_like(x[:, 4:])], 1)),
}
MIXING: dict[str, tuple[nn.Module, str]] = {
    "batch mean": (Head(lambda x: x - x.mean(0)), "sub.Tensor"),
    "batch norm": (Head(nn.BatchNorm1d(WIDTH).train()), "batch_norm (statistics over the batch)"),
    "softmax over the batch": (Head(lambda x: x.softmax(0)), "softmax.int (along the batch)"),
    "largest of the batch": (Head(lambda x: x / x.amax(0)), "amax"),
    "cumulative": (Head(lambda x: x.cumsum(0)), "cumsum"),
    "mixup": (Head(permuted), "index.Tensor"),
    "rolled": (Head(lambda x: x + x.roll(1, 0)), "roll"),
    "first sequence": (Head(lambda x: x + x[0]), "select.int"),
    "scrambled": (Head(scrambled), "reshape"),
    "sorted": (Head(lambda x: x.sort(0)[0]), "sort"),
    "gram": (Head(lambda x: x @ (x.T @ x)), "matmul"),
    "einsum over": (Head(lambda x: torch.einsum("bi,bj,ki->kj", x, x, x)), "einsum"),
    "pairs": (Contrastive(), "linear"),
    "turned around": (Head(lambda x: x + x.flip(0)), "flip"),
}


def features(batch: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(batch)
    return {"x": torch.randn(batch, WIDTH, generator=draw), "labels": torch.randint(5, (batch,), generator=draw)}


def additive(model: nn.Module, batch: dict[str, Any], loss: Loss | None = None) -> bool:
    """The meaning of it, by running: loss and count of two parts, put together, are those of the whole."""
    objective = Objective(model.double().train(), loss)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    whole = objective(batch)
    parts = [objective({k: v[i : i + 2] for k, v in batch.items()}) for i in (0, 2)]
    value = sum(p[0] for p in parts) / sum(p[1] for p in parts)
    same = bool(torch.allclose(whole[0] / whole[1], value, rtol=1e-9))
    model.float()
    return same


@pytest.mark.parametrize("name", SEPARATE)
def test_a_model_that_keeps_sequences_apart_mixes_nothing(name: str) -> None:
    model = SEPARATE[name]
    assert mixes_batch(rewrite(trace(model, features(4)))) == []
    assert additive(model, features(4))


@pytest.mark.parametrize("name", MIXING)
def test_an_operator_that_mixes_sequences_is_named(name: str) -> None:
    model, operator = MIXING[name]
    found = mixes_batch(rewrite(trace(model, features(4))))
    assert found
    assert any(operator in line for line in found), found
    batch = features(4)
    assert not additive(model, {**batch, "labels": batch["labels"] % 2})


LOSSES: dict[str, tuple[Loss, bool]] = {
    "mean": (lambda out, batch: F.cross_entropy(out, batch["labels"]), True),
    "squared error": (lambda out, batch: F.mse_loss(out, batch["x"][:, :5]), True),
    "sum and count": (lambda out, batch: (out.square().sum(), (batch["labels"] >= 0).sum()), True),
    "sum, with weights": (
        lambda out, batch: (0.5 * out.abs().sum() + 2 * out.square().sum(), batch["labels"].numel()),
        True,
    ),
    "mean and one": (lambda out, batch: (out.square().mean(), 1), True),
    "sum over a sum": (lambda out, batch: out.square().sum() / (batch["x"][:, 0] > -0.5).sum(), False),
    "sum and one": (lambda out, batch: (out.square().sum(), 1), False),
    "root of a sum": (lambda out, batch: (out.square().sum().sqrt(), (batch["labels"] >= 0).sum()), False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_an_objective_must_be_a_sum_or_a_mean_over_the_batch(name: str) -> None:
    loss, right = LOSSES[name]
    torch.manual_seed(0)
    found = mixes_batch(rewrite(trace(MLP(), features(4), loss=loss)))
    assert (found == []) == right, found
    torch.manual_seed(0)
    assert additive(MLP(), features(4), loss) == right


def test_the_operator_is_named_with_its_place_in_the_model() -> None:
    batch = {"x": torch.randn(4, 3, 8, 8), "labels": torch.randint(5, (4,))}
    found = mixes_batch(trace(Conv("batch"), batch))
    assert [line.split(":")[0] for line in found] == ["blocks.0.1"]
    assert mixes_batch(trace(Conv("group"), batch)) == []
    assert mixes_batch(trace(Conv("batch").eval().requires_grad_(True).train(False), batch)) != []


def test_layers_of_many_kinds_keep_sequences_apart() -> None:
    ids = torch.randint(VOCAB, (4, 6))
    assert mixes_batch(trace(Stack(), {"input_ids": ids, "labels": ids})) == []
    assert mixes_batch(trace(TwoInputs(), {"features": torch.randn(4, 6), "tokens": ids, "labels": ids})) == []
    scores = mixes_batch(trace(Odd(Tupled), {"input_ids": ids, "labels": ids}))  # adds a mean over all of x
    assert scores
    custom = mixes_batch(trace(Stack(Reversed), {"input_ids": ids, "labels": ids}))
    assert "SetUpApart" in custom[0]  # what a function of the user's does is not known
