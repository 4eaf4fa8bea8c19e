"""Custom autograd functions as nodes of a program: forward and backward stay the user's own."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autopar.ir.custom import CustomFunction, Slot
from autopar.ir.markers import FUNCTION


class FunctionCall:
    """The target of a node that calls ``cls.apply``; tensors are the node's arguments."""

    def __init__(self, function: CustomFunction) -> None:
        self.function = function
        self.__name__ = function.cls.__name__
        self.__qualname__ = function.cls.__qualname__
        self.__module__ = function.cls.__module__

    @property
    def pointwise(self) -> bool:
        """Whether every operation of its forward is pointwise (so that its tensors may be split along any dim)."""
        return self.function.pointwise

    def arguments(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(tensors[a.index] if isinstance(a, Slot) else a for a in self.function.arguments)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        return self.function.cls.apply(*self.arguments(tensors))  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{self.__module__}.{self.__qualname__}.apply"


def restore(graph: fx.Graph, functions: dict[str, CustomFunction]) -> None:
    """Replace the tracing stand-ins by calls of the functions."""
    for node in list(graph.nodes):
        if node.target is not FUNCTION:
            continue
        function = functions[node.args[1]]
        with graph.inserting_before(node):
            new = graph.create_node("call_function", FunctionCall(function), tuple(node.args[0]))
        new.meta = dict(node.meta)
        if function.single:
            new.meta["val"] = node.meta["val"][0]
            for user in list(node.users):
                assert user.target is operator.getitem, user
                user.replace_all_uses_with(new)
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(new)
        graph.erase_node(node)
