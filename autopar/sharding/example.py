"""Examples of calls: what a rule is proved on. ``example(aten.softmax.int, tensor(4, 6), -1)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from autopar.sharding.notation import Pieces


@dataclass(frozen=True)
class Spec:
    """A random operand. Floats avoid zero (``positive``: and below), integers lie in [0, high); no gradient flows to a
    ``constant``."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    high: int = 4
    positive: bool = False
    constant: bool = False
    counted: bool = False

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        if self.counted:
            return torch.arange(self.shape[0])
        if self.dtype == torch.bool:
            return torch.rand(self.shape, generator=generator) < 0.7
        if self.dtype.is_complex:
            return torch.rand(self.shape, generator=generator, dtype=self.dtype) + (0.5 - 0.5j)
        if not self.dtype.is_floating_point:
            return torch.randint(self.high, self.shape, generator=generator, dtype=self.dtype)
        size = torch.rand(self.shape, generator=generator, dtype=torch.float64) + 0.25
        sign = 1 if self.positive else torch.randint(2, self.shape, generator=generator) * 2 - 1
        return (size * sign).to(self.dtype)

    @property
    def differentiable(self) -> bool:
        return (self.dtype.is_floating_point or self.dtype.is_complex) and not self.constant


def tensor(*shape: int, positive: bool = False) -> Spec:
    """A float64 operand without zeros."""
    return Spec(shape, positive=positive)


def constant(*shape: int) -> Spec:
    """A positive float64 operand to which no gradient flows."""
    return Spec(shape, positive=True, constant=True)


def integers(*shape: int, high: int) -> Spec:
    """An int64 operand with values in [0, high)."""
    return Spec(shape, torch.int64, high)


def counted(size: int) -> Spec:
    """The int64 operand 0, 1, 2, …"""
    return Spec((size,), torch.int64, counted=True)


def truths(*shape: int) -> Spec:
    """A boolean operand."""
    return Spec(shape, torch.bool)


@dataclass(frozen=True)
class Example:
    """One call with `Spec` in place of its operands. ``patterns``: pieces some letters may also be cut in."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    patterns: Mapping[str, set[Pieces]] = field(default_factory=dict)

    @cached_property
    def made(self) -> tuple[fx.Node, list[Spec]]:
        """The call as a node with shapes filled in, and its operands' specs in order."""
        graph, specs = fx.Graph(), []

        def put(value: Any) -> Any:
            if isinstance(value, Spec):
                node = graph.placeholder(f"x{len(specs)}")
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="meta")
                specs.append(value)
                return node
            return type(value)(put(v) for v in value) if isinstance(value, (list, tuple)) else value

        args = tuple(put(a) for a in self.args)
        kwargs = {k: put(v) for k, v in self.kwargs.items()}
        node = graph.call_function(self.target, args, kwargs)
        held = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        meta = {"device": "meta"} if not specs else {}
        node.meta["val"] = self.target(*held[0], **held[1], **meta)
        return node, specs

    @property
    def node(self) -> fx.Node:
        return self.made[0]

    def __str__(self) -> str:
        shown = [repr(list(a.shape)) if isinstance(a, Spec) else repr(a) for a in self.args]
        return f"{self.target}({', '.join([*shown, *(f'{k}={v}' for k, v in self.kwargs.items())])})"


def example(target: Any, *args: Any, patterns: Mapping[str, set[Pieces]] | None = None, **kwargs: Any) -> Example:
    """A call of ``target`` on operands made by `tensor`, `integers`, `truths`."""
    return Example(target, args, kwargs, patterns or {})
