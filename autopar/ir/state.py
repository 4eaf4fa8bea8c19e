"""What a model reads from itself and keeps on itself while it runs: noticed, and undone after a trace."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from autopar.errors import TraceError
from autopar.ir.signature import Instance, attributes, dotted


class StashError(Exception):
    """Forward assigns tensors to attributes: trace again without what is there before the first assignment."""

    def __init__(self, stashes: set[tuple[str, str]]) -> None:
        super().__init__(", ".join(sorted(dotted(p, n) for p, n in stashes)))
        self.stashes = stashes


# ------------------------------------------------------------------ attributes that nobody should read


class Hidden:
    """Attributes whose reading is noticed: by module (its dict, which export's proxies share) and name."""

    def __init__(self) -> None:
        self.table: dict[tuple[int, str], Callable[[], None]] = {}
        self.owners: dict[type, set[str]] = {}

    def add(self, module: nn.Module, name: str, read: Callable[[], None]) -> None:
        self.table[id(vars(module)), name] = read
        self.owners.setdefault(type(module), set()).add(name)

    def add_numbers(self, block: nn.Module, instance: Instance, read: Callable[[str], None]) -> None:
        """The attributes that number a block's layer; ``read(name)`` is called before one is given."""
        for path, module in block.named_modules():
            for name in attributes(module):
                if dotted(path, name) in instance.numbers:
                    self.add(module, name, functools.partial(read, dotted(path, name)))

    def add_stashes(self, root: nn.Module, stashes: Iterable[tuple[str, str]]) -> None:
        """Attributes that forward assigns; reading one before that is an error, not a value."""
        for path, name in stashes:
            module = root.get_submodule(path)
            self.add(module, name, functools.partial(refuse, path, name, module))


def refuse(path: str, name: str, module: nn.Module) -> None:
    where = f"{path.removeprefix('model').lstrip('.') or 'the model'} ({type(module).__name__})"
    raise TraceError(
        f"{where} cannot be traced: it reads {name!r}, which an earlier call assigned; a model that keeps state from "
        "call to call must keep it in a buffer"
    )


class Noticed:
    """Stands on a class for an attribute of its instances; tells when a hidden one is read before it is assigned."""

    def __init__(self, name: str, hidden: Hidden, default: Any) -> None:
        self.name, self.hidden, self.default = name, hidden, default

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self.default
        held = vars(owner)
        if (id(held), self.name) in self.hidden.table:
            self.hidden.table[id(held), self.name]()
        if self.name in held:
            return held[self.name]
        if self.default is MISSING:
            raise AttributeError(f"{type(owner).__name__!r} object has no attribute {self.name!r}")
        return self.default

    def __set__(self, owner: Any, value: Any) -> None:
        self.hidden.table.pop((id(vars(owner)), self.name), None)
        vars(owner)[self.name] = value

    def __delete__(self, owner: Any) -> None:
        vars(owner).pop(self.name, None)


MISSING = object()


@contextlib.contextmanager
def noticed(hidden: Hidden) -> Iterator[None]:
    """Put the descriptors on the modules' classes for a while."""
    places = [(kind, name) for kind, names in hidden.owners.items() for name in names]
    own = [(kind, name, vars(kind)[name]) for kind, name in places if name in vars(kind)]
    try:
        for kind, name in places:
            setattr(kind, name, Noticed(name, hidden, getattr(kind, name, MISSING)))
        yield
    finally:
        for kind, name in places:
            if isinstance(vars(kind).get(name), Noticed):
                delattr(kind, name)
        for kind, name, value in own:
            setattr(kind, name, value)


# ------------------------------------------------------------------ what changes


def state_of(module: nn.Module) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The attributes of a module and its children by dotted name, and what containers and plain objects among them hold."""
    return {
        dotted(path, name): (value, contents(value))
        for path, child in module.named_modules()
        for name, value in attributes(child).items()
        if name != "forward"
    }


def contents(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple, set, frozenset)) and not isinstance(value, torch.Tensor):
        return tuple(value)
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, (nn.Module, torch.Tensor, type)) or callable(value):
        return ()
    held = getattr(value, "__dict__", {})
    return (*held.keys(), *held.values())


def changes(before: dict[str, tuple[Any, tuple[Any, ...]]], after: dict[str, tuple[Any, tuple[Any, ...]]]) -> list[str]:
    """The names of what was added, removed, replaced or filled."""
    return [n for n in (*before, *(k for k in after if k not in before)) if not same(before.get(n), after.get(n))]


def same(a: tuple[Any, tuple[Any, ...]] | None, b: tuple[Any, tuple[Any, ...]] | None) -> bool:
    if a is None or b is None:
        return False
    return a[0] is b[0] and len(a[1]) == len(b[1]) and all(x is y for x, y in zip(a[1], b[1], strict=True))


@contextlib.contextmanager
def state_restored(root: nn.Module, known: set[tuple[str, str]], notes: list[str]) -> Iterator[None]:
    """Undo, at the end of ``root``'s forward, what it assigned to attributes of its modules.

    `StashError` if tensors were assigned to others than ``known``; a note of what else changed.
    """
    original = root.forward

    @functools.wraps(original)  # export reads the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        before = {path: dict(attributes(m)) for path, m in root.named_modules()}
        buffers = {path: dict(m._buffers) for path, m in root.named_modules()}
        changed: dict[tuple[str, str], Any] = {}
        try:
            result = original(*args, **kwargs)
        finally:
            changed = restored(root, before)
        refuse_assigned_buffers(root, buffers)
        tensors = {key for key, value in changed.items() if holds_tensor(value)}
        notes.extend(
            f"{dotted(*k)} changes from run to run; traced with its value now" for k in changed.keys() - tensors
        )
        if tensors - known:
            raise StashError(tensors - known)
        return result

    root.forward = forward
    try:
        yield
    finally:
        del root.forward


def refuse_assigned_buffers(root: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    for path, module in root.named_modules():
        for name, value in module._buffers.items():
            if value is not before.get(path, {}).get(name):
                where = f"{path.removeprefix('model').lstrip('.') or 'the model'} ({type(module).__name__})"
                raise TraceError(
                    f"{where} cannot be traced: it assigns its buffer {name!r} in forward; change it in place, {name}.copy_(…)"
                )


def restored(root: nn.Module, before: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Any]:
    """Put attributes back; what was there instead, by (module path, name)."""
    changed: dict[tuple[str, str], Any] = {}
    for path, module in root.named_modules():
        old = before.get(path, {})
        for name, value in attributes(module).items():
            if name not in old or old[name] is not value:
                changed[path, name] = value
        for name in [n for p, n in changed if p == path]:
            vars(module).pop(name)
        vars(module).update(old)
    return changed


def holds_tensor(value: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value))
