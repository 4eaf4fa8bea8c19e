"""A model that cannot be traced is refused in one line that names the module and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import MLP
from torch import nn
from torch.nn import functional as F
from toys import VOCAB, WIDTH, Layer, Stack

from autopar.errors import TraceError
from autopar.ir.trace import trace

IDS = torch.randint(VOCAB, (4, 6))
BATCH = {"input_ids": IDS, "labels": IDS}


class Branching(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Reading(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * x.mean().item())


class Shrinking(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + x[x > 0].sum())


class Assigning(Layer):
    """Assigns a buffer anew."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return super().forward(x - self.mean)


class Conditional(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (super().forward(x),))


class Autocast(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class LocalFunction(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                return 2 * x

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                return 2 * grad

        return super().forward(Twice.apply(x))  # type: ignore[arg-type]


class Remembering(Layer):
    """Reads what the last call left."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.memory: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        old = self.memory
        self.memory = x.mean().detach()
        return super().forward(x if old is None else x + old)


class Failing(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., :3])


MODULES: dict[str, tuple[Any, str, str]] = {
    "data-dependent control flow": (Branching, "layers.0 (Branching", "control flow"),
    "a value read while tracing": (Reading, "layers.0", "values"),
    "a size that depends on values": (Shrinking, "layers.0", "values"),
    "a buffer assigned": (Assigning, "layers.0 (Assigning)", "assigns its buffer 'mean'"),
    "an operator with regions": (Conditional, "layers.0", "cond"),
    "autocast": (Autocast, "layers.0", "mixed_precision"),
    "a function's own autograd.Function": (LocalFunction, "Twice", "module level"),
    "state from call to call": (Remembering, "layers.0 (Remembering)", "'memory'"),
    "shapes that do not fit": (Failing, "layers.0.linear (Linear", "same reduction dim"),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_message_names_the_module_and_the_reason_in_one_line(name: str) -> None:
    layer, where, why = MODULES[name]
    with pytest.raises(TraceError) as caught:
        trace(Stack(layer), BATCH)
    message = str(caught.value)
    assert where in message
    assert why in message
    assert "\n" not in message


X = torch.randn(4, WIDTH)
BATCHES: dict[str, tuple[nn.Module, Any, Any, str]] = {
    "no labels": (MLP(), {"x": X}, None, "the batch has no 'labels'"),
    "a key missing": (MLP(), {"labels": IDS[:, 0]}, None, "the batch lacks 'x', which MLP.forward needs"),
    "a wrong key": (MLP(), {"x": X, "y": X, "labels": IDS[:, 0]}, None, "MLP.forward takes no 'y'; it takes x"),
    "labels of another rank": (MLP(), {"x": X, "labels": IDS}, None, "labels of shape"),
    "labels of another length": (Stack(), {"input_ids": IDS, "labels": IDS[:, :5]}, None, "labels of shape"),
    "too many values": (MLP(), (X, X), None, "2 positional values"),
    "nothing": (MLP(), {}, None, "the batch holds no tensor"),
    "a loss that is no scalar": (MLP(), {"x": X}, lambda out, batch: F.relu(out), "a loss returns"),
    "logits of no tensor": (Stack(), {"input_ids": "text", "labels": IDS}, None, "embed (Embedding"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_does_not_fit_is_refused_by_what_is_wrong_with_it(name: str) -> None:
    model, batch, loss, text = BATCHES[name]
    with pytest.raises(TraceError) as caught:
        trace(model, batch, loss=loss)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
