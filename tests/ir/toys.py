"""Small models that a tracer may get wrong: they treat one layer apart, keep things to themselves, or return odd results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, VOCAB = 8, 13


class Layer(nn.Module):
    """A residual layer that knows its number."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """Embedding, layers, head. Subclasses run the layers in other ways."""

    def __init__(self, layer: Any = Layer, depth: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(layer(i) for i in range(depth))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.run(self.embed(input_ids)))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Skips(Stack):
    """U-Net skips: the second half reads the first half's outputs, last first."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        kept, half = [], len(self.layers) // 2
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < half:
                kept.append(x)
            elif kept:
                x = x + kept.pop()
        return x


class Every(Stack):
    """The outer loop does more after every fifth layer."""

    def __init__(self, rest: int) -> None:
        super().__init__(depth=10)
        self.rest = rest

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i % 5 == self.rest:
                x = torch.sin(x)
        return x


class FourthLayer(Layer):
    rest = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.sin(x) if self.index % 4 == self.rest else x)


class LastOfFour(FourthLayer):
    rest = 3


class FifthAlone(Layer):
    """One layer in the middle runs otherwise, by its number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.sin(x) if self.index == 5 else x)


class NamedAlone(Layer):
    """One layer in the middle runs otherwise, by its name."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.label = f"layer.{index}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.sin(x) if self.label.endswith("5") else x)


class PrivateFlag(Layer):
    """The difference is a private attribute."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._special = index == 5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.sin(x) if self._special else x)


class OtherFunction(Layer):
    """The difference is the function a layer calls."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.act = torch.sin if index == 5 else torch.cos

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.act(x))


class OtherClosure(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        scale = 3.0 if index == 5 else 1.0
        self.act = lambda x: x * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.act(x))


class OtherConstant(Layer):
    """The difference is the value of a tensor that is neither parameter nor buffer."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.scale = torch.full((WIDTH,), 3.0 if index == 5 else 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale)


class TiedInside(Layer):
    """Two weights that are one tensor in the first layers, and two in another."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.second = nn.Linear(WIDTH, WIDTH)
        if index != 5:
            self.second.weight = self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.second(x)


class Hooked(Stack):
    """One layer's child has a forward hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[5].linear.register_forward_hook(lambda module, args, out: out * 2)


class TiedLayers(Stack):
    """Layers 2 and 5 share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[5].linear.weight = self.layers[2].linear.weight


class SharedLayer(Stack):
    """One module at two places of the list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[5] = self.layers[2]


class SharedChild(Stack):
    """All layers hold one and the same child."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.linear = self.layers[0].linear


class Twice(Stack):
    """Every layer runs twice."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(layer(x))
        return x


class FrozenBelow(Stack):
    """The lower layers run without gradients."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for layer in self.layers[:4]:
                x = layer(x)
        for layer in self.layers[4:]:
            x = layer(x)
        return x


# ------------------------------------------------------------------ odd results and arguments


@dataclass
class Result:
    hidden: torch.Tensor
    score: torch.Tensor


class Tupled(Layer):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(x), None, x.mean()


class Dictionary(Layer):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return {"hidden": super().forward(x), "score": x.mean(), "kind": "plain"}


class Structured(Layer):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return Result(super().forward(x), x.mean())


class Nothing(Layer):
    """Changes its argument in place and returns nothing."""

    def forward(self, x: torch.Tensor) -> None:  # type: ignore[override]
        x.add_(torch.tanh(self.linear(x.clone())))


class Keyword(Layer):
    def forward(self, *, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden * scale)


class Appending(Layer):
    """Leaves a result in its caller's list."""

    def forward(self, x: torch.Tensor, scores: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        scores.append(x.mean())
        return super().forward(x)


class Stashing(Layer):
    """Leaves a result on itself."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.score: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.score = x.mean()
        return super().forward(x)


class Odd(Stack):
    """Layers that return a tuple, a dict, an object or nothing, or take keywords or a list."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        scores: list[torch.Tensor] = []
        for layer in self.layers:
            if isinstance(layer, Keyword):
                x = layer(hidden=x, scale=0.5)
            elif isinstance(layer, Appending):
                x = layer(x, scores)
            elif isinstance(layer, Nothing):
                x = x.clone()
                layer(x)
            else:
                x = self.read(layer(x), scores)
        if isinstance(self.layers[0], Stashing):
            scores = [self.layers[4].score]  # one in the middle
        return x + sum(scores)

    def read(self, out: Any, scores: list[torch.Tensor]) -> torch.Tensor:
        if isinstance(out, tuple):
            scores.append(out[2])
            return out[0]
        if isinstance(out, dict):
            scores.append(out["score"])
            return out["hidden"]
        if isinstance(out, Result):
            scores.append(out.score)
            return out.hidden
        return out


# ------------------------------------------------------------------ gradients, randomness, other shapes of model


class Reversal(torch.autograd.Function):
    """The identity, with the gradient turned around."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return -ctx.scale * grad, None


class SetUpApart(torch.autograd.Function):
    """torch's other style of a function; two results, of which one has no gradient."""

    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
        return x * y, (x > y).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:  # type: ignore[override]
        x, y = ctx.saved_tensors
        return 2 * grad * y, 3 * grad * x


class Reversed(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product, mask = SetUpApart.apply(x, self.linear(x))  # type: ignore[misc]
        return super().forward(Reversal.apply(x, 0.5)) + product * mask  # type: ignore[operator]


class Detached(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.linear(x).abs().mean(-1, keepdim=True)
        return super().forward(x) * scale


class Dropped(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.3, self.training)
