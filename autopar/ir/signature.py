"""Which modules of a model are repeated: equal by structure, so that one trace may stand for all of them."""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
INTERNAL = frozenset(vars(nn.Module()))
"""What every module holds for nn.Module's own sake."""


@dataclass(frozen=True)
class Instance:
    """One block of the module tree: where it is, and among how many alike.

    ``numbers``: the dotted attributes that number the layers and are left out of the signature. It holds only for as long
    as the block's forward does not read them.
    """

    path: str
    signature: str
    index: int
    count: int
    numbers: frozenset[str]


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside parameters, buffers, children and nn.Module's own."""
    return {name: value for name, value in vars(module).items() if name not in INTERNAL}


def dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def layer_numbers(children: list[nn.Module]) -> frozenset[str]:
    """The attributes that differ between any two children: numbers and names of layers."""
    if len(children) < 2:
        return frozenset()
    tables = [countable(c) for c in children]
    common = set.intersection(*[set(t) for t in tables])
    return frozenset(name for name in common if len({t[name] for t in tables}) == len(tables))


def countable(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module and its children by dotted name."""
    return {
        dotted(path, name): value
        for path, child in module.named_modules()
        for name, value in attributes(child).items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    }


class Describer:
    """Modules' structure as text; objects that are no plain values stand for themselves, numbered as they are met."""

    def __init__(self, numbers: frozenset[str]) -> None:
        self.numbers = numbers
        self.known: list[Any] = []  # kept alive: an id is unique only as long
        self.open: list[Any] = []  # code of the functions that are being described

    def of(self, module: nn.Module) -> str:
        return self.module(module, "", {})

    def module(self, module: nn.Module, path: str, tensors: dict[int, int]) -> str:
        """``tensors`` numbers the parameters and buffers met in this block: which of them are tied belongs to it."""
        parts = [self.identity(type(module)), str(module.training)]
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            shape = None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            parts.append(f"{name}:{shape}#{tensors.setdefault(id(tensor), len(tensors))}")
        for name in sorted(n for n in vars(module) if n.endswith("_hooks") and vars(module)[n]):
            parts.append(f"{name}:{[self.identity(h) for h in vars(module)[name].values()] if path else ''}")
        for name, value in sorted(attributes(module).items()):
            if dotted(path, name) not in self.numbers:
                parts.append(f"{name}={self.value(value, module)}")
        for name, child in module._modules.items():
            if child is not None:
                parts.append(f"{name}({self.module(child, dotted(path, name), tensors)})")
        return "|".join(parts)

    def value(self, value: Any, owner: nn.Module) -> str:
        if isinstance(value, PLAIN):
            return f"{type(value).__name__}:{value!r}"
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Tensor):
            return f"{type(value).__name__}[{','.join(self.value(v, owner) for v in value)}]"
        if isinstance(value, types.MethodType) and value.__self__ is owner:
            return f"own {self.value(value.__func__, owner)}"
        if isinstance(value, functools.partial):
            parts = (
                value.func,
                *value.args,
                *sorted(value.keywords),
                *(value.keywords[k] for k in sorted(value.keywords)),
            )
            return f"partial{self.value(parts, owner)}"
        if isinstance(value, types.FunctionType) and value.__code__ not in self.open:
            return self.function(value, owner)
        return self.identity(value)

    def function(self, value: types.FunctionType, owner: nn.Module) -> str:
        """A function is its code and what it closes over; one that is made anew for every layer is the same one."""
        cells = [c.cell_contents for c in value.__closure__ or () if c != types.CellType()]
        given = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        self.open.append(value.__code__)
        text = f"{self.identity(value.__code__)}{self.value(given, owner)}"
        self.open.remove(value.__code__)
        return text

    def identity(self, value: Any) -> str:
        for i, other in enumerate(self.known):
            if other is value:
                return f"@{i}"
        self.known.append(value)
        return f"@{len(self.known) - 1}"


def repeated(root: nn.Module) -> dict[str, Instance]:
    """The outermost children of containers that have parameters and occur more than once by structure, by path."""
    found: dict[str, Instance] = {}

    def visit(module: nn.Module, path: str) -> None:
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            found.update(alike(module, path))
        for name, child in module._modules.items():
            if child is not None and f"{path}{name}" not in found:
                visit(child, f"{path}{name}.")

    visit(root, "")
    places: dict[int, int] = defaultdict(int)
    for _, module in root.named_modules(remove_duplicate=False):
        places[id(module)] += 1
    return {p: i for p, i in found.items() if places[id(root.get_submodule(p))] == 1}


def alike(container: nn.Module, path: str) -> dict[str, Instance]:
    """The children of one container that are not alone of their kind."""
    children = {n: c for n, c in container._modules.items() if c is not None}
    numbers = layer_numbers(list({id(c): c for c in children.values()}.values()))
    describer = Describer(numbers)
    groups: dict[str, list[str]] = defaultdict(list)
    for name, child in children.items():
        if next(child.parameters(), None) is not None:
            groups[describer.of(child)].append(f"{path}{name}")
    return {
        where: Instance(where, f"{path}:{text}", i, len(paths), numbers)
        for text, paths in groups.items()
        if len(paths) > 1
        for i, where in enumerate(paths)
    }
