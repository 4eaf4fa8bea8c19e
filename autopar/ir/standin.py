"""A model without its values: all its tensors on the meta device for the time of a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def on_meta(root: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """All tensors of a module on the meta device for a while: one device kind, one graph; ties are kept.

    Yields the originals by the id of their stand-in.
    """
    originals: dict[int, torch.Tensor] = {}
    stand_ins: dict[int, torch.Tensor] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def stand_in(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if id(tensor) not in stand_ins:
            empty = torch.empty_like(tensor, device="meta").requires_grad_(False)
            new = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            stand_ins[id(tensor)], originals[id(new)] = new, tensor
        return stand_ins[id(tensor)]

    try:
        for module in root.modules():
            for table in (module._parameters, module._buffers, vars(module)):
                for name, value in list(table.items()):
                    if holds_tensors(name, value):
                        undo.append((table, name, value))
                        table[name] = pytree.tree_map(stand_in, value)
        yield originals
    finally:
        for table, name, value in undo:
            table[name] = value


def holds_tensors(name: str, value: Any) -> bool:
    """Whether a module's entry is a tensor, or a list, tuple or dict with tensors in it."""
    if isinstance(value, torch.Tensor):
        return True
    plain = type(value) in (list, tuple, dict) and name not in ("_parameters", "_buffers", "_modules")
    return plain and any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value))


class Literals(TorchFunctionMode):
    """Keeps the values of literals that a model on the meta device would lose: `torch.tensor(3.0)`, `x[:, [0, 2]]`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            return literal(func, *args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i, device="cpu") if plain_list(i) else i for i in index), *args[2:])
        return func(*args, **kwargs)


def plain_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, (int, bool)) for v in value)


def literal(make: Any, data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    if device.type != "meta" or not isinstance(data, (int, float, bool, list, tuple)):
        return make(data, *args, **kwargs)
    value = make(data, *args, **{**kwargs, "device": "cpu"})
    if value.dim() == 0:
        return torch.full((), data, dtype=value.dtype, device=device)  # type: ignore
    return value.to(device)
