"""Proofs over models that are no language models, and the user's own modules and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_equal, prove_built
from torch import nn

from autopar.errors import PlanError


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()) for _ in range(3)
        )
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.pool(x).mean((2, 3)))


class Normalized(nn.Module):
    """Batch norm: every image's result depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.out = nn.Linear(16, 50)

    def forward(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.encoder(self.a(features).unsqueeze(1) + self.b(tokens)))


def classes(count: int, *shape: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(count, *shape), "labels": torch.randint(0, 10, (count,))}


PINS: list[dict[str, Any]] = [dict(tp=2), dict(dp=2, zero=3, microbatch=2), dict(tp=2, dp=2, zero=1, microbatch=2)]


@pytest.mark.parametrize("pins", [*PINS, dict(pp=2, microbatch=4)], ids=str)
def test_a_perceptron(pins: dict[str, Any]) -> None:
    assert_equal(prove_built(Perceptron(), classes(8, 20), pins))


@pytest.mark.parametrize("pins", [*PINS, dict(pp=3, microbatch=2)], ids=str)
def test_a_convolutional_net(pins: dict[str, Any]) -> None:
    assert_equal(prove_built(Convolutional(), classes(8, 3, 8, 8), pins))


@pytest.mark.parametrize("pins", [*PINS, dict(pp=2, dp=2, zero=2, microbatch=2)], ids=str)
def test_an_encoder_with_two_inputs(pins: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (8, 6))
    batch = {"tokens": tokens, "features": torch.randn(8, 8), "labels": torch.randint(0, 50, (8, 6))}
    assert_equal(prove_built(TwoInputs(), batch, pins))


def squared(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    error = (output - batch["y"]).square().sum()
    return error, torch.ones_like(batch["y"]).sum()


@pytest.mark.parametrize("pins", [dict(tp=2), dict(dp=4, zero=2)], ids=str)
def test_a_loss_of_the_users_own(pins: dict[str, Any]) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 20), "y": torch.randn(8, 10)}
    assert_equal(prove_built(Perceptron(), batch, pins, loss=squared))


def test_a_scalar_mean_loss() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 20), "y": torch.randn(8, 10)}
    loss = lambda output, batch: F.mse_loss(output, batch["y"])  # noqa: E731
    assert_equal(prove_built(Perceptron(), batch, dict(dp=2, zero=0, microbatch=2), loss=loss))


def test_batch_norm_is_split_over_channels_and_never_over_the_batch() -> None:
    assert_equal(prove_built(Normalized(), classes(8, 3, 6, 6), dict(tp=2)))
    with pytest.raises(PlanError, match=r"dp 2 would change the model's result.*batch_norm"):
        prove_built(Normalized(), classes(8, 3, 6, 6), dict(dp=2))


class Filling(nn.Module):
    """Writes the parts of its result into slices of an empty tensor, and has its own loss of the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(16, 8)}) for _ in range(3))
        self.head = nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            y = x.new_empty(x.shape)
            y[..., :8] = torch.tanh(layer["a"](x))
            y[..., 8:] = layer["b"](x)
            x = x + y
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), label_smoothing=0.1)


@pytest.mark.parametrize("pins", [dict(tp=2), dict(dp=2, zero=1, microbatch=2)], ids=str)
def test_writes_into_slices_and_a_loss_inside_the_model(pins: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (8, 6))
    assert_equal(prove_built(Filling(), {"ids": ids, "labels": torch.randint(0, 50, (8, 6))}, pins))


class Pair(nn.Module):
    """``a.b_c`` and ``a_b.c``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_b = nn.ModuleDict({"b_c": nn.Linear(8, 8)}), nn.ModuleDict({"c": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.a_b["c"](torch.tanh(self.a["b_c"](x))))


class Namesakes(Pair):
    """Tensors whose names differ in their dots alone, called as an emitted module's own attributes, or not in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair() for _ in range(4))
        self.scales = nn.ParameterDict({"x-y": torch.full((8,), 0.5), "x_y": torch.full((8,), 2.0)})
        self.count, self.tp = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = super().forward(hidden * self.scales["x-y"] + self.scales["x_y"])
        for layer in self.layers:
            x = layer(x)
        return (x * self.count + self.tp - hidden).square().mean()


@pytest.mark.parametrize("pins", [dict(tp=2), dict(pp=2, microbatch=2)], ids=str)
def test_names_that_would_collide_in_the_emitted_code(pins: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert_equal(prove_built(Namesakes(), {"hidden": torch.randn(8, 8)}, pins, loss=lambda output, batch: output))


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, device: torch.Tensor) -> torch.Tensor:
        return self.layer(device).square().mean()


def test_a_batch_entry_called_as_what_the_emitted_code_needs_is_refused() -> None:
    with pytest.raises(PlanError, match="the batch's 'device' cannot be an argument of the emitted code"):
        prove_built(Placed(), {"device": torch.randn(8, 8)}, dict(dp=1), loss=lambda output, batch: output)


def test_the_engines_state_has_the_models_own_names(tmp_path: Any) -> None:
    import autopar
    from autopar.models.load import build

    model = build({"hf": "llama", "config": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                                 num_attention_heads=4, vocab_size=50)}, meta=False)  # fmt: skip
    batch = {"input_ids": torch.randint(0, 50, (4, 6)), "labels": torch.randint(0, 50, (4, 6))}
    cluster = {"name": "local-cpu", "devices_per_host": 1}
    engine = autopar.compile(model, cluster, batch=batch, job={"optimizer": {"lr": 1e-3}}).start()
    assert engine.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(engine.state_dict())
